"""KV caches over codecs: what stays exact, what is packed, and how attention reads it."""

from .ragged import RaggedBatch
from .rotor import RotorCache
from .scheme import DEFAULT, EXACT, Scheme, parse

__all__ = ["DEFAULT", "EXACT", "RaggedBatch", "RotorCache", "Scheme", "parse"]
