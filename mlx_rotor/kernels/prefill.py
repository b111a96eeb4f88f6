"""Attention of many query rows: the launches before `merge`, and how the work is cut."""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError
from . import metal
from .problem import ARGUMENTS, INPUTS, POSITION, Problem
from .rotate import rotate_metal
from .runs import PackedRun

THREADS, ROWS = 128, 32  # MLX_ROTOR_PREFILL_THREADS, MLX_ROTOR_PREFILL_ROWS
MAX_DIM = 256  # a step's tokens fit 32 KiB of threadgroup memory, and a row's queries and sums the registers
THREADGROUPS = 256  # enough to fill a GPU
PARTIAL_BYTES = 64 << 20  # partial results of the queries taken at a time
# The rotation's numbers are the rotate kernel's.
TAKEN = tuple(name for name in INPUTS if name not in ("table", "root"))


def splits_for(q: mx.array, body: PackedRun, most: int) -> int:
    """Parts that the body is read in: as many as fill a GPU along with the rows, at most `most`."""
    batch, heads, queries, _ = q.shape
    kv_heads = body.k.tiles.shape[1]
    blocks = -(-(heads // kv_heads * queries) // ROWS)
    return max(1, min(most, -(-THREADGROUPS // (batch * kv_heads * blocks))))


def piece_for(q: mx.array, body: PackedRun, splits: int) -> int:
    """Queries taken at a time: partial results stay below PARTIAL_BYTES."""
    row_bytes = 4 * q.shape[0] * q.shape[1] * (splits + 1) * body.v.codec.dim
    return max(1, min(int(q.shape[2]), PARTIAL_BYTES // row_bytes))


def prefill(p: Problem) -> list[mx.array]:
    """Partial results and statistics of every split, `Problem.partial_shapes`.

    Raises:
        RotorError: for a head dimension above MAX_DIM.
    """
    if max(p.k_dim, p.v_dim) > MAX_DIM:
        raise RotorError(f"the prefill kernel takes head dimensions up to {MAX_DIM}, not {max(p.k_dim, p.v_dim)}")
    given = dict(zip(INPUTS, p.inputs, strict=True))
    rotated = rotate_metal(p.k, p.q, order=p.k.quantizer, factor=given["factor"])
    staged = "float" if p.q.dtype == mx.float32 else "half"
    types = f"{p.dtype}, {staged}, {p.k.quantizer.name}, {p.v.quantizer.name}, {p.k_dim}, {p.v_dim}"
    made = metal.kernel(
        "prefill",
        ("attention/prefill.h", p.k.quantizer.header, p.v.quantizer.header),
        ("rotated", *TAKEN),
        ("out", "stats"),
        f"""
  typedef Prefill<{types}, {p.mask_kind}> P;
  threadgroup {staged} stage[P::WIDTH * P::ROOM];
  threadgroup float scales[2 * P::TOKENS];
  prefill<P>(rotated, {ARGUMENTS.replace("table, root, ", "").strip()}, stage, scales,
      {POSITION});
""",
    )
    blocks = -(-p.rows // ROWS)
    return made(
        inputs=[rotated, *(given[name] for name in TAKEN)],
        output_shapes=p.partial_shapes(),
        output_dtypes=[mx.float32, mx.float32],
        grid=(THREADS * p.splits, p.kv_heads * blocks, p.q.shape[0]),
        threadgroup=(THREADS, 1, 1),
    )
