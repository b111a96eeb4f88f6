"""The reference's log-probabilities on disk, so that only one model is in memory at a time."""

from __future__ import annotations

import shutil
import tempfile
from types import TracebackType

import numpy as np

from ..errors import RotorError

FLOAT32_LIMIT = 4 << 30


class Spool:
    """Log-probabilities [rows, vocab], appended once and read many times.

    The file is unnamed and in the system's temporary folder (`TMPDIR`); it vanishes with the process however that
    ends. float32 up to 4 GiB, float16 beyond.

    Raises:
        RotorError: the disk has too little room, before anything is written, or fills up meanwhile.
    """

    def __init__(self) -> None:
        self.rows, self.vocab, self.bytes = 0, 0, 0
        self.dtype: type[np.floating] = np.float32
        self._file = tempfile.TemporaryFile(prefix="mlx_rotor-")  # noqa: SIM115, closed in __exit__
        self._map: np.memmap | None = None

    def reserve(self, rows: int, vocab: int) -> None:
        """Says how much will be appended; fails at once if it can't fit."""
        self.rows, self.vocab = rows, vocab
        self.dtype = np.float32 if rows * vocab * 4 <= FLOAT32_LIMIT else np.float16
        self.bytes = rows * vocab * np.dtype(self.dtype).itemsize
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if self.bytes > free:
            raise RotorError(
                f"{folder}: the reference's log-probabilities need {self.bytes / 1e9:.2f} GB ({rows} tokens × {vocab} "
                f"× {np.dtype(self.dtype).name}) and {free / 1e9:.2f} GB are free; use fewer --windows or set TMPDIR "
                "to a bigger disk"
            )

    def append(self, logp: np.ndarray) -> None:
        """logp: [n, vocab]."""
        try:
            self._file.write(logp.astype(self.dtype).tobytes())
        except OSError as e:
            raise RotorError(f"{tempfile.gettempdir()}: {e.strerror}; set TMPDIR to a disk with more room") from e

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop -> [stop - start, vocab] in the stored type."""
        if self._map is None:
            self._file.flush()
            self._map = np.memmap(self._file, dtype=self.dtype, mode="r", shape=(self.rows, self.vocab))
        return np.asarray(self._map[start:stop])

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._map = None
        self._file.close()
