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


@cache
def calibration_text() -> str:
    """Text that weights are calibrated on by default: pieces of the Python standard library's source and of its
    language reference, half and half and in turn, none of them held out.

    Made from Python 3.11: of each module that calibration.txt lists, whole lines from three tenths of the way in; of
    each topic of pydoc_data/topics.py it lists, at most 6200 characters from its middle.
    """
    import gzip

    return gzip.decompress((Path(__file__).parent / "calibration.txt.gz").read_bytes()).decode()


@cache
def held_out_prose() -> str:
    """English paragraphs of Python's documentation, a blank line between. They share no ten words in a row with the
    standard library's source or the packages the model was trained on."""
    import gzip

    return gzip.decompress((Path(__file__).parent / "held_out_prose.txt.gz").read_bytes()).decode()
