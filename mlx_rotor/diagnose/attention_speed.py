"""Time of a decode attention, packed against `mx.fast.scaled_dot_product_attention` in fp16, by length of the past."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from .. import codec, kernels
from ..cache import parse
from ..errors import RotorError
from ..kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, Segment, check_results
from ..kernels.packed import TILE
from .timing import SHARE, memory, repeated

KV_HEADS, DIM = 8, 128
LENGTHS = tuple(1024 << i for i in range(8))
QUERY_HEADS = (32, 48)
SCHEMES = ("turbo4v2", "trellis3")
# Attentions in a row in one measurement, each taking the last one's output as its queries: as a model's layers do.
CHAIN = 8
# Keys and values in turn, as each layer has its own, until that much is read: small ones would stay in a GPU's cache.
COLD_BYTES = 256 << 20
WARM_UP = 2


@dataclass(frozen=True)
class AttentionTiming:
    """Milliseconds an attention, None where it was not measured; `skipped` says why."""

    scheme: str
    query_heads: int
    tokens: int
    fp16_ms: float | None = None
    ours_ms: float | None = None
    skipped: str = ""

    @property
    def ratio(self) -> float | None:
        """The speed over fp16's."""
        return self.fp16_ms / self.ours_ms if self.fp16_ms and self.ours_ms else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def cells(
    schemes: Sequence[str] = SCHEMES, query_heads: Sequence[int] = QUERY_HEADS, lengths: Sequence[int] = LENGTHS
) -> list[tuple[str, int, int]]:
    """(scheme, query heads, tokens) of every line."""
    return [(scheme, heads, tokens) for scheme in schemes for heads in query_heads for tokens in lengths]


def measure_attention(scheme: str, query_heads: int, tokens: int, room: int | None = None) -> AttentionTiming:
    """One line; `room` in bytes, None: `memory()`. A kernel that does not run is a line that says so.

    Graphs are built before the clock starts: generating, that happens while the GPU works on the token before.
    """
    room = memory() if room is None else room
    fp16 = 2 * 2 * KV_HEADS * tokens * DIM  # the packed side is smaller
    copies = min(CHAIN, int(SHARE * room) // (2 * fp16), 1 + COLD_BYTES // fp16)
    if not copies:
        return AttentionTiming(
            scheme, query_heads, tokens, skipped=f"needs {2 * fp16 / SHARE / 1e9:.1f} GB, {room / 1e9:.1f} GB free"
        )
    try:
        with check_results.ignored():
            return AttentionTiming(
                scheme,
                query_heads,
                tokens,
                _exact_ms(query_heads, tokens, copies),
                _packed_ms(scheme, query_heads, tokens, copies),
            )
    except Exception as e:
        return AttentionTiming(scheme, query_heads, tokens, skipped=f"{type(e).__name__}: {str(e)[:300]}")
    finally:
        mx.clear_cache()


def _exact_ms(query_heads: int, tokens: int, copies: int) -> float:
    def layer(past: ExactSegment) -> Attention:
        return lambda q: mx.fast.scaled_dot_product_attention(q, past.k, past.v, scale=DIM**-0.5)

    segments = [_exact(tokens) for _ in range(copies)]
    mx.eval([[past.k, past.v] for past in segments])
    return _milliseconds(query_heads, [layer(past) for past in segments])


def _packed_ms(scheme: str, query_heads: int, tokens: int, copies: int) -> float:
    """With the exact first and recent tokens of the scheme's defaults, as in a cache."""
    made = parse(scheme)
    if made is None:
        raise RotorError(f"{scheme} packs nothing")
    packed = tokens - made.sinks - made.ring

    def layer() -> Attention:
        first, recent = _exact(made.sinks), _exact(made.ring)
        k, v = _packed(made.k, packed), _packed(made.v, packed)
        mx.eval(first.k, first.v, k.tiles, k.scale, v.tiles, v.scale, recent.k, recent.v)
        segments: list[Segment] = [first, PackedSegment(packed, k, v), recent]
        return lambda q: kernels.attend(q, segments, AttentionArgs(scale=DIM**-0.5))

    return _milliseconds(query_heads, [layer() for _ in range(copies)])


def _exact(tokens: int) -> ExactSegment:
    return ExactSegment(*(mx.random.normal((1, KV_HEADS, tokens, DIM), mx.float16) for _ in "kv"))


def _packed(name: str, tokens: int) -> PackedSide:
    """Any bits are codes."""
    made = codec.get(name, DIM)
    tiles = -(-tokens // TILE)
    words = mx.random.randint(0, 1 << 31, (1, KV_HEADS, tiles, DIM * made.index_bits)).astype(mx.uint32)
    return PackedSide(made, words, mx.ones((1, KV_HEADS, tiles * TILE), mx.float16))


Attention = Callable[[mx.array], mx.array]


def _milliseconds(query_heads: int, layers: Sequence[Attention]) -> float:
    """The median time of one of `CHAIN` attentions in a row over `layers` in turn."""
    q = mx.random.normal((1, query_heads, 1, DIM)).astype(mx.float16)
    mx.eval(q)

    def once() -> float:
        out = q
        for i in range(CHAIN):
            out = layers[i % len(layers)](out)
        started = time.perf_counter()
        mx.eval(out)
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        once()
    return 1e3 * statistics.median(repeated(once)) / CHAIN
