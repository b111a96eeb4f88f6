"""RotorCache: one layer's KV cache in mlx_lm's cache protocol. Sink and recent tokens are exact, the body is packed.

A key's way: `update_and_fetch` -> `append` -> the ring -> `_pack` -> `Body.append` -> `kernels.encode`; then `fetch` ->
`view.views`, a lazy array whose `Tokens.attend` calls `kernels.attend`. A cache holds arrays, numbers and codecs, which
are constants: it can be copied, saved and handed to another thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from ..errors import RotorError
from ..kernels import ExactSegment, Segment
from . import saved
from .body import SPAN, Body, grown
from .view import Counts, KVView, Mask, Tokens, causal, causal_mask, expanded, views


@dataclass
class Ring:
    """The most recent tokens, exact: buffers [B, H, …, D] that grow to `room` tokens in steps of `step`, of which the
    first `length` are held."""

    room: int
    step: int
    k: mx.array | None = None
    v: mx.array | None = None
    length: int = 0

    def write(self, keys: mx.array, values: mx.array) -> None:
        """Stores tokens behind those held; there must be room."""
        n = keys.shape[2]
        needed = self.length + n
        if self.k is None or self.v is None or needed > self.k.shape[2]:
            capacity = min(self.room, -(-needed // self.step) * self.step)
            self.k = grown(self.k, keys, self.length, capacity)
            self.v = grown(self.v, values, self.length, capacity)
        self.k[:, :, self.length : needed] = keys
        self.v[:, :, self.length : needed] = values
        self.length = needed

    def segment(self) -> ExactSegment:
        """The tokens held; something must have been written once."""
        assert self.k is not None and self.v is not None
        return ExactSegment(self.k[:, :, : self.length], self.v[:, :, : self.length])

    def copy(self) -> Ring:
        """The same tokens, whose memory is copied when either is written to."""
        return copy.deepcopy(self)


class RotorCache:
    """Keys and values of one attention layer, [B, H, held, D] in token order: sink tokens, body, ring.

        cache = RotorCache("trellis3", "trellis3")
        k, v = cache.update_and_fetch(keys, values)  # views, for mx.fast.scaled_dot_product_attention

    Args:
        k, v: codec names.
        sinks: first tokens kept exact, the sink tokens.
        ring: recent tokens kept exact, at least; the oldest are packed once there would be more than ring + block.
        block: what is packed brings the body's length to a multiple of it: appends need not start inside a tile.
        centre: subtract means before packing, see `Body`.
        window: recent tokens that a query sees besides the sink tokens, itself among them; None: all. Others are
            dropped.
        fingerprint: of the model it is for; goes into files.
    """

    # Makes a batch of single caches. The class of batches knows this one, and registers itself.
    batch: ClassVar[Callable[[list[RotorCache]], Any]]

    def __init__(
        self,
        k: str,
        v: str,
        sinks: int = 4,
        ring: int = 128,
        block: int = 32,
        *,
        centre: bool = True,
        window: int | None = None,
        fingerprint: str = "",
    ) -> None:
        self.sinks, self.ring, self.block = sinks, ring, block
        self.window, self.fingerprint = window, fingerprint
        self.body = Body(k, v, centre, [])
        self.sink_k: mx.array | None = None
        self.sink_v: mx.array | None = None
        self.recent = Ring(ring + block, block)
        self.dropped = 0
        self.counts = Counts()
        self._forget_views()

    def _forget_views(self) -> None:
        """Call before the body is written to: the views kept for the next call refer to its buffers, and MLX copies a
        buffer that something refers to."""
        self._views: tuple[tuple[int, mx.Dtype, int], list[Segment], mx.array, mx.array] | None = None

    # ------------------------------------------------------------ tokens in
    @property
    def held(self) -> int:
        """Tokens that the cache has K and V of."""
        return (0 if self.sink_k is None else int(self.sink_k.shape[2])) + self.body.length + self.recent.length

    @property
    def ring_length(self) -> int:
        """Tokens in the ring."""
        return self.recent.length

    @property
    def offset(self) -> int:
        """Tokens taken in, and the position of the next one."""
        return self.held + self.dropped

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Appends keys, values [B, H, L, D] (after RoPE) and returns views of the tokens held, [B, H, held, D].

        This call's attention sees the new tokens and the ring exactly. Tokens that leave the ring are packed at once,
        so that no exact copy of the body outlives the call.
        """
        # The buffers are read after they are written: the write then happens in place.
        return self.fetch(*self.append(keys, values), keys.dtype)

    def append(self, keys: mx.array, values: mx.array) -> tuple[int, ExactSegment]:
        """Stores tokens. Returns what attention is to read behind the sink tokens: (body tokens, exact segment)."""
        self.drop_unseen()
        first = 0 if self.sink_k is None else self.sink_k.shape[2]
        into_sinks = min(self.sinks - first, keys.shape[2])
        if into_sinks > 0:
            self._fill_sinks(keys[:, :, :into_sinks], values[:, :, :into_sinks])
            keys, values = keys[:, :, into_sinks:], values[:, :, into_sinks:]
        return self._append_recent(keys, values)

    def drop_unseen(self) -> None:
        """Drops packed tokens that no later query sees, a quarter of the window or more at a time."""
        if self.window is None:
            return
        spans = (self.body.length + self.recent.length - self.window + 1) // SPAN
        spans = min(spans, self.body.length // SPAN)
        if spans > 0 and spans * SPAN >= self.window // 4:
            self._forget_views()
            self.body.drop(spans * SPAN)
            self.dropped += spans * SPAN

    def _fill_sinks(self, keys: mx.array, values: mx.array) -> None:
        self._forget_views()
        if self.sink_k is None or self.sink_v is None:
            # A copy: a slice would keep the whole prompt chunk alive.
            self.sink_k, self.sink_v = mx.contiguous(keys), mx.contiguous(values)
        else:
            self.sink_k = mx.concatenate([self.sink_k, keys], axis=2)
            self.sink_v = mx.concatenate([self.sink_v, values], axis=2)

    def _append_recent(self, keys: mx.array, values: mx.array) -> tuple[int, ExactSegment]:
        """Puts tokens in the ring and packs those that leave it. Returns (body tokens, exact segment) to read now."""
        n, room = keys.shape[2], self.recent.room
        if self.recent.length == room and n <= self.block:
            self._pack(self.recent.segment())
        if self.recent.length + n <= room:
            self.recent.write(keys, values)
            return self.body.length, self.recent.segment()
        body, recent = self.body.length, ExactSegment(keys, values)
        if self.recent.length:
            held = self.recent.segment()
            recent = ExactSegment(mx.concatenate([held.k, keys], axis=2), mx.concatenate([held.v, values], axis=2))
        self._pack(recent)
        return body, recent

    def _pack(self, recent: ExactSegment) -> None:
        """Packs the oldest of more than `ring` exact tokens, to a whole block of the body; the rest become the ring."""
        n = recent.length - self.ring
        n -= (self.body.length + n) % self.block
        self._forget_views()
        self.body.append(recent.k[:, :, :n], recent.v[:, :, :n], recent.k, recent.v)
        self.recent.length = 0
        self.recent.write(recent.k[:, :, n:], recent.v[:, :, n:])

    # ------------------------------------------------------------ tokens out
    def fetch(self, body: int, recent: ExactSegment, dtype: mx.Dtype) -> tuple[KVView, KVView]:
        """Views of the sink tokens, the first `body` packed tokens and `recent`."""
        tokens, k, v = self.tokens(body, recent, dtype)
        return views(k, v, tokens)

    def tokens(self, body: int, recent: ExactSegment, dtype: mx.Dtype) -> tuple[Tokens, mx.array, mx.array]:
        """The tokens that `fetch` gives views of, and lazy K and V."""
        segments, k, v = self._behind(body, dtype)
        self.counts.made += 1
        if recent.length:
            segments, k, v = [*segments, recent], [*k, recent.k], [*v, recent.v]
        kept = self.window is not None and self.sink_k is not None and len(segments) > 1
        tokens = Tokens(segments, self.counts, self.window, kept)
        if len(k) == 1:
            return tokens, k[0], v[0]
        return tokens, mx.concatenate(k, axis=2), mx.concatenate(v, axis=2)

    def _behind(self, body: int, dtype: mx.Dtype) -> tuple[list[Segment], list[mx.array], list[mx.array]]:
        """Sink and packed tokens: segments, and lazy arrays. The same objects as in the last call where nothing changed
        and that call's attention has not evaluated them. Before any attention has taken views none are kept: those
        that a model evaluates hold all tokens expanded."""
        now = (body, dtype, self.counts.fallback)
        if self._views is not None and self._views[0] == now:
            _, segments, k, v = self._views
            return segments, [k], [v]
        segments = [] if self.sink_k is None or self.sink_v is None else [ExactSegment(self.sink_k, self.sink_v)]
        segments += self.body.first(body)
        if not segments:
            return [], [], []
        parts = [expanded(segment, dtype) for segment in segments]
        k, v = (
            parts[0] if len(parts) == 1 else (mx.concatenate(list(side), axis=2) for side in zip(*parts, strict=True))
        )
        if body == self.body.length and self.counts.attended:
            self._views = (now, segments, k, v)
        return segments, [k], [v]

    def keys_and_values(self) -> tuple[Any, Any]:
        """Views of the tokens held, or (None, None)."""
        if self.empty():
            return None, None
        recent = self.recent.segment()
        return self.fetch(self.body.length, recent, recent.k.dtype)

    @property
    def keys(self) -> mx.array | None:
        """An array that all later attention reads. Pipelined models set it to itself behind a dependency."""
        return self.recent.k

    @keys.setter
    def keys(self, value: mx.array) -> None:
        if self.recent.k is None or value.shape != self.recent.k.shape:
            raise RotorError("only the exact ring of a RotorCache can be set, with an array of its own shape")
        self.recent.k = value

    @property
    def values(self) -> mx.array | None:
        return self.recent.v

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask for n new tokens, over the tokens then held: what mlx_lm's caches give, None, "causal" or bool."""
        self.drop_unseen()  # as the update that follows would
        whole = self.window is None or self.held + n - self.sinks <= self.window
        if whole and window_size is None and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        mask, own = causal(self.held, n, self.window, window_size, self.sinks)
        return causal_mask(mask, self.window) if own and self.window is not None else mask

    # ------------------------------------------------------------ length and copies
    def size(self) -> int:
        return self.held

    def empty(self) -> bool:
        return self.held == 0

    def is_trimmable(self) -> bool:
        """Not once tokens have been dropped: those before them would be needed again."""
        return self.dropped == 0

    def trim(self, n: int) -> int:
        """Forgets the last n tokens, or all there are; returns how many."""
        n = left = min(n, self.held)
        self._forget_views()
        gone = min(left, self.recent.length)
        self.recent.length -= gone
        left -= gone
        gone = min(left, self.body.length)
        self.body.trim(gone)
        left -= gone
        if left and self.sink_k is not None and self.sink_v is not None:
            keep = self.sink_k.shape[2] - left
            self.sink_k = self.sink_k[:, :, :keep] if keep else None
            self.sink_v = self.sink_v[:, :, :keep] if keep else None
        return n

    def __deepcopy__(self, memo: dict[int, Any]) -> RotorCache:
        """Another cache of the same tokens, with the same body's memory (`Body.copy`), and the ring's until a write."""
        self._forget_views()
        out = copy.copy(self)
        out.body, out.counts = self.body.copy(), copy.copy(self.counts)
        out.recent = self.recent.copy()
        return out

    @staticmethod
    def merge(caches: Sequence[RotorCache]) -> Any:
        """The caches of single sequences as a batch; they stay as they are."""
        return RotorCache.batch([copy.deepcopy(c) for c in caches])

    # ------------------------------------------------------------ bytes and files
    @property
    def codecs(self) -> tuple[str, str]:
        return self.body.k, self.body.v

    @property
    def _exact(self) -> list[mx.array | None]:
        return [self.sink_k, self.sink_v, self.recent.k, self.recent.v]

    @property
    def elements(self) -> int:
        """Numbers held, K and V together."""
        if self.recent.k is None or self.recent.v is None:
            return 0
        b, h, _, d_k = self.recent.k.shape
        return int(b * h * self.held * (d_k + self.recent.v.shape[3]))

    @property
    def nbytes(self) -> int:
        """Every byte referred to: sink tokens, ring and body with the room they have not used yet."""
        return sum(int(a.nbytes) for a in [*self._exact, *self.body.arrays] if a is not None)

    @property
    def state(self) -> dict[str, Any]:
        """All of the cache as arrays, numbers and names, the leaves that mlx_lm can save."""
        return saved.state(
            saved.Saved(
                fingerprint=self.fingerprint,
                exact=self._exact,
                body=self.body,
                sinks=self.sinks,
                ring=self.ring,
                block=self.block,
                ring_length=self.recent.length,
                dropped=self.dropped,
                window=self.window,
            )
        )

    @state.setter
    def state(self, state: Any) -> None:
        """Takes a state up. Raises RotorError for another format, or parts that don't fit each other."""
        s = saved.check(state)
        self.__init__(s.body.k, s.body.v, s.sinks, s.ring, s.block, window=s.window)  # type: ignore[misc]
        self.fingerprint, self.dropped, self.recent.length = s.fingerprint, s.dropped, s.ring_length
        self.sink_k, self.sink_v, self.recent.k, self.recent.v = s.exact
        self.body = s.body

    @property
    def meta_state(self) -> str:
        return ""

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> RotorCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache
