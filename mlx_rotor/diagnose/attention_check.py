"""The kernels of a compressed KV cache against their references: the list of checks, and one of them run.

A check gives kernel and reference the same inputs. The reference runs on the CPU, the kernel where MLX runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from .. import codec, kernels
from ..errors import RotorError
from ..kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, Segment, reference
from ..kernels.packed import TILE
from ..kernels.packing import encode_reference
from ..kernels.prefill import rotate_metal
from ..kernels.segments import spread
from .checking import DTYPES, KERNEL_TOLERANCE, Found, Outcome, compared, normal, outcome

# What is checked, and the operation of `mlx_rotor.kernels` that runs it. In segments: two packed ones, with means where
# the codec takes some, a window, and sink tokens that are attended to beyond it.
KINDS = {
    "encode": "encode",
    "encode, centred": "encode",
    "decode, 1 row": "attend",
    "decode, 8 rows": "attend",
    "decode, segments": "attend",
    "prefill": "attend",
    "prefill, segments": "attend",
    "rotate": "attend",
    "dequantize": "dequantize",
    "dequantize, centred": "dequantize",
}
OF_PAIRS = ("decode, 1 row", "decode, 8 rows", "decode, segments", "prefill", "prefill, segments")
CENTRED = ("encode, centred", "dequantize, centred")
DIMS = (64, 80, 96, 128, 192, 256)
# K and V of different codecs: the schemes people use, and two quantizers and two rotations in one kernel.
MIXED = (("turbo4", "turbo2"), ("trellis4", "iso3"))
USUAL_DIM = 128
VECTOR_TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
# A compiler that fuses a multiply and an add rounds once less, and a coordinate between two levels may take the other.
WORDS_TOLERANCE, DISTORTION_TOLERANCE = 1e-3, 1e-3
SCALE_STEPS = 1  # float16 steps that such a scale may be off
SPAN = 64  # tokens that share a mean of K


@dataclass(frozen=True)
class AttentionCheck:
    """One kernel. `v` is `k` but where attention reads two codecs; `dtype` is that of vectors and queries."""

    kind: str
    k: str
    v: str
    dim: int
    dtype: mx.Dtype

    @property
    def operation(self) -> str:
        return KINDS[self.kind]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).rpartition(".")[2]

    @property
    def name(self) -> str:
        codecs = self.k if self.k == self.v else f"{self.k}/{self.v}"
        return f"{self.kind}: {codecs}, {self.dim} x {self.dtype_name}"

    @property
    def reads(self) -> tuple[str, ...]:
        """What the kernel reads, as check results name it."""
        return tuple(dict.fromkeys(f"{name}@{self.dim}" for name in (self.k, self.v)))

    def facts(self) -> dict[str, Any]:
        return {"k": self.k, "v": self.v, "dim": self.dim}


def every() -> list[AttentionCheck]:
    """All checks of all codecs that have a kernel. Those of one pair of codecs and one dimension are neighbours."""
    names = codec.names()
    pairs = [(name, name) for name in names] + [pair for pair in MIXED if set(pair) <= set(names)]
    return [
        AttentionCheck(kind, k, v, dim, dtype)
        for dim in DIMS
        for k, v in pairs
        if _has_kernel(k, dim) and _has_kernel(v, dim)
        for dtype in DTYPES
        for kind in KINDS
        if (k == v or kind in OF_PAIRS) and (kind not in CENTRED or codec.get(k, dim).scaled)
    ]


def quick() -> list[AttentionCheck]:
    """A part of `every`: all codecs at the usual dimension in float16, one codec a family at the others, other dtypes
    with the default codecs and the trellis."""
    families = set(_one_a_family(codec.names()))
    usual = {("turbo4", "turbo2"), ("turbo4", "turbo4"), ("trellis3", "trellis3")}
    return [
        check
        for check in every()
        if (check.dim == USUAL_DIM and (check.dtype == mx.float16 or (check.k, check.v) in usual))
        or (check.dtype == mx.float16 and check.k == check.v and check.k in families)
    ]


def _has_kernel(name: str, dim: int) -> bool:
    try:
        return codec.get(name, dim).kernel is not None
    except RotorError:
        return False


def _one_a_family(names: list[str]) -> Iterator[str]:
    """The 3-bit codec of each family, whose fields are the least regular; else its first."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rstrip("0123456789"), []).append(name)
    for family, members in families.items():
        yield f"{family}3" if f"{family}3" in members else members[0]


