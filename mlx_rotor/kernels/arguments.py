"""The arguments of one attention, beside its queries and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..errors import RotorError


@dataclass(frozen=True, eq=False, slots=True)
class AttentionArgs:
    """How L queries attend to S tokens; `q` is [B, Hq, L, D], and the queries are those of the last L tokens.

        kernels.attend(q, segments, AttentionArgs(scale=128**-0.5, mask="causal", window=4096))

    Attributes:
        scale: multiplies the scores.
        mask: None, "causal", or an array broadcastable to [B, Hq, L, S]: boolean (True is seen) or additive floats.
        sink_logits: [Hq], attention-sink logits of the model, which take softmax mass and have no value; None: none.
        window: a query at position p sees positions above p - window only; None: all.
        keep_first: the exact segment in front is seen whatever the window, if other tokens follow it.
        lengths: int32 [B, 3], for batches of unequal rows: how many sink tokens, body tokens and recent tokens each
            row holds, counted from the first of each segment. A row's queries are then those of its own last L tokens;
            queries before its first token see nothing. The mask's columns stay the S places of the segments.

    Raises:
        RotorError: a mask that is another string, a window without a token, or lengths of another shape.
    """

    scale: float
    mask: mx.array | str | None = None
    sink_logits: mx.array | None = None
    window: int | None = None
    keep_first: bool = False
    lengths: mx.array | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mask, str) and self.mask != "causal":
            raise RotorError(f"unknown mask {self.mask!r}: None, 'causal' or an array")
        if self.window is not None and self.window < 1:
            raise RotorError(f"a window must hold at least 1 token, not {self.window}")
        if self.lengths is not None and (self.lengths.ndim != 2 or self.lengths.shape[1] != 3):
            raise RotorError(f"lengths are [B, 3], of sink, body and recent tokens; these are {self.lengths.shape}")

    @property
    def causal(self) -> bool:
        return isinstance(self.mask, str)

    def rows(self, start: int, stop: int) -> mx.array | str | None:
        """The mask of queries start .. stop."""
        mask = self.mask
        if not isinstance(mask, mx.array) or mask.ndim < 2 or mask.shape[-2] == 1:
            return mask
        return mask[..., start:stop, :]
