"""Attention where nothing is packed yet: MLX's own, over the exact segments in one piece.

Attention over packed and exact tokens: the Metal launches. What they compute: `reference.attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import mlx.core as mx

from ..errors import RotorError
from . import metal, prefill
from .arguments import POSITION, Problem, arguments, problem
from .mask import TokenMask, held_by, kept_in_front
from .packed import TILE
from .segments import ExactSegment, PackedSegment
from .spec import KernelSpec

# Taken when this module is imported: the host puts a wrapper in its place later, and that one calls us.
_stock = mx.fast.scaled_dot_product_attention


def attend_exact(
    q: mx.array,
    segments: Sequence[ExactSegment],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sink_logits: mx.array | None = None,
    window: int | None = None,
    kept: bool = False,
    lengths: mx.array | None = None,
) -> mx.array:
    """As `reference.attend`, without a packed segment."""
    held = None if lengths is None else held_by([False] * len(segments), lengths)
    token_mask = TokenMask(
        q.shape[2], [segment.length for segment in segments], mask, window, held, kept_in_front(segments) if kept else 0
    )
    if window is not None or held is not None:
        mask = _whole(token_mask, q.shape[2])
    k, v = (
        (segments[0].k, segments[0].v)
        if len(segments) == 1
        else (mx.concatenate(side, axis=2) for side in _sides(segments))
    )
    out = _stock(q, k, v, scale=scale, mask=mask, sinks=sink_logits)
    if held is not None:
        # A query of a row shorter than the batch's queries sees nothing, and its softmax is no number.
        padding = mx.stack(held).sum(0)[:, None] < mx.arange(q.shape[2], 0, -1)
        out = mx.where(padding[:, None, :, None], 0.0, out)
    return out.astype(q.dtype)


def _sides(segments: Sequence[ExactSegment]) -> tuple[list[mx.array], list[mx.array]]:
    return [segment.k for segment in segments], [segment.v for segment in segments]


def _whole(token_mask: TokenMask, rows: int) -> mx.array | None:
    """The mask over all slots as one array; None where every slot is seen."""
    parts = [token_mask.part(segment, 0, size) for segment, size in enumerate(token_mask.sizes)]
    if all(part is None for part in parts):
        return None
    # Parts where all is seen, or that a mask of one column gave, become as wide as their segments.
    dtype = next(part.dtype for part in parts if part is not None)
    seen = mx.array(True) if dtype == mx.bool_ else mx.array(0, dtype)
    lead = mx.broadcast_shapes(*[part.shape[:-1] for part in parts if part is not None])
    return mx.concatenate(
        [
            mx.broadcast_to(seen if part is None else part, (*lead, size))
            for part, size in zip(parts, token_mask.sizes, strict=True)
        ],
        axis=-1,
    )


ROWS = 8  # query rows of a KV head that the decode kernel takes at a time
# A split takes this many tokens of the body; beyond FEW splits, one more for each MORE_TOKENS. So there are enough for
# a GPU's cores from 2K tokens on, and their results stay within some 5 % of the packed bytes at 16K.
SPLIT_TOKENS, FEW, MORE_TOKENS, MAX_SPLITS = 256, 8, 2048, 31
MAX_SEGMENTS = 24  # packed segments: each is a launch, and has a split
_NO_LOGITS = mx.array([0.0])
mx.eval(_NO_LOGITS)


def splits_for(tokens: int) -> int:
    """Parts that a packed body of `tokens` is read in."""
    more = max(0, tokens - FEW * SPLIT_TOKENS) // MORE_TOKENS
    return max(1, min(MAX_SPLITS, -(-tokens // SPLIT_TOKENS), FEW + more))


def simds_for(dtype: str) -> int:
    """Simdgroups of a threadgroup: as many as their staged tiles fit 32 KiB, which a float takes twice of."""
    return 2 if dtype == "float" else 4


def decode(p: Problem) -> list[mx.array]:
    """Partial results and statistics of every split, `Problem.partial_shapes`, for up to ROWS query rows."""
    made = _decode(
        p.dtype, p.body.k, p.body.v, p.body.k_dim, p.body.v_dim, p.rows, p.mask_kind, p.body.span, (*p.inputs,)
    )
    threads = 32 * simds_for(p.dtype)
    return made(
        inputs=list(p.inputs.values()),
        output_shapes=p.partial_shapes(),
        output_dtypes=[mx.float32, mx.float32],
        grid=(threads * p.splits, p.body.kv_heads, p.q.shape[0]),
        threadgroup=(threads, 1, 1),
    )


@metal.kept
def _decode(
    dtype: str,
    k: KernelSpec,
    v: KernelSpec,
    k_dim: int,
    v_dim: int,
    rows: int,
    mask: int,
    span: int,
    names: tuple[str, ...],
) -> Callable[..., list[mx.array]]:
    simds = simds_for(dtype)
    types = f"{dtype}, {k.quantizer.name}, {v.quantizer.name}, {k.rotation.name}, {k_dim}, {v_dim}"
    return metal.kernel(
        "decode",
        ("attention/decode.h", k.quantizer.header, v.quantizer.header, k.rotation.header),
        names,
        ("out", "stats"),
        f"""
  typedef Decode<{types}, {rows}, {simds}, {mask}, {span}> D;
  threadgroup uint staged[D::Turn::TABLE];
  threadgroup float4 query[(D::QUERY + 3) / 4];
  threadgroup float weight[{simds * TILE * rows}];
  threadgroup D::S stage[{simds} * MLX_ROTOR_TILE * MLX_ROTOR_STAGE];
  threadgroup float products[D::PRODUCTS];
  decode<D>(q, q_strides, table, root, factor, {arguments(names)},
      staged, (threadgroup float *)query, weight, stage, products,
      {POSITION});
