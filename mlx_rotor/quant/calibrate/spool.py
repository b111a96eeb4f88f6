"""Work files of a calibration. Hidden states between layers: a file is whole or not there, and at most two are kept.
What a layer's experts take: until the next layer's turn."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...errors import RotorError
from ..safetensors_io import sync_folder


class Spool:
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
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for number, chunk in enumerate(chunks):
            if not number:
                head = {"descr": "<f4", "fortran_order": False, "shape": (count, *chunk.shape[1:])}
                np.lib.format.write_array_header_2_0(file, head)
            file.write(np.ascontiguousarray(chunk, "<f4").data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
