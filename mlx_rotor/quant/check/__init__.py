"""Checks whether MLX readers can read a checkpoint, ours or not."""

from .checker import check, facts, status, text

__all__ = ["check", "facts", "status", "text"]
