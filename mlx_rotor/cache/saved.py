"""The state of a cache in a prompt-cache file: written from its parts, and read back with every part checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import codec
from ..errors import RotorError
from ..kernels import TILE
from .body import SPAN, Body, BodySegment, Side

FORMAT = 3
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
NUMBERS = ("sinks", "ring", "block", "ring_length", "dropped")


@dataclass(frozen=True)
class Saved:
    """The parts of a cache that a file holds, as in `RotorCache`. exact: sink tokens K and V, ring K and V."""

    fingerprint: str
    exact: Sequence[mx.array | None]
    body: Body
    sinks: int
    ring: int
    block: int
    ring_length: int
    dropped: int
    window: int | None


def state(parts: Saved) -> dict[str, Any]:
    """All of a cache in dicts, lists, arrays, numbers and names."""
    return {
        "format": FORMAT,
        "codecs": [parts.body.k, parts.body.v],
        "fingerprint": parts.fingerprint,
        "centre": parts.body.centre,
        "window": parts.window,
        **{name: getattr(parts, name) for name in NUMBERS},
        "exact": parts.exact,
        "segments": parts.body.state,
    }


def check(given: Any) -> Saved:
    """The parts of a state.

    Raises:
        RotorError: another format, or parts that don't fit each other, saying which.
    """
    if not isinstance(given, dict) or not _is_number(given.get("format"), FORMAT):
        raise RotorError(
            f"this prompt cache was not written in cache format {FORMAT} of mlx_rotor; make it again with this version"
        )
    # A list without members is not in a file.
    missing = {"codecs", "fingerprint", "centre", "window", "exact", *NUMBERS} - given.keys()
    _need(not missing, f"it lacks {', '.join(sorted(missing))}")
    names, numbers = given["codecs"], {name: given[name] for name in NUMBERS}
    _need(_is_list(names, 2) and isinstance(given["fingerprint"], str), "its names are none")
    for name in names:
        if str(name).partition(":")[0] not in codec.names():
            raise RotorError(f"this prompt cache needs codec {name!r}; codecs here: {', '.join(codec.names())}")
    _need(all(_is_number(x) and x >= 0 for x in numbers.values()), f"its lengths are {numbers}")
    _need(numbers["block"] > 0, "its block is 0")
    window, centre = given["window"], given["centre"]
    _need(window is None or (_is_number(window) and window > 0), f"its window is {window}")
    _need(isinstance(centre, bool), "it does not say whether means were subtracted")
    exact = _check_exact(given["exact"], numbers)
    body = Body(names[0], names[1], centre, [])
    segments = given.get("segments", [])
    _need(_is_list(segments), "its segments are none")
    for i, parts in enumerate(segments):
        segment = _segment(body, parts, exact)
        _need(i == len(segments) - 1 or (segment.length % SPAN == 0 and not segment.open), "its segments don't fit")
        body.segments.append(segment)
        mean, first = segment.v.mean, body.segments[0].v.mean
        if mean is not None and first is not None:
            _need(bool(mx.array_equal(mean, first, equal_nan=True)), "its packed V has several means")
            segment.v.mean = first
        body.length += segment.length
    if exact[2] is None:
        _need(not body.length, "its recent tokens are missing")
    elif body.length or numbers["ring_length"]:
        _need(numbers["sinks"] == 0 or _length(exact[0]) == numbers["sinks"], "first tokens are missing")
    return Saved(given["fingerprint"], exact, body, **numbers, window=window)


def _is_number(x: Any, value: int | None = None) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and (value is None or x == value)


def _is_list(x: Any, n: int | None = None) -> bool:
    return isinstance(x, list | tuple) and n in (None, len(x))


def _need(fits: bool, otherwise: str) -> None:
    if not fits:
        raise RotorError(f"this prompt cache is damaged: {otherwise}; make it again")


def _length(x: mx.array | None) -> int:
    return 0 if x is None else int(x.shape[2])


def _check_exact(arrays: Any, numbers: dict[str, int]) -> Sequence[mx.array | None]:
    """Sink tokens and ring against the numbers."""
    fits = _is_list(arrays, 4) and all(x is None or isinstance(x, mx.array) for x in arrays)
    _need(fits, "its exact tokens are none")
    sink_k, sink_v, ring_k, ring_v = arrays
    _need((ring_k is None) == (ring_v is None) and (sink_k is None) == (sink_v is None), "it has K or V only")
    if ring_k is None or ring_v is None:
        _need(sink_k is None and numbers["ring_length"] == 0, "its recent tokens are missing")
        return list(arrays)
    for name, k, v in (("recent", ring_k, ring_v), ("first", sink_k, sink_v)):
        if k is None or v is None:
            continue
        _need(k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3], f"its {name} tokens are K {k.shape}, V {v.shape}")
        for x, like in ((k, ring_k), (v, ring_v)):
            same = x.shape[:2] == like.shape[:2] and x.shape[3] == like.shape[3] and x.dtype == like.dtype
            _need(same and x.dtype in FLOATS, f"its {name} tokens are {x.dtype} {x.shape}")
    room, held = ring_k.shape[2], numbers["ring_length"]
    _need(held <= room <= numbers["ring"] + numbers["block"], f"its ring has room for {room} tokens and holds {held}")
    _need(_length(sink_k) <= numbers["sinks"], f"it has {_length(sink_k)} first tokens, not {numbers['sinks']}")
    return list(arrays)


def _segment(body: Body, parts: Any, exact: Sequence[mx.array | None]) -> BodySegment:
    _need(_is_list(parts, 8), "a segment of packed tokens is none")
    length, is_open, *arrays = parts
    _need(_is_number(length) and length > 0 and isinstance(is_open, bool), f"a segment has {length} tokens")
    _need(all(x is None or isinstance(x, mx.array) for x in arrays), "packed tokens are none")
    k = _side("K", body.k, body.centre, SPAN, arrays[:3], length, exact[2])
    v = _side("V", body.v, body.centre, 0, arrays[3:], length, exact[3])
    return BodySegment(k, v, length, is_open)


def _side(side: str, name: str, centre: bool, span: int, arrays: Any, length: int, exact: mx.array | None) -> Side:
    """One side's arrays against its codec, its length and the exact tokens."""
    tiles, scale, mean = arrays
    where = f"its packed {side}"
    _need(tiles is not None and exact is not None, f"{where} is missing")
    (*lead, _, dim), made = exact.shape, None  # type: ignore[union-attr]
    try:
        made = codec.get(name, dim)
    except RotorError as e:
        raise RotorError(f"this prompt cache is damaged: {where}: {e}") from e
    room = tiles.shape[2] if tiles.ndim == 4 else 0
    _need(
        tiles.dtype == mx.uint32 and tiles.shape == (*lead, room, made.tile_words),
        f"{where} is {tiles.dtype} {tiles.shape}, no tiles of {name}",
    )
    _need((scale is not None) == made.scaled, f"{where} lacks its scales, or has some")
    if scale is not None:
        _need(
            scale.dtype == mx.float16 and scale.shape == (*lead, TILE * room),
            f"{where} has scales {scale.dtype} {scale.shape} for {room} tiles",
        )
    _need(length <= TILE * room, f"{where} has room for {TILE * room} tokens and holds {length}")
    _need((mean is not None) == (centre and made.scaled), f"{where} lacks its means, or has some")
    if mean is not None:
        groups = mean.shape[2] if mean.ndim == 4 else 0
        enough = groups >= -(-length // span) if span else groups == 1
        fits = enough and mean.shape == (*lead, groups, dim)
        _need(mean.dtype == mx.float16 and fits, f"{where} has means {mean.dtype} {mean.shape}")
    return Side(made, tiles, scale, mean, span if centre else 0, subtract=centre and made.scaled)
