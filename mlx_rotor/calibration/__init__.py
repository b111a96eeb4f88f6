"""KV schemes measured for one model on a text: fp8 with the model's scales, and codecs by layer, written to a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..bundled import held_out_text
from ..cache import scheme_file
from ..cache.scheme_file import Sidecar
from ..errors import RotorError
from ..quality.machine import machine
from ..quality.model import EvaluatedModel, NamedModel
from ..quality.sample import draw_between, encode, opening
from . import maxima
from .search import Found, Search

CANDIDATES = ("trellis2", "trellis3", "trellis4")


@dataclass(frozen=True)
class Reading:
    """What is read: `windows` windows of `window` tokens, `chunk` at a time. `text` None: the bundled held-out text."""

    windows: int
    window: int
    chunk: int
    text: str | None = None
    text_name: str = "bundled held-out text"

    def __post_init__(self) -> None:
        for name, low in (("windows", 1), ("window", 8), ("chunk", 1)):
            if getattr(self, name) < low:
                raise RotorError(f"--{name} {getattr(self, name)}: must be at least {low}")

    def draw(self, subject: EvaluatedModel) -> np.ndarray:
        """int [windows, window]. Raises RotorError if text or context is too short."""
        if subject.context is not None and self.window > subject.context:
            raise RotorError(f"{self.window} tokens are more than the model's context of {subject.context}")
        tokens = encode(subject.tokenizer, held_out_text() if self.text is None else self.text)
        return draw_between(tokens, opening(subject.tokenizer), self.windows, self.window)

    @property
    def facts(self) -> dict[str, object]:
        read = {"text": self.text_name, "windows": self.windows, "window": self.window, "chunk": self.chunk}
        return read | {"machine": machine()}


# About a minute of the bundled model on a CPU core, and about five for three candidates.
MAXIMA = Reading(8, 512, 128)
SEARCH = Reading(4, 256, 64)


def _bar(progress: bool) -> tqdm:
    return tqdm(unit="tok", disable=not progress, smoothing=0.05, mininterval=1 if sys.stderr.isatty() else 30)


def fp8(file: Path, model: str | None, reading: Reading, progress: bool = False) -> Sidecar:
    """Writes the fp8 scheme of `model` to `file` and returns it.

    Raises:
        RotorError: and leaves no file.
    """
    subject = EvaluatedModel(NamedModel.parse(model))
    windows = reading.draw(subject)
    with _bar(progress) as bar:
        bar.reset(windows.size)
        largest = maxima.maxima(subject, windows, reading.chunk, bar.update)
    scheme = maxima.fp8_scheme(subject, largest, reading.facts)
    scheme_file.write(file, scheme)
    return scheme


def bits(
    file: Path,
    model: str | None,
    target: float,
    candidates: Sequence[str],
    reading: Reading,
    progress: bool = False,
) -> Found:
    """Writes the scheme of the least KL at `target` bits an element to `file` and returns what was found.

    Raises:
        RotorError: and leaves no file; see `Search`.
    """
    subject = EvaluatedModel(NamedModel.parse(model))
    windows = reading.draw(subject)
    with _bar(progress) as bar:
        search = Search(subject, windows, reading.chunk, list(dict.fromkeys(candidates)), bar.update)
        bar.reset(search.runs * windows.size)
        made = reading.facts | {"candidates": list(candidates)}
        found = search.solve(target, f"calibrated-{target:g}", made)
    scheme_file.write(file, found.scheme)
    return found
