"""KV caches over codecs: what is kept exact, what is packed, and how attention reads it."""

from .rotor import RotorCache
from .scheme import DEFAULT, EXACT, Scheme, parse

__all__ = ["DEFAULT", "EXACT", "RotorCache", "Scheme", "parse"]
