"""Checks and measurements of this Mac, which `mlx_rotor doctor` runs: is it right, and how fast is it."""