@dataclass(frozen=True)
class Size:
    """Tokens in a check: vectors to encode, packed ones to read, exact ones at either end, rows of a prompt's chunk."""

    encoded: int = 500
    packed: int = 1100
    sinks: int = 4
    recent: int = 37
    prefill: int = 100
    heads: int = 2


def run(check: AttentionCheck, size: Size | None = None) -> Outcome:
    """One check. Whatever the kernel raises, from its compiler or on the way, is a failure with that note.

    Raises:
        RotorError: if the kernels' backend is not Metal: a reference would be compared with itself.
    """
    return outcome(check, lambda: CHECKS[check.kind.partition(",")[0]](check, size or Size()))


def _encode(check: AttentionCheck, size: Size) -> Found:
    """Words and scales, bit for bit; where a few differ, the distortion decides. With means, from inside a group on."""
    made = codec.get(check.k, check.dim)
    first, span = (TILE, SPAN) if check.kind in CENTRED else (0, 0)
    # Heads inside tokens, as projections give them.
    x = normal(check.name, 1, size.encoded, size.heads, check.dim).astype(check.dtype).swapaxes(1, 2)
    mean = _means(check.name, check.dim, size.heads, first + size.encoded, span) if span else None
    got = kernels.encode(made, x, mean, first=first, span=span)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = encode_reference(made, x, mean, first=first, span=span)
        sides = [PackedSide(made, *arrays).packed(0, size.encoded) for arrays in (got, want)]
        words = [np.array(side.words) for side in sides]
        none = np.zeros(0, np.float16)
        scales = [
            (none if side.scale is None else np.array(side.scale)).view(np.uint16).astype(np.int64) for side in sides
        ]
        exact = made.rotate(x.astype(mx.float32))
        if mean is not None:
            exact = exact - spread(mean, first, first + size.encoded, span)
        losses = [float(((np.array(made.decode_rotated(side) - exact, np.float64)) ** 2).sum()) for side in sides]
    if words[0].shape != words[1].shape or scales[0].shape != scales[1].shape:
        return False, None, None, f"words {words[0].shape} and scales {scales[0].shape}"
    of = words[0].size + scales[0].size
    steps = np.abs(scales[0] - scales[1])
    differ = int((words[0] != words[1]).sum() + (steps > SCALE_STEPS).sum())
    if not differ and not steps.any():
        return True, 0.0, WORDS_TOLERANCE, ""
    note = f"not bit-identical: {differ} of {of} words"
    if steps.any():
        note += f", {int((steps > 0).sum())} of {steps.size} scales rounded otherwise"
    distortion = abs(losses[0] / losses[1] - 1)
    if not distortion <= DISTORTION_TOLERANCE:
        note += f"; distortion {100 * (losses[0] / losses[1] - 1):+.3g} %"
    passed = differ / of < WORDS_TOLERANCE and distortion <= DISTORTION_TOLERANCE
    return passed, differ / of, WORDS_TOLERANCE, note