""",
    )


def merge(
    p: Problem,
    partial: mx.array,
    stats: mx.array,
    logits: mx.array | None,
    splits: Sequence[int],
    means: Sequence[mx.array | None],
) -> mx.array:
    """Splits put together: [B, Hq, L, Dv] in the queries' dtype.

    Args:
        partial, stats: of all splits, `splits` of each packed segment, then what there is of exact tokens.
        logits: [Hq], attention-sink logits.
        means: of each packed segment's values.
    """
    batch, heads, queries, _ = p.q.shape
    v, v_dim = p.body.v, p.body.v_dim
    inputs = [
        partial, stats, v.inverse, metal.constant(v.back), _NO_LOGITS if logits is None else logits,
        mx.array([heads, queries, sum(splits), partial.shape[3], p.rows], mx.int32),
    ]  # fmt: skip
    mean = next((mean for mean in means if mean is not None), None)
    centred = mean is not None
    if mean is not None:
        ends = list(accumulate(splits))
        if all(other is mean for other in means):
            ends = ends[-1:]  # as of one segment: the segments of a layer have one mean
        else:
            no_mean = mx.zeros((batch, p.body.kv_heads, 1, v_dim), mx.float16)
            mean = mx.concatenate([no_mean if other is None else other for other in means], axis=2)
        inputs += [mx.contiguous(mean), mx.array(ends, mx.int32)]
    (out,) = _merge(v, v_dim, logits is not None, centred)(
        inputs=inputs,
        output_shapes=[(batch, heads, queries, v_dim)],
        output_dtypes=[p.q.dtype],
        grid=(32 * batch * heads * queries, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return out


@metal.kept
def _merge(v: KernelSpec, dim: int, logits: bool, centred: bool) -> Callable[..., list[mx.array]]:
    return metal.kernel(
        "merge",
        ("attention/merge.h", v.quantizer.header, v.rotation.header),
        ("partial", "stats", "table", "root", "logits", "sizes", *(("mean", "ends") if centred else ())),
        ("out",),
        f"""
  typedef {v.rotation.name} Turn;
  threadgroup uint staged[Turn::TABLE];
  threadgroup float vector[4 * {dim}];
  merge<{v.quantizer.name}, Turn, {dim}, {"true" if centred else "false"}>(
      partial, stats, table, root, logits, {"true" if logits else "false"},
      {"mean, ends, uint(mean_shape[2])" if centred else "nullptr, sizes, 0"}, uint(sizes[4]),
      uint(sizes[0]), uint(sizes[1]), uint(sizes[2]), uint(sizes[3]), out, staged, vector,
      threadgroup_position_in_grid.x, thread_index_in_simdgroup);
