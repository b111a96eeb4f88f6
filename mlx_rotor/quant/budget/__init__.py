"""Bits by budget: what they are worth where, and the best choice of them for a size."""

from .solver import TooSmall, solve, worth

__all__ = ["TooSmall", "solve", "worth"]
