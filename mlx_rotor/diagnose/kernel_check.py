"""A kernel against its reference: the same inputs, the reference on the CPU. The kernels run where MLX runs."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .. import codec, kernels
from ..errors import RotorError
from ..kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, Segment, check_results, reference
from ..kernels.packed import TILE
from ..kernels.packing import encode_reference
from ..kernels.prefill import rotate_metal
from ..kernels.segments import spread
from .kernel_plan import CENTRED, Check

# Largest |kernel - reference| over largest |reference|. Both round inputs alike; a kernel also keeps decoded tiles,
# weights and its result in the dtype.
ATTEND_TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}
VECTOR_TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
# A compiler that fuses a multiply and an add rounds once less, and a coordinate between two levels may take the other.
WORDS_TOLERANCE, DISTORTION_TOLERANCE = 1e-3, 1e-3
SCALE_STEPS = 1  # float16 steps that such a scale may be off
SPAN = 64  # tokens that share a mean of K


@dataclass(frozen=True)
class Size:
    """Tokens in a check: vectors to encode, packed ones to read, exact ones at either end, rows of a prompt's chunk."""

    encoded: int = 500
    packed: int = 1100
    sinks: int = 4
    recent: int = 37
    prefill: int = 100
    heads: int = 2


Found = tuple[bool, float | None, float | None, str]


class AnyCheck(Protocol):
    """What is known of a check, of whatever kernel."""

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def operation(self) -> str: ...

    @property
    def dtype_name(self) -> str: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    def facts(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Outcome:
    """`error` is on the scale of `tolerance`, None where the kernel gave nothing; `note` says more, or why."""

    check: AnyCheck
    passed: bool
    error: float | None
    tolerance: float | None
    note: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        c = self.check
        return {
            **{"check": c.name, "operation": c.operation, **c.facts(), "dtype": c.dtype_name},
            **{"passed": self.passed, "error": self.error, "tolerance": self.tolerance, "note": self.note},
            "seconds": round(self.seconds, 3),
        }

    def failure(self) -> check_results.Failure:
        c = self.check
        return check_results.Failure(c.name, c.operation, c.reads, c.dtype_name)


def run(check: Check, size: Size | None = None) -> Outcome:
    """One check. Whatever the kernel raises, from its compiler or on the way, is a failure with that note.

    Raises:
        RotorError: if the kernels' backend is not Metal: a reference would be compared with itself.
    """
    return outcome(check, lambda: CHECKS[check.kind.partition(",")[0]](check, size or Size()))


def outcome(check: AnyCheck, made: Callable[[], Found]) -> Outcome:
    """What `made` finds of `check`. Raises as `run`."""
    if kernels.backend() != "metal":
        raise RotorError(f"kernels are checked on the metal backend, and this is {kernels.backend()}")
    started = time.perf_counter()
    try:
        with check_results.ignored():
            passed, error, tolerance, note = made()
    except Exception as e:
        lines = [line for line in str(e).splitlines() if line.strip()]
        passed, error, tolerance, note = False, None, None, f"{type(e).__name__}: {' '.join(lines)[:500]}"
    return Outcome(check, passed, error, tolerance, note, time.perf_counter() - started)


def record(outcomes: Sequence[Outcome]) -> None:
    """Stores the results that `check_results.refuse` reads."""
    check_results.record([o.check.name for o in outcomes], [o.failure() for o in outcomes if not o.passed])


def _encode(check: Check, size: Size) -> Found:
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


def _attend(check: Check, size: Size) -> Found:
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
    return compared(got, want, check.dtype, ATTEND_TOLERANCE)


def _dequantize(check: Check, size: Size) -> Found:
    """From inside a tile to inside another."""
    side = _side(check.k, check.dim, size.heads, size.packed, SPAN if check.kind in CENTRED else None)
    got = kernels.dequantize(side, 5, size.packed - 3, check.dtype)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.dequantize(side, 5, size.packed - 3, mx.float32)
    return compared(got, want, check.dtype, VECTOR_TOLERANCE)


def _rotate(check: Check, size: Size) -> Found:
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


CHECKS: dict[str, Callable[[Check, Size], Found]] = {
    "encode": _encode,
    "decode": _attend,
    "prefill": _attend,
    "rotate": _rotate,
    "dequantize": _dequantize,
}


def compared(got: mx.array, want: mx.array, dtype: mx.Dtype, tolerances: dict[mx.Dtype, float]) -> Found:
    if got.shape != want.shape or got.dtype != dtype:
        return False, None, None, f"{got.dtype} {got.shape} instead of {dtype} {want.shape}"
    with mx.stream(mx.cpu):
        a, b = np.array(got.astype(mx.float32), np.float64), np.array(want, np.float64)
    error, tolerance = float(np.abs(a - b).max() / np.abs(b).max()), tolerances[dtype]
    # No number compares as within the tolerance.
    passed = error <= tolerance
    return passed, error if np.isfinite(error) else None, tolerance, "" if np.isfinite(a).all() else "NaN or infinity"


def normal(seed: str, *shape: int) -> mx.array:
    """float32, the same for a seed on every machine."""
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    return mx.array(rng.standard_normal(shape).astype(np.float32))


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
