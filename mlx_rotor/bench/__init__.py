"""Time and memory of the parts, which `mlx_rotor benchmark` measures."""