""",
    )


def share(splits: int, lengths: Sequence[int]) -> list[int]:
    """`splits` over packed segments by their lengths: at least one each, MAX_SPLITS in all."""
    if len(lengths) == 1:
        return [splits]
    whole = max(1, sum(lengths))
    parts = [max(1, round(splits * n / whole)) for n in lengths]
    while sum(parts) > MAX_SPLITS:
        parts[parts.index(max(parts))] -= 1
    return parts


def attend_metal(
    q: mx.array,
    sink_segment: ExactSegment | None,
    bodies: Sequence[PackedSegment],
    recent: ExactSegment | None,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sink_logits: mx.array | None = None,
    window: int | None = None,
    kept: bool = False,
    lengths: mx.array | None = None,
) -> mx.array:
    """`reference.attend` on the GPU: [B, Hq, L, Dv] in q's dtype. Nothing as long as the past is made.

    Each packed segment is a launch of its own, the last one's with the exact tokens; one more merges their results.

    Raises:
        RotorError: no packed segment, too many, or of several codecs; a dtype, codec or head dimension no kernel takes.
    """
    places = _places(bodies, lengths)
    queries, held = q.shape[2], [body.length for body in bodies]
    splits = share(splits_for(sum(held)), held)
    last, piece = bodies[-1], queries
    many = q.shape[1] // last.ready.kv_heads * queries > ROWS
    if many:
        splits = share(prefill.splits_for(q, last, sum(splits)), held)
        piece = prefill.piece_for(q, last, sum(splits))
    parts = []
    for start in range(0, queries, piece):
        stop = min(start + piece, queries)
        problems = [
            problem(
                q if piece == queries else q[:, :, start:stop], sink_segment, body, recent,
                scale=scale, mask=_mask_rows(mask, start, stop), window=window, kept=kept, lengths=lengths,
                splits=count, behind=queries - stop, before=before, after=sum(held) - before - body.length,
            )
            for body, before, count in zip(bodies, places, splits, strict=True)
        ]  # fmt: skip
        if many:
            rotated = prefill.rotate_queries(problems[0])
            results = [prefill.prefill(p, rotated) for p in problems]
        else:
            results = [decode(p) for p in problems]
        partial, stats = results[0]
        if len(results) > 1:
            partial, stats = (mx.concatenate(list(x), axis=3) for x in zip(*results, strict=True))
        parts.append(merge(problems[-1], partial, stats, sink_logits, splits, [body.v.mean for body in bodies]))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _places(bodies: Sequence[PackedSegment], lengths: mx.array | None) -> list[int]:
    """How many packed tokens come before each of the packed segments, which are checked to go together."""
    if not bodies:
        raise RotorError("attention over exact tokens alone needs no kernel of ours: call mx.fast's")
    if len(bodies) > MAX_SEGMENTS:
        raise RotorError(
            f"attention over {len(bodies)} packed segments; the kernels take up to {MAX_SEGMENTS}: merge some"
        )
    if lengths is not None and len(bodies) > 1:
        raise RotorError(f"lengths go with one packed segment, not with {len(bodies)}")
    if len(bodies) == 1:
        return [0]
    codecs = {tuple((side.codec.name, side.codec.dim) for side in (body.k, body.v)) for body in bodies}
    if len(codecs) > 1:
        raise RotorError(f"packed segments of one attention must have the same codecs; these have {sorted(codecs)}")
    return [0, *accumulate(body.length for body in bodies[:-1])]


def _mask_rows(mask: mx.array | str | None, start: int, stop: int) -> mx.array | str | None:
    if not isinstance(mask, mx.array) or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., start:stop, :]
