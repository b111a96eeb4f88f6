"""Array maths that finds codes for weights: groups, grids, error feedback. No format, no policy, no file.

Every weight format (`mlx_rotor.experts.formats`) builds its fit from these parts.
"""

FITS = ("fast", "search", "best")  # how hard to look, least first

__all__ = ["FITS"]
