"""Whether this Mac runs the kernels right, and how fast: what `mlx_rotor doctor` runs."""
