"""The bundled model: a trained 10.5 M-parameter MiniMax-M2, the default of every command that takes a model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

MODEL = Path(__file__).parent / "model"


@cache
def held_out_text() -> str:
    """Python standard-library source no training row contains, files joined in a fixed order."""
    import gzip

    return gzip.decompress((Path(__file__).parent / "held_out.txt.gz").read_bytes()).decode()
