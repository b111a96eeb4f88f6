"""Views: the arrays that `update_and_fetch` hands the model in place of expanded keys and values.

A view is a real, lazy array of the dequantized tokens. Attention that recognises an untouched pair of views reads the
packed segments behind it and the lazy array is never evaluated; any other use of it is an ordinary array operation,
whose result is a plain array: correct, only slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .. import kernels
from ..kernels import AttentionArgs, ExactSegment, PackedSegment, Segment

Mask = mx.array | str | None


@dataclass
class Counts:
    """Counts of one layer's views: pairs `made`, and pairs that our attention `attended` to. The rest fell back.

    `fused` counts calls of our attention. They may be more: layers that share keys and values attend to one pair.
    """

    made: int = 0
    attended: int = 0
    fused: int = 0

    @property
    def fallback(self) -> int:
        return self.made - self.attended


class CausalMask(mx.array):
    """A mask a cache made: causal, with the cache's own window. Attention that recognises it needs no array."""

    window: int | None


def causal_mask(mask: mx.array, window: int | None) -> CausalMask:
    made = CausalMask(mask)
    made.window = window
    return made


def causal(
    past: int, n: int, window: int | None, asked: int | None, sinks: int, left: mx.array | None = None
) -> tuple[mx.array, bool]:
    """The mask of n new tokens behind `past` columns, bool [n, past + n] or, with `left`, [B, 1, n, past + n].

    Args:
        window: the cache's own, in tokens; asked: the model's, for this mask. None: no window.
        sinks: sink tokens, which a cache with a window shows whatever it is.
        left: [B, 1, 1, 1], columns in front of each row's first token; None: one row, with none in front.

    Returns:
        The mask, and whether it shows exactly the tokens of the cache's own window.
    """
    queries, columns = mx.arange(past, past + n)[:, None], mx.arange(past + n)[None]
    first: int | mx.array = sinks
    mask = queries >= columns
    if left is not None:
        mask, first = mask & (columns >= left), left + sinks
    windows = [w for w in (window, asked) if w is not None]
    if n > 1 and window is not None and max(windows) > window:
        # A wider window of the model's own: as in mlx_lm, over a chunk and the past that one of this width holds.
        near = (queries < columns + max(windows)) & (columns > past - window)
        return mask & (near | (columns < first)), False
    if windows:
        near = queries < columns + min(windows)
        mask = mask & (near if window is None else near | (columns < first))
    return mask, not windows or min(windows) == window


class Handle(Protocol):
    """The tokens behind a pair of views."""

    def attend(self, q: mx.array, scale: float, mask: Mask = None, sink_logits: mx.array | None = None) -> mx.array:
        """Attention of q [B, Hq, L, D] over all tokens, [B, Hq, L, Dv]. The arguments are those that models hand to
        `mx.fast.scaled_dot_product_attention`; `kernels.arguments.AttentionArgs` describes them."""


@dataclass
class Tokens:
    """One cache's tokens in order: sink tokens, packed segments, recent tokens, each where there are any.

    Attributes:
        window: recent tokens a query sees, itself among them; None: all.
        keep_first: the sink tokens are seen whatever the window.
    """

    segments: Sequence[Segment]
    counts: Counts
    window: int | None = None
    keep_first: bool = False
    attended: bool = False

    def attend(self, q: mx.array, scale: float, mask: Mask = None, sink_logits: mx.array | None = None) -> mx.array:
        self.counts.fused += 1
        self.counts.attended += not self.attended
        self.attended = True
        window = None
        if self.recognises(mask):
            # A single query sees all but what the window hides: no order to keep.
            mask, window = "causal" if q.shape[2] > 1 else None, self.window
        return kernels.attend(q, self.segments, AttentionArgs(scale, mask, sink_logits, window, self.keep_first))

    def recognises(self, mask: Mask) -> bool:
        """Whether the mask is one that a cache with this window made."""
        return type(mask) is CausalMask and mask.window == self.window


class KVView(mx.array):
    """A lazy [B, H, S, D] array that knows the tokens it came from. `kind` is "k" or "v"."""

    rotor: Handle
    kind: str


def views(k: mx.array, v: mx.array, handle: Handle) -> tuple[KVView, KVView]:
    """The pair of views over lazy arrays of the handle's tokens."""
    pair = KVView(k), KVView(v)
    for view, kind in zip(pair, ("k", "v"), strict=True):
        view.rotor, view.kind = handle, kind
    return pair


def expanded(segment: Segment, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Lazy K and V of a segment, [B, H, length, D], dequantized where it is packed."""
    if isinstance(segment, PackedSegment):
        return tuple(kernels.dequantize(side, 0, segment.length, dtype) for side in (segment.k, segment.v))  # type: ignore[return-value]
    assert isinstance(segment, ExactSegment)
    return segment.k.astype(dtype), segment.v.astype(dtype)


def paired(k: Any, v: Any) -> Handle | None:
    """The handle of two untouched views of the same tokens, K first; else None.

    `kind` is compared too, as some models pass one array as both keys and values.
    """
    if type(k) is KVView and type(v) is KVView and k.rotor is v.rotor and (k.kind, v.kind) == ("k", "v"):
        return k.rotor
    return None
