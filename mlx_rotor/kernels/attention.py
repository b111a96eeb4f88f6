"""Attention over packed and exact tokens: the Metal launches. What they compute: `reference.attend`."""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError
from . import metal, prefill
from .problem import ARGUMENTS, INPUTS, POSITION, Problem, problem
from .runs import ExactRun, PackedRun
from .tiles import TILE

ROWS = 8  # query rows of a KV head that the decode kernel takes at a time
# A split takes this many tokens of the body; beyond FEW splits, one more for each MORE_TOKENS. So there are enough for
# a GPU's cores from 2K tokens on, and their results stay within some 5 % of the packed bytes at 16K.
SPLIT_TOKENS, FEW, MORE_TOKENS, MAX_SPLITS = 256, 8, 2048, 31


def splits_for(tokens: int) -> int:
    """Parts that a packed body of `tokens` is read in."""
    more = max(0, tokens - FEW * SPLIT_TOKENS) // MORE_TOKENS
    return max(1, min(MAX_SPLITS, -(-tokens // SPLIT_TOKENS), FEW + more))


def simds_for(dtype: mx.Dtype) -> int:
    """Simdgroups of a threadgroup: as many as their staged tiles fit 32 KiB, which a float takes twice of."""
    return 2 if dtype == mx.float32 else 4


def decode(p: Problem) -> list[mx.array]:
    """Partial results and statistics of every split, `Problem.partial_shapes`, for up to ROWS query rows."""
    rows, simds = p.rows, simds_for(p.q.dtype)
    types = f"{p.dtype}, {p.k.quantizer.name}, {p.v.quantizer.name}, {p.k.rotation.name}, {p.k_dim}, {p.v_dim}"
    made = metal.kernel(
        "decode",
        ("attention/decode.h", p.k.quantizer.header, p.v.quantizer.header, p.k.rotation.header),
        INPUTS,
        ("out", "stats"),
        f"""
  typedef Decode<{types}, {rows}, {simds}, {p.mask_kind}> D;
  threadgroup uint staged[D::Turn::TABLE];
  threadgroup float4 query[(D::QUERY + 3) / 4];
  threadgroup float weight[{simds * TILE * rows}];
  threadgroup D::S stage[{simds} * MLX_ROTOR_TILE * MLX_ROTOR_STAGE];
  decode<D>({ARGUMENTS}, staged, (threadgroup float *)query, weight, stage,
      {POSITION});
""",
    )
    return made(
        inputs=p.inputs,
        output_shapes=p.partial_shapes(),
        output_dtypes=[mx.float32, mx.float32],
        grid=(32 * simds * p.splits, p.kv_heads, p.q.shape[0]),
        threadgroup=(32 * simds, 1, 1),
    )


def merge(p: Problem, partial: mx.array, stats: mx.array, logits: mx.array | None) -> mx.array:
    """Splits put together: [B, Hq, L, Dv] in the queries' dtype."""
    batch, heads, queries, _ = p.q.shape
    made = metal.kernel(
        "merge",
        ("attention/merge.h", p.v.quantizer.header, p.v.rotation.header),
        ("partial", "stats", "table", "root", "logits", "sizes"),
        ("out",),
        f"""
  typedef {p.v.rotation.name} Turn;
  threadgroup uint staged[Turn::TABLE];
  threadgroup float vector[4 * {p.v_dim}];
  merge<{p.v.quantizer.name}, Turn, {p.v_dim}>(
      partial, stats, table, root, logits, {"true" if logits is not None else "false"},
      uint(sizes[0]), uint(sizes[1]), uint(sizes[2]), uint(sizes[3]), out, staged, vector,
      threadgroup_position_in_grid.x, thread_index_in_simdgroup);
""",
    )
    (out,) = made(
        inputs=[
            partial, stats, p.v.inverse, mx.array(p.v.root, mx.float32),
            mx.zeros((1,), mx.float32) if logits is None else logits,
            mx.array([heads, queries, p.body_splits, p.splits], mx.int32),
        ],
        output_shapes=[(batch, heads, queries, p.v_dim)],
        output_dtypes=[p.q.dtype],
        grid=(32 * batch * heads * queries, 1, 1),
        threadgroup=(32, 1, 1),
    )  # fmt: skip
    return out


def attend_metal(
    q: mx.array,
    sink_run: ExactRun | None,
    body: PackedRun | None,
    recent: ExactRun | None,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    window: int | None = None,
    lengths: mx.array | None = None,
) -> mx.array:
    """`reference.attend` on the GPU: [B, Hq, L, Dv] in q's dtype. Nothing as long as the past is made.

    Raises:
        RotorError: no packed run; a dtype, codec or head dimension that no kernel takes.
    """
    if body is None:
        raise RotorError("attention over exact tokens alone needs no kernel of ours: call mx.fast's")
    queries, splits = q.shape[2], splits_for(body.length)
    run, piece = decode, queries
    if q.shape[1] // body.k.tiles.shape[1] * queries > ROWS:
        run, splits = prefill.prefill, prefill.splits_for(q, body, splits)
        piece = prefill.piece_for(q, body, splits)
    parts = []
    for start in range(0, queries, piece):
        stop = min(start + piece, queries)
        p = problem(
            q[:, :, start:stop], sink_run, body, recent,
            scale=scale, mask=_mask_rows(mask, start, stop), window=window, lengths=lengths, splits=splits,
            behind=queries - stop,
        )  # fmt: skip
        partial, stats = run(p)
        parts.append(merge(p, partial, stats, sinks))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _mask_rows(mask: mx.array | str | None, start: int, stop: int) -> mx.array | str | None:
    if not isinstance(mask, mx.array) or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., start:stop, :]
