"""Attention over segments: MLX's own where nothing is packed, else the launches of `decode`, `prefill` and `merge`.

Held against `reference.attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import mlx.core as mx

from ..errors import RotorError
from . import decode, prefill
from .arguments import AttentionArgs
from .mask import TokenMask
from .problem import problem
from .segments import ExactSegment, PackedSegment

# Taken when this module is imported: the host puts a wrapper in its place later, and that one calls us.
_stock = mx.fast.scaled_dot_product_attention

# A split takes this many tokens of the body; beyond FEW splits, one more for each MORE_TOKENS. So there are enough for
# a GPU's cores from 2K tokens on, and their results stay within some 5 % of the packed bytes at 16K.
SPLIT_TOKENS, FEW, MORE_TOKENS, MAX_SPLITS = 256, 8, 2048, 31
MAX_SEGMENTS = 24  # packed segments: each is a launch, and has a split


def attend_exact(q: mx.array, segments: Sequence[ExactSegment], args: AttentionArgs) -> mx.array:
    """Attention over exact segments alone, put in one piece: [B, Hq, L, Dv] in q's dtype."""
    mask, token_mask = args.mask, None
    if args.window is not None or args.lengths is not None:
        token_mask = TokenMask.over(segments, q.shape[2], args)
        mask = token_mask.whole()
    if len(segments) == 1:
        k, v = segments[0].k, segments[0].v
    else:
        k, v = (mx.concatenate([getattr(segment, side) for segment in segments], axis=2) for side in ("k", "v"))
    out = _stock(q, k, v, scale=args.scale, mask=mask, sinks=args.sink_logits)
    if token_mask is not None and token_mask.held is not None:
        # A query of a row shorter than the batch's queries sees nothing, and its softmax is no number.
        padding = mx.stack(list(token_mask.held)).sum(0)[:, None] < mx.arange(q.shape[2], 0, -1)
        out = mx.where(padding[:, None, :, None], 0.0, out)
    return out.astype(q.dtype)


def attend_metal(
    q: mx.array,
    sinks: ExactSegment | None,
    bodies: Sequence[PackedSegment],
    recent: ExactSegment | None,
    args: AttentionArgs,
) -> mx.array:
    """`reference.attend` on the GPU: [B, Hq, L, Dv] in q's dtype. No array is as long as the past.

    Each packed segment is a launch of its own, the last one's with the exact tokens; one more merges their results.

    Raises:
        RotorError: no packed segment, too many, or of several codecs; a dtype, codec or head dimension no kernel takes.
    """
    places = _places(bodies, args.lengths)
    queries, held = q.shape[2], [body.length for body in bodies]
    splits = share(splits_for(sum(held)), held)
    last, piece = bodies[-1], queries
    many = q.shape[1] // last.ready.kv_heads * queries > decode.DECODE_ROWS
    if many:
        splits = share(prefill.splits_for(q, last, sum(splits)), held)
        piece = prefill.piece_for(q, last, sum(splits))
    parts = []
    for start in range(0, queries, piece):
        stop = min(start + piece, queries)
        one_piece = piece == queries
        problems = [
            problem(
                q if one_piece else q[:, :, start:stop],
                args if one_piece else replace(args, mask=args.rows(start, stop)),
                sinks, body, recent,
                splits=count, behind=queries - stop, before=before, after=sum(held) - before - body.length,
            )
            for body, before, count in zip(bodies, places, splits, strict=True)
        ]  # fmt: skip
        if many:
            rotated = prefill.rotate_queries(problems[0])
            results = [prefill.prefill(p, rotated) for p in problems]
        else:
            results = [decode.decode(p) for p in problems]
        partial, stats = results[0]
        if len(results) > 1:
            partial, stats = (mx.concatenate(list(x), axis=3) for x in zip(*results, strict=True))
        means = [body.v.mean for body in bodies]
        parts.append(decode.merge(problems[-1], partial, stats, args.sink_logits, splits, means))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def splits_for(tokens: int) -> int:
    """Parts that a packed body of `tokens` is read in."""
    more = max(0, tokens - FEW * SPLIT_TOKENS) // MORE_TOKENS
    return max(1, min(MAX_SPLITS, -(-tokens // SPLIT_TOKENS), FEW + more))


def share(splits: int, lengths: Sequence[int]) -> list[int]:
    """`splits` over packed segments by their lengths: at least one each, MAX_SPLITS in all."""
    if len(lengths) == 1:
        return [splits]
    whole = max(1, sum(lengths))
    parts = [max(1, round(splits * n / whole)) for n in lengths]
    while sum(parts) > MAX_SPLITS:
        parts[parts.index(max(parts))] -= 1
    return parts


def _places(bodies: Sequence[PackedSegment], lengths: mx.array | None) -> list[int]:
    """The number of packed tokens before each of the packed segments.

    Raises:
        RotorError: no segments, too many, of several codecs, or several with lengths.
    """
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
