"""RotorCache: one layer's KV cache in mlx_lm's cache protocol. First tokens and recent tokens exact, the body packed.

Holds arrays, numbers and names only, so that it can be deep-copied, saved and handed to another thread. Knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import RotorError
from ..kernels import ExactRun, PackedRun, StoredRun
from . import saved
from .rows import Body, grown
from .view import Counts, KVView, views


def _mask(n: int, offset: int, return_array: bool, window_size: int | None) -> mx.array | str | None:
    """The mask mlx_lm's plain KVCache makes for n new tokens after `offset`."""
    if window_size is None and (n == 1 or not return_array):
        return None if n == 1 else "causal"
    rows = mx.arange(offset, offset + n)[:, None]
    columns = mx.arange(offset + n)[None]
    mask = rows >= columns
    return mask if window_size is None else mask & (rows < columns + window_size)


class RotorCache:
    """Keys and values of one attention layer, [B, H, offset, D] in token order: sinks, body, ring.

    Args:
        k, v: codec names.
        sinks: first tokens kept exact.
        ring: recent tokens kept exact, at least; the oldest are packed once there would be more than ring + block.
        block: the body's length is a multiple of it, so that appends to it need not start inside a tile.
    """

    def __init__(self, k: str, v: str, sinks: int = 4, ring: int = 128, block: int = 32) -> None:
        self.sinks, self.ring, self.block = sinks, ring, block
        self.body_k, self.body_v = Body(k), Body(v)
        self.sink_k: mx.array | None = None
        self.sink_v: mx.array | None = None
        # Grows to ring + block tokens, of which the first ring_length are held.
        self.ring_k: mx.array | None = None
        self.ring_v: mx.array | None = None
        self.ring_length = 0
        self.counts = Counts()

    # ------------------------------------------------------------ tokens in
    @property
    def offset(self) -> int:
        """Tokens held, and the position of the next one."""
        held = 0 if self.sink_k is None else self.sink_k.shape[2]
        return int(held + self.body_k.length + self.ring_length)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Appends keys, values [B, H, L, D] (after RoPE) and returns views of every token, [B, H, offset, D].

        The new tokens are seen exact by this call's attention, the ring too; what leaves the ring is packed at once,
        so that no exact copy of the body outlives the call.
        """
        dtype = keys.dtype
        body, recent = self.append(keys, values)
        # The buffers are read after they are written: the write then happens in place.
        return views(self._runs(body, recent), dtype, self.counts)

    def append(self, keys: mx.array, values: mx.array) -> tuple[int, ExactRun]:
        """Stores tokens. Returns what attention is to read behind the sinks: (body tokens, exact run)."""
        first = 0 if self.sink_k is None else self.sink_k.shape[2]
        into_sinks = min(self.sinks - first, keys.shape[2])
        if into_sinks > 0:
            self._fill_sinks(keys[:, :, :into_sinks], values[:, :, :into_sinks])
            keys, values = keys[:, :, into_sinks:], values[:, :, into_sinks:]
        return self._append_recent(keys, values)

    def _fill_sinks(self, keys: mx.array, values: mx.array) -> None:
        if self.sink_k is None or self.sink_v is None:
            # A copy: a slice would keep the whole prompt chunk alive.
            self.sink_k, self.sink_v = mx.contiguous(keys), mx.contiguous(values)
        else:
            self.sink_k = mx.concatenate([self.sink_k, keys], axis=2)
            self.sink_v = mx.concatenate([self.sink_v, values], axis=2)

    def _append_recent(self, keys: mx.array, values: mx.array) -> tuple[int, ExactRun]:
        """Puts tokens in the ring and packs what leaves it. Returns (body tokens, exact run) for this call to read."""
        n, room = keys.shape[2], self.ring + self.block
        if self.ring_length == room and n <= self.block:
            self._pack(self._ring_run())
        if self.ring_length + n <= room:
            self._write_ring(keys, values)
            return self.body_k.length, self._ring_run()
        body, recent = self.body_k.length, ExactRun(keys, values)
        if self.ring_length:
            held = self._ring_run()
            recent = ExactRun(mx.concatenate([held.k, keys], axis=2), mx.concatenate([held.v, values], axis=2))
        self._pack(recent)
        return body, recent

    def _pack(self, recent: ExactRun) -> None:
        """Packs the oldest of more than `ring` exact tokens, to a whole block of the body; the rest become the ring."""
        n = recent.length - self.ring
        n -= (self.body_k.length + n) % self.block
        self.body_k.append(recent.k[:, :, :n])
        self.body_v.append(recent.v[:, :, :n])
        self.ring_length = 0
        self._write_ring(recent.k[:, :, n:], recent.v[:, :, n:])

    def _write_ring(self, keys: mx.array, values: mx.array) -> None:
        n, room = keys.shape[2], self.ring + self.block
        needed = self.ring_length + n
        if self.ring_k is None or self.ring_v is None or needed > self.ring_k.shape[2]:
            capacity = min(room, -(-needed // self.block) * self.block)
            self.ring_k = grown(self.ring_k, keys, self.ring_length, capacity)
            self.ring_v = grown(self.ring_v, values, self.ring_length, capacity)
        start = self.ring_length
        self.ring_k[:, :, start : start + n] = keys
        self.ring_v[:, :, start : start + n] = values
        self.ring_length += n

    # ------------------------------------------------------------ tokens out
    def _runs(self, body: int, recent: ExactRun) -> list[StoredRun]:
        """Sinks, the first `body` packed tokens and `recent`, those that hold anything."""
        runs: list[StoredRun] = []
        if self.sink_k is not None and self.sink_v is not None:
            runs.append(ExactRun(self.sink_k, self.sink_v))
        if body:
            runs.append(PackedRun(body, self.body_k.side(), self.body_v.side()))
        return runs + ([recent] if recent.length else [])

    def _ring_run(self) -> ExactRun:
        assert self.ring_k is not None and self.ring_v is not None
        return ExactRun(self.ring_k[:, :, : self.ring_length], self.ring_v[:, :, : self.ring_length])

    def keys_and_values(self) -> tuple[Any, Any]:
        """Views of the tokens held, or (None, None)."""
        if self.empty():
            return None, None
        recent = self._ring_run()
        return views(self._runs(self.body_k.length, recent), recent.k.dtype, self.counts)

    @property
    def keys(self) -> mx.array | None:
        """An array that all later attention reads. Pipelined models set it to itself behind a dependency."""
        return self.ring_k

    @keys.setter
    def keys(self, value: mx.array) -> None:
        if self.ring_k is None or value.shape != self.ring_k.shape:
            raise RotorError("only the exact ring of a RotorCache can be set, with an array of its own shape")
        self.ring_k = value

    @property
    def values(self) -> mx.array | None:
        return self.ring_v

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        return _mask(n, self.offset, return_array, window_size)

    # ------------------------------------------------------------ length
    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forgets the last n tokens, or all there are; returns how many."""
        n = left = min(n, self.offset)
        gone = min(left, self.ring_length)
        self.ring_length -= gone
        left -= gone
        gone = min(left, self.body_k.length)
        self.body_k.trim(gone)
        self.body_v.trim(gone)
        left -= gone
        if left and self.sink_k is not None and self.sink_v is not None:
            keep = self.sink_k.shape[2] - left
            self.sink_k = self.sink_k[:, :, :keep] if keep else None
            self.sink_v = self.sink_v[:, :, :keep] if keep else None
        return n

    # ------------------------------------------------------------ bytes and files
    def _arrays(self) -> list[mx.array | None]:
        k, v = self.body_k, self.body_v
        return [self.sink_k, self.sink_v, self.ring_k, self.ring_v, k.tiles, k.scale, v.tiles, v.scale]

    @property
    def elements(self) -> int:
        """Numbers held, K and V together."""
        if self.ring_k is None or self.ring_v is None:
            return 0
        b, h, _, d_k = self.ring_k.shape
        return int(b * h * self.offset * (d_k + self.ring_v.shape[3]))

    @property
    def nbytes(self) -> int:
        """Every byte owned: sinks, ring and body with the room they have not used yet."""
        return sum(int(a.nbytes) for a in self._arrays() if a is not None)

    @property
    def state(self) -> list[Any]:
        """Arrays, then numbers and names: all of the cache, in the leaves mlx_lm can save."""
        k, v = self.body_k, self.body_v
        numbers = [saved.FORMAT, self.sinks, self.ring, self.block, k.length, self.ring_length, k.dim, v.dim]
        return [*self._arrays(), *numbers, k.codec_name, v.codec_name]

    @state.setter
    def state(self, state: list[Any]) -> None:
        """Raises RotorError for anything but a state of this format whose parts fit each other."""
        s = saved.check(state)
        self.__init__(s.codec_k, s.codec_v, s.sinks, s.ring, s.block)  # type: ignore[misc]
        self.sink_k, self.sink_v, self.ring_k, self.ring_v = s.exact
        self.body_k = Body(s.codec_k, s.dim_k, s.body_length, *s.packed_k)
        self.body_v = Body(s.codec_v, s.dim_v, s.body_length, *s.packed_v)
        self.ring_length = s.ring_length

    @property
    def meta_state(self) -> str:
        return ""

    @classmethod
    def from_state(cls, state: list[Any], meta_state: Any = None) -> RotorCache:
        cache = cls.__new__(cls)
        cache.state = state
        return cache
