"""Weight formats beyond MLX's own, and the layers that use the expert kernels."""