def _attend(check: AttentionCheck, size: Size) -> Found:
    """Sink tokens, packed and recent ones; more than one row sees causally."""
    kind, several = check.kind.removesuffix(", segments"), check.kind.endswith(", segments")
    rows, group = {"decode, 1 row": (1, 1), "decode, 8 rows": (2, 4), "decode": (2, 2)}.get(kind, (size.prefill, 2))

    def make(what: str, n: int, heads: int) -> mx.array:
        """[1, heads, n, dim], heads inside tokens and room behind them, as in a cache's buffers."""
        x = normal(f"{check.name} {what}", 1, n + 3, heads, check.dim).astype(check.dtype)
        return x.swapaxes(1, 2)[:, :, :n]

    sinks, recent = (
        ExactSegment(make(f"k{n}", n, size.heads), make(f"v{n}", n, size.heads)) for n in (size.sinks, size.recent)
    )
    lengths = (size.packed // 3, size.packed - size.packed // 3) if several else (size.packed,)
    spans = (SPAN, 0) if several else (None, None)
    bodies = [
        PackedSegment(
            n,
            *(
                _side(name, check.dim, size.heads, n, span)
                for name, span in zip((check.k, check.v), spans, strict=True)
            ),
        )
        for n in lengths
    ]
    # Queries a few times wider than keys are long: a softmax with a few large weights, as models have.
    q = make("q", rows, size.heads * group) * 2
    segments: list[Segment] = [sinks, *bodies, recent]
    how: dict[str, Any] = {"scale": check.dim**-0.5, "mask": "causal" if rows > 1 else None}
    if several:
        how |= {"window": size.recent + 3 * size.packed // 4, "keep_first": True}
    got = kernels.attend(q, segments, AttentionArgs(**how))
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.attend(q.astype(mx.float32), segments, AttentionArgs(**how))
    return compared(got, want, check.dtype, KERNEL_TOLERANCE)


def _dequantize(check: AttentionCheck, size: Size) -> Found:
    """From inside a tile to inside another."""
    side = _side(check.k, check.dim, size.heads, size.packed, SPAN if check.kind in CENTRED else None)
    got = kernels.dequantize(side, 5, size.packed - 3, check.dtype)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.dequantize(side, 5, size.packed - 3, mx.float32)
    return compared(got, want, check.dtype, VECTOR_TOLERANCE)


def _rotate(check: AttentionCheck, size: Size) -> Found:
    """There, and back from there: the worse of both."""
    made = codec.get(check.k, check.dim)
    assert made.kernel is not None
    x = normal(check.name, 1, size.encoded, size.heads, check.dim).astype(check.dtype).swapaxes(1, 2)
    both = []
    for inverse, turn in ((False, made.rotate), (True, made.unrotate)):
        got = rotate_metal(made.kernel, x, inverse=inverse, dtype=check.dtype)
        mx.eval(got)
        with mx.stream(mx.cpu):
            want = turn(x.astype(mx.float32))
        both.append(compared(got, want, check.dtype, VECTOR_TOLERANCE))
    return max(both, key=lambda found: (not found[0], found[1] or 0))


CHECKS: dict[str, Callable[[AttentionCheck, Size], Found]] = {
    "encode": _encode,
    "decode": _attend,
    "prefill": _attend,
    "rotate": _rotate,
    "dequantize": _dequantize,
}


def _means(seed: str, dim: int, heads: int, tokens: int, span: int) -> mx.array:
    """float16 [1, heads, groups, dim]; a span of 0 is one group."""
    return normal(f"{seed} means", 1, heads, -(-tokens // span) if span else 1, dim).astype(mx.float16)


@lru_cache(maxsize=8)
def _side(name: str, dim: int, heads: int, tokens: int, span: int | None = None) -> PackedSide:
    """Tokens packed by the reference, with means where there is a span and the codec takes some; then room for more
    that holds what no token ever had: nobody may read it."""
    made, mean = codec.get(name, dim), None
    with mx.stream(mx.cpu):
        x = normal(f"{name} {dim}", 1, heads, tokens, dim)
        if span is not None and made.scaled:
            mean = _means(name, dim, heads, tokens, span)
            x = x + made.unrotate(spread(mean, 0, tokens, span))
        tiles, scale = encode_reference(made, x, mean, span=span or 0)
        tiles = mx.concatenate([tiles, mx.full((1, heads, 1, tiles.shape[3]), 0xFFFFFFFF, mx.uint32)], axis=2)
        if scale is not None:
            behind = mx.full((1, heads, tiles.shape[2] * TILE - tokens), mx.nan, mx.float16)
            scale = mx.concatenate([scale[:, :, :tokens], behind], axis=2)
            mx.eval(scale)
        mx.eval(tiles, mean if mean is not None else [])
    return PackedSide(made, tiles, scale, mean, 0 if mean is None else span or 0)
