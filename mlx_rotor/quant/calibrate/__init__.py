"""Inputs of every weight, measured by running the source model on some text, one layer in memory at a time."""

from .calibration import Calibration
from .measure import measure
from .moments import LayerStatistics, Scaled
from .text import default_size, prepare, read, sequences

__all__ = ["Calibration", "LayerStatistics", "Scaled", "default_size", "measure", "prepare", "read", "sequences"]
