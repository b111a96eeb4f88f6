"""Reads, fits and writes one piece of one entry of the plan, and digests what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock, local

import mlx.core as mx
import numpy as np

from ...errors import RotorError
from ..fit import Hessian, fit, squared_error, sum_of_squares
from ..guide import Statistics, Weights
from ..plan import Entry, Output
from ..policy import FIXED
from ..safetensors_io import ShardWriter

PIECE = 5 << 20  # weights read at a time: all rows of a usual expert, 20 MiB in float32
GUIDED_PIECE = 1 << 25  # with statistics: error feedback works on a whole [K, K] matrix again for every piece
SAMPLE = 16  # under `fast`, which is done sooner than its error is known, one piece in this many is measured

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one of an entry's parts, and the number of the output's first row they become."""

    number: int
    part: int
    start: int
    stop: int
    row: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Done:
    """A piece that was written: digest of its bytes, squared error and sum of squares of `measured` weights."""

    digest: bytes
    error: float
    norm: float
    measured: int


def pieces(entry: Entry, block_rows: int, limit: int | None = None) -> Iterator[Piece]:
    """The entry's rows in order, at most `limit` (PIECE) weights each or one row of blocks, cut where blocks begin."""
    rows, cols = entry.source_shape[0], prod(entry.source_shape[1:])
    step = max(1, (limit or PIECE) // (cols * block_rows)) * block_rows
    number = 0
    for part in range(entry.parts):
        for start in range(0, rows, step):
            yield Piece(number, part, start, min(start + step, rows), part * rows + start)
            number += 1


class Fitting:
    """What the pieces of one layer are made with. Pieces may be written from several threads.

    `statistics` is asked by one thread at a time, in the thread that fits: what it hands out must be evaluated or
    made there, as MLX's lazy arrays belong to the thread that made them. The same holds for what `weights` keeps.
    What a thread was told last it keeps, factorised: pieces with the same inputs are best written in turn.
    """

    def __init__(self, weights: Weights, statistics: Statistics | None, method: str) -> None:
        self._weights, self._statistics, self._method = weights, statistics, method
        self._lock, self._last = Lock(), local()

    def together(self, tasks: Sequence[tuple[Entry, Piece]]) -> list[list[tuple[Entry, Piece]]]:
        """The pieces of entries, cut into what one thread is to write in turn: the same rows of what has the same
        inputs, as an expert's gate and up."""
        if self._statistics is None:
            return [[task] for task in tasks]
        found: dict[tuple[str, int, int], list[tuple[Entry, Piece]]] = {}
        for entry, piece in tasks:
            found.setdefault((self._statistics.inputs(entry), piece.part, piece.start), []).append((entry, piece))
        return list(found.values())

    def write(self, entry: Entry, piece: Piece, writer: ShardWriter) -> Done:
        """Reads, fits and writes a piece.

        Raises:
            RotorError: weights that are not finite, or too large to square, by the source's name.
            OSError: the output can't be written.
        """
        w = self._weights.read(entry, piece.part, piece.start, piece.stop)
        stored, sums, measured = self._stored(entry, piece, w)
        digest = hashlib.sha256()
        for output, values in zip(entry.outputs, stored, strict=True):
            data = _bytes(values)
            expected = piece.rows * _row_bytes(output, entry)
            if data.nbytes != expected:
                raise RotorError(f"{output.name}: {data.nbytes} bytes were made of rows that take {expected}")
            writer.write(output.name, piece.row * _row_bytes(output, entry), data)
            digest.update(data)
        return Done(digest.digest(), *sums, measured)

    def _stored(self, entry: Entry, piece: Piece, w: mx.array) -> tuple[list[mx.array], tuple[float, float], int]:
        method = entry.fit or self._method
        measure = method != "fast" or piece.number % SAMPLE == 0
        sums = (0.0, 0.0)
        if entry.spec is None:
            stored = [w.astype(DTYPES[entry.outputs[0].dtype])]
            measure = True
            sums = (sum_of_squares(stored[0] - w), sum_of_squares(w))
        else:
            fitted = fit(w, entry.spec, method, *self._seen(entry, piece.part, method))
            stored = list(fitted.parts)
            if measure:
                sums = squared_error(w, fitted, entry.spec)
        finite = [mx.all(mx.isfinite(a)) for a in stored if a.dtype in (mx.bfloat16, mx.float16, mx.float32)]
        if not np.isfinite(sums).all() or not all(f.item() for f in finite):
            largest = mx.max(mx.abs(w)).item()
            raise RotorError(
                f"{entry.source(piece.part)}: weights of up to {largest:.4g} are too large; the source"
                " checkpoint is damaged"
            )
        return stored, sums, piece.rows * prod(entry.source_shape[1:]) if measure else 0

    def _seen(self, entry: Entry, part: int, method: str) -> tuple[mx.array | None, Hessian | None]:
        """(importance, Hessian): the fit goes by the latter alone where it is known."""
        assert entry.spec is not None
        if self._statistics is None or method == "fast" or entry.spec.mode in FIXED:
            return None, None
        with self._lock:
            key = (self._statistics.inputs(entry), part)
            if getattr(self._last, "key", None) == key:
                return self._last.seen  # type: ignore[no-any-return]
            self._last.key = self._last.seen = None  # the old one goes before the new one comes
            matrix = self._statistics.hessian(entry, part)
            importance = self._statistics.importance(entry, part) if matrix is None else None
            mx.eval([a for a in (matrix, importance) if a is not None])
        self._last.key = key
        self._last.seen = importance, None if matrix is None else Hessian(matrix)
        return self._last.seen  # type: ignore[no-any-return]


def digest_of(entry: Entry, piece: Piece, writer: ShardWriter) -> bytes:
    """Digest of what the file holds at a piece's places: `Done.digest` if it is what was written."""
    digest = hashlib.sha256()
    for output in entry.outputs:
        row = _row_bytes(output, entry)
        digest.update(writer.read(output.name, piece.row * row, (piece.row + piece.rows) * row))
    return digest.digest()


def joined(digests: Sequence[bytes]) -> str:
    """The digest of a unit, from its pieces' in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _row_bytes(output: Output, entry: Entry) -> int:
    """Bytes of one of the entry's rows (over all experts) in an output tensor."""
    return output.nbytes // (entry.parts * entry.source_shape[0])


def _bytes(values: mx.array) -> memoryview:
    if values.dtype == mx.bfloat16:  # not a type that buffers have
        values = values.view(mx.uint16)
    return memoryview(mx.contiguous(values)).cast("B")  # type: ignore[arg-type]
