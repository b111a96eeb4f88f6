"""mlx_lm.server with compressed caches, behind a reader that refuses what it can't serve."""

from .handler import Asked, Reader
from .refusal import Refusal
from .running import Patch, patch, start, stock_parser

__all__ = ["Asked", "Patch", "Reader", "Refusal", "patch", "start", "stock_parser"]
