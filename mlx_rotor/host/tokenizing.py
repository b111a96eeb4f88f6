"""A checkpoint's tokenizer without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from .loading import explained


def tokenizer(folder: str | Path) -> Any:
    """mlx_lm's tokenizer of a checkpoint folder.

    Raises:
        RotorError: there is none, or it can't be read.
    """
    with explained(str(folder)):
        return load_tokenizer(Path(folder))
