"""A saved cache: what its parts are, by position, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import codec
from ..errors import RotorError
from ..kernels import TILE

FORMAT = 2
ARRAYS, NUMBERS, NAMES = 8, 8, 2
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Saved:
    """The parts of `RotorCache.state` by name. exact: sinks K and V, ring K and V; packed: tiles and scale."""

    exact: Sequence[mx.array | None]
    packed_k: Sequence[mx.array | None]
    packed_v: Sequence[mx.array | None]
    sinks: int
    ring: int
    block: int
    body_length: int
    ring_length: int
    dim_k: int
    dim_v: int
    codec_k: str
    codec_v: str


def check(state: Sequence[Any]) -> Saved:
    """The parts of a state.

    Raises:
        RotorError: another format, or parts that don't fit each other, saying which.
    """
    if len(state) != ARRAYS + NUMBERS + NAMES or not _is_number(state[ARRAYS], FORMAT):
        raise RotorError(
            f"this prompt cache was not written in cache format {FORMAT} of mlx_rotor; make it again with this version"
        )
    arrays, numbers, names = state[:ARRAYS], state[ARRAYS + 1 : ARRAYS + NUMBERS], state[ARRAYS + NUMBERS :]
    _need(all(x is None or isinstance(x, mx.array) for x in arrays), "what should be an array is none")
    _need(all(_is_number(x) and x >= 0 for x in numbers), f"its lengths are {list(numbers)}")
    unknown = [name for name in names if name not in codec.names()]
    if unknown:
        raise RotorError(f"this prompt cache needs codec {unknown[0]!r}; codecs here: {', '.join(codec.names())}")
    saved = Saved(arrays[:4], arrays[4:6], arrays[6:], *numbers, *names)
    _need(saved.block > 0, "its block is 0")
    lead = _check_exact(saved)
    for side in ("k", "v"):
        _check_packed(saved, side, lead)
    return saved


def _is_number(x: Any, value: int | None = None) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and (value is None or x == value)


def _need(fits: bool, otherwise: str) -> None:
    if not fits:
        raise RotorError(f"this prompt cache is damaged: {otherwise}; make it again")


def _check_exact(s: Saved) -> tuple[int, ...]:
    """Sinks and ring against the numbers. Returns [B, H], () for a cache that never held a token."""
    sink_k, sink_v, ring_k, ring_v = s.exact
    _need((ring_k is None) == (ring_v is None) and (sink_k is None) == (sink_v is None), "it has K or V only")
    if ring_k is None or ring_v is None:
        _need(sink_k is None and s.ring_length == s.body_length == 0, "its recent tokens are missing")
        return ()
    for name, k, v in (("recent", ring_k, ring_v), ("first", sink_k, sink_v)):
        if k is None or v is None:
            continue
        _need(k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3], f"its {name} tokens are K {k.shape}, V {v.shape}")
        for x, like in ((k, ring_k), (v, ring_v)):
            same = x.shape[:2] == like.shape[:2] and x.shape[3] == like.shape[3] and x.dtype == like.dtype
            _need(same and x.dtype in FLOATS, f"its {name} tokens are {x.dtype} {x.shape}")
    room, first = ring_k.shape[2], 0 if sink_k is None else sink_k.shape[2]
    _need(s.ring_length <= room <= s.ring + s.block, f"its ring has room for {room} tokens and holds {s.ring_length}")
    _need(first <= s.sinks, f"it has {first} first tokens where {s.sinks} are to be")
    _need(first == s.sinks or s.ring_length == s.body_length == 0, "first tokens are missing")
    return tuple(ring_k.shape[:2])


def _check_packed(s: Saved, side: str, lead: tuple[int, ...]) -> None:
    """One side's body against its codec, its length and the exact tokens' [B, H]."""
    (tiles, scale), name, dim, exact = (
        (s.packed_k, s.codec_k, s.dim_k, s.exact[2]) if side == "k" else (s.packed_v, s.codec_v, s.dim_v, s.exact[3])
    )
    where = f"its packed {side.upper()}"
    _need((tiles is None) == (scale is None), f"{where} lacks words or scales")
    if tiles is None or scale is None:
        _need(s.body_length == 0, f"{where} is missing")
        return
    _need(exact is not None and exact.shape[3] == dim, f"{where} has dimension {dim}, its exact tokens another")
    room = tiles.shape[2] if tiles.ndim == 4 else 0
    _need(
        tiles.dtype == mx.uint32 and tiles.shape == (*lead, room, dim * codec.get(name, dim).index_bits),
        f"{where} is {tiles.dtype} {tiles.shape}, no tiles of {name}",
    )
    _need(
        scale.dtype == mx.float16 and scale.shape == (*lead, TILE * room),
        f"{where} has scales {scale.dtype} {scale.shape} for {room} tiles",
    )
    _need(s.body_length <= TILE * room, f"{where} has room for {TILE * room} tokens and holds {s.body_length}")
