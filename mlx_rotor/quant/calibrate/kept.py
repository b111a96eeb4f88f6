"""Work files of a calibration and of a measurement of sensitivities, so that both go on after a crash.

A calibration keeps the hidden states that a layer takes, in at most two files, and the inputs of a layer's experts
until the next layer's turn. A measurement keeps the hidden states of all its copies of the model.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RotorError
from ...files import write_json, writing
from ..policy import Spec


class HiddenFiles:
    """`hidden-0007.npy` in `folder`: what layer 7 takes, float32 [sequences, length, ..]."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:04d}.npy"

    def newest(self, layer: int) -> int | None:
        """The last layer up to `layer` whose input is there."""
        found = [int(path.stem.removeprefix("hidden-")) for path in self.folder.glob("hidden-*.npy")]
        return max((n for n in found if n <= layer), default=None)

    def read(self, layer: int) -> np.ndarray:
        """Mapped into memory, read-only."""
        try:
            return np.asarray(np.load(self.path(layer), mmap_mode="r"))
        except (OSError, ValueError) as e:
            raise RotorError(f"{self.path(layer)}: not readable ({e}); delete it, and calibration starts again") from e

    def write(self, layer: int, count: int, chunks: Iterable[np.ndarray]) -> None:
        """`chunks` of the `count` sequences, in order, each written before the next is asked for."""
        write_array(self.path(layer), count, chunks)

    def drop(self, before: int) -> None:
        """Deletes the inputs of layers before one."""
        for path in self.folder.glob("hidden-*.npy"):
            if int(path.stem.removeprefix("hidden-")) < before:
                path.unlink()

    def experts(self, layer: int, nth: int) -> Path:
        """For the inputs of a layer's nth mixture of experts, float32 rows."""
        return self.folder / f"experts-{layer:04d}-{nth}.f32"

    def drop_experts(self) -> None:
        for path in self.folder.glob("experts-*"):
            path.unlink()

    def clear(self) -> None:
        self.drop_experts()
        for path in self.folder.glob("hidden-*"):
            path.unlink()


def write_array(path: Path, count: int, chunks: Iterable[np.ndarray]) -> None:
    """A .npy file, float32 [count, ..], whole or not there. `chunks` of its first dimension, in order, each written
    before the next is asked for. OSError where it can't be written."""
    with writing(path) as file:
        for number, chunk in enumerate(chunks):
            if not number:
                head = {"descr": "<f4", "fortran_order": False, "shape": (count, *chunk.shape[1:])}
                np.lib.format.write_array_header_2_0(file, head)
            file.write(np.ascontiguousarray(chunk, "<f4").data)


STATE = "measured.json"
SECONDS = 120.0  # between two states; of 62 layers, the last is 1.4 GB

Ratios = dict[str, dict[Spec, float]]


@dataclass(frozen=True)
class Kept:
    """Behind `layer` layers: `hidden` float32 [copies, sequences, length, ..], each the copy of one of `modules`."""

    layer: int
    modules: tuple[str, ...]
    hidden: np.ndarray
    ratios: Ratios


class Keeper:
    """States of one measurement in `folder`, which a calibration keeps its files in too; another measurement's files
    there are deleted."""

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """`job`: all that the measurement depends on, as JSON holds it. OSError where the folder can't be written."""
        self._folder, self._job = folder, dict(job)
        self._last = time.monotonic()
        self._state = self._read()
        if self._state is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / STATE, {"job": self._job})

    def found(self) -> Kept | None:
        """What an earlier run kept.

        Raises:
            RotorError: it is not readable.
        """
        if not self._state or "layer" not in self._state:
            return None
        path, layer = self._path(self._state["layer"]), self._state["layer"]
        try:
            every = np.load(path)
            ratios = {
                module: {Spec(bits, size, mode): ratio for bits, size, mode, ratio in rows}
                for module, rows in self._state["ratios"].items()
            }
        except (OSError, ValueError) as e:
            raise RotorError(f"{path}: not readable ({e}); delete {self._folder}, and measuring starts again") from e
        hidden = HiddenFiles(self._folder)
        if hidden.newest(layer) != layer:  # the calibration is ahead: it goes back to here
            hidden.write(layer, every.shape[1], [every[0]])
        return Kept(layer, tuple(self._state["modules"]), every[1:], ratios)

    def keep(self, layer: int, base: np.ndarray, modules: Sequence[str], hidden: Any, ratios: Ratios) -> None:
        """Makes a state durable, if the last is some time ago. `base`: the source's hidden states [sequences, ..],
        `hidden`: the copies', one after the other."""
        if time.monotonic() - self._last < SECONDS:
            return
        path = self._path(layer)
        write_array(path, 1 + len(modules), (states[None] for states in chain([base], hidden)))
        rows = {m: [[s.bits, s.group_size, s.mode, ratio] for s, ratio in found.items()] for m, found in ratios.items()}
        state = {"job": self._job, "layer": layer, "modules": list(modules), "ratios": rows}
        write_json(self._folder / STATE, state)
        for other in self._folder.glob("copies-*"):
            if other != path:
                other.unlink()
        self._last = time.monotonic()

    def _path(self, layer: int) -> Path:
        return self._folder / f"copies-{layer:04d}.npy"

    def _read(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and state.get("job") == self._job else None
