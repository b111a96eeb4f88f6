"""Time, memory and traffic of the parts: what `mlx_rotor benchmark` runs."""
