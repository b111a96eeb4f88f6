"""One entry of the plan from the source's files into the output's, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from ..errors import RotorError
from .fit import fit, squared_error, sum_of_squares
from .plan import Entry, Output, Plan
from .safetensors_io import ShardWriter
from .source import Checkpoint

PIECE = 1 << 22  # weights read at a time: all rows of a usual expert, 16 MiB in float32

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one of an entry's parts, and the number of the output's first row they become."""

    part: int
    start: int
    stop: int
    row: int


def pieces(entry: Entry, block_rows: int) -> Iterator[Piece]:
    """The entry's rows in order, at most PIECE weights each (or one row of blocks), cut where FP8 blocks begin."""
    rows, cols = entry.source_shape[0], prod(entry.source_shape[1:])
    step = max(1, PIECE // (cols * block_rows)) * block_rows
    for part in range(entry.parts):
        for start in range(0, rows, step):
            yield Piece(part, start, min(start + step, rows), part * rows + start)


def shards(plan: Plan, limit: int) -> list[list[Entry]]:
    """The plan's entries cut, in order, into files of at most `limit` bytes; a larger entry gets a file of its own."""
    files: list[list[Entry]] = []
    used = 0
    for entry in plan.entries:
        if not files or used + entry.nbytes > limit:
            files.append([])
            used = 0
        files[-1].append(entry)
        used += entry.nbytes
    return files


def write_entry(
    entry: Entry, checkpoint: Checkpoint, writer: ShardWriter, method: str, advance: Callable[[int], None]
) -> tuple[float, float]:
    """Reads, fits and writes an entry; `advance` gets the source bytes of each finished piece.

    Returns (squared error, sum of squares) over its weights, both in float32 sums.

    Raises:
        RotorError: weights that are not finite, or too large to square, by the source's name.
        OSError: the output can't be written.
    """
    error = norm = 0.0
    for piece in pieces(entry, checkpoint.block[0]):
        w = checkpoint.read(entry, piece.part, piece.start, piece.stop)
        if entry.spec is None:
            stored = [w.astype(DTYPES[entry.outputs[0].dtype])]
            sums = (sum_of_squares(stored[0] - w), sum_of_squares(w))
        else:
            fitted = fit(w, entry.spec, method)
            stored = [fitted.weight, fitted.scales, fitted.biases]
            sums = squared_error(w, fitted, entry.spec)
        source = entry.sources[piece.part]
        if not np.isfinite(sums).all():
            raise RotorError(f"{source}: weights are too large to be stored; the source checkpoint is damaged")
        error, norm = error + sums[0], norm + sums[1]
        for output, values in zip(entry.outputs, stored, strict=True):
            writer.write(output.name, piece.row * _row_bytes(output, entry), _bytes(values))
        info = checkpoint.tensors[source]
        advance(info.nbytes * (piece.stop - piece.start) // info.shape[0])
    return error, norm


def _row_bytes(output: Output, entry: Entry) -> int:
    """Bytes of one of the entry's rows (over all experts) in an output tensor."""
    return output.nbytes // (len(entry.sources) * entry.source_shape[0])


def _bytes(values: mx.array) -> bytes:
    if values.dtype == mx.bfloat16:  # numpy has no bfloat16
        values = values.view(mx.uint16)
    return np.array(values).tobytes()
