"""Weights to MLX's affine format: codes, and a bf16 scale and bias a group of them, w ~ scale * code + bias.

The format is MLX's; which of its points a weight goes to is ours to choose. `mx.quantize` spans the range of the
group on a grid with a zero on it; `search` minimises the squared error, after scale and bias are rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

import mlx.core as mx

from ..errors import RotorError
from .policy import Spec

FITS = ("fast", "search")

# How far towards the mean the lower and the upper end of the grid are tried, as fractions of the group's range: the
# fewer codes, the more it pays to clip. Both ends move on their own, as a group of 64 is seldom symmetric.
ENDS: dict[int, tuple[float, ...]] = {
    2: (0.4, 0.55, 0.75, 1.0),
    3: (0.7, 0.8, 0.9, 1.0),
    4: (0.8, 0.87, 0.93, 1.0),
    5: (0.85, 0.9, 0.95, 1.0),
    6: (0.9, 1.0),
    8: (1.0,),
}
ALTERNATIONS = 3
CHUNK = 1 << 20  # weights worked on at a time; about sixteen float32 arrays of this size exist at once
TINY = 1e-30  # the scale of a group without spread: keeps divisions finite


@dataclass(frozen=True)
class Fitted:
    """`weight` uint32 [.., K*bits/32], `scales` and `biases` bf16 [.., K/group_size], as mx.dequantize reads them."""

    weight: mx.array
    scales: mx.array
    biases: mx.array


def fit(w: mx.array, spec: Spec, method: str = "search") -> Fitted:
    """Quantizes weights [.., K] to `spec`; method `search` (least squares) or `fast` (mx.quantize, unchanged).

    `w` is worked on in float32, CHUNK weights at a time. Evaluates what it returns.

    Raises:
        RotorError: K is not a multiple of the group size; unknown method.
    """
    if method not in FITS:
        raise RotorError(f"unknown fit {method!r}; fits: {', '.join(FITS)}")
    if w.shape[-1] % spec.group_size:
        raise RotorError(f"group_size {spec.group_size} does not divide {w.shape[-1]}, the last dimension of {w.shape}")
    lead, k = w.shape[:-1], w.shape[-1]
    rows = w.reshape(-1, k)
    parts: list[Sequence[mx.array]] = []
    for chunk in _chunks(rows):
        if method == "fast":
            parts.append(mx.quantize(chunk.astype(mx.bfloat16), spec.group_size, spec.bits))
        else:
            parts.append(_search(chunk.astype(mx.float32), spec))
        mx.eval(parts[-1])
    columns = (k * spec.bits // 32, k // spec.group_size, k // spec.group_size)
    joined = [mx.concatenate(list(p)).reshape(*lead, n) for p, n in zip(zip(*parts, strict=True), columns, strict=True)]
    mx.eval(joined)
    return Fitted(*joined)


def squared_error(w: mx.array, fitted: Fitted, spec: Spec) -> tuple[float, float]:
    """(sum of (w - decoded)^2, sum of w^2) in float32, decoded by mx.dequantize from what was stored."""
    error = norm = 0.0
    k, rows = w.shape[-1], w.reshape(-1, w.shape[-1])
    weight, scales, biases = (a.reshape(rows.shape[0], -1) for a in (fitted.weight, fitted.scales, fitted.biases))
    start = 0
    for chunk in _chunks(rows):
        stop = start + chunk.shape[0]
        decoded = mx.dequantize(
            weight[start:stop],
            scales[start:stop].astype(mx.float32),
            biases[start:stop].astype(mx.float32),
            group_size=spec.group_size,
            bits=spec.bits,
        ).reshape(-1, k)
        chunk = chunk.astype(mx.float32)
        error += sum_of_squares(chunk - decoded)
        norm += sum_of_squares(chunk)
        start = stop
    return error, norm


def sum_of_squares(x: mx.array) -> float:
    """Sum of x**2 in float32, as a Python number."""
    return cast(float, mx.square(x.astype(mx.float32)).sum().item())


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [.., K] (any integer dtype, < 2**bits, K a multiple of 32) to uint32 [.., K*bits/32], as MLX packs them.

    A little-endian bit stream along K: code i takes bits [i*bits, (i+1)*bits), so 3, 5 and 6 bits cross words.
    """
    lead, k = codes.shape[:-1], codes.shape[-1]
    blocks = codes.astype(mx.uint32).reshape(-1, 32)  # 32 codes fill exactly `bits` words
    words = []
    for word in range(bits):
        low = word * 32
        first, last = low // bits, (low + 31) // bits
        shifts = [code * bits - low for code in range(first, last + 1)]
        part = blocks[:, first : last + 1]
        if shifts[0] < 0:  # its lower bits are in the word before
            head = part[:, :1] >> mx.array([-shifts[0]], mx.uint32)
            rest = part[:, 1:] << mx.array(shifts[1:], mx.uint32)
            words.append(head[:, 0] + rest.sum(axis=-1))
        else:
            words.append((part << mx.array(shifts, mx.uint32)).sum(axis=-1))
    return mx.stack(words, axis=-1).reshape(*lead, k * bits // 32)


def _chunks(rows: mx.array) -> Iterator[mx.array]:
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]


def _search(rows: mx.array, spec: Spec) -> tuple[mx.array, mx.array, mx.array]:
    """Packed codes, scales, biases of float32 rows [R, K]: best grid of many by squared error."""
    groups, top = rows.reshape(-1, spec.group_size), 2**spec.bits - 1
    mean = groups.mean(axis=-1, keepdims=True)
    centred = groups - mean
    low, high = centred.min(axis=-1, keepdims=True), centred.max(axis=-1, keepdims=True)

    # Each grid is judged by its codes' least-squares refit, whose gain has a closed form: no error pass is needed.
    gain = scale = bias = mx.zeros_like(mean)
    for a, b in product(ENDS[spec.bits], repeat=2):
        trial = _refit(centred, mx.maximum((high * b - low * a) / top, TINY), low * a, top)
        better = trial[0] > gain
        gain, scale, bias = (mx.where(better, new, old) for new, old in zip(trial, (gain, scale, bias), strict=True))
    scale = mx.maximum(scale, TINY)
    for _ in range(ALTERNATIONS):
        _, scale, bias = _refit(centred, scale, bias, top)

    # Rounding: scale first, then the bias that is best for the rounded scale, then the codes that are best for both.
    codes = _codes(centred, scale, bias, top)
    scale = _bf16(scale)
    found = _finish(groups, scale, _bf16(mean - scale * codes.mean(axis=-1, keepdims=True)), top)
    _, scale, bias = mx.quantize(rows.astype(mx.bfloat16), spec.group_size, spec.bits)
    plain = _finish(groups, _column(scale), _column(bias), top)
    better = found[0] <= plain[0]
    scale, bias, codes = (mx.where(better, x, y) for x, y in zip(found[1:], plain[1:], strict=True))
    shape = (rows.shape[0], -1)
    return (
        pack(codes.reshape(rows.shape), spec.bits),
        scale.astype(mx.bfloat16).reshape(shape),
        bias.astype(mx.bfloat16).reshape(shape),
    )


def _refit(centred: mx.array, scale: mx.array, bias: mx.array, top: int) -> tuple[mx.array, mx.array, mx.array]:
    """(gain, scale, bias) of the least-squares line through (codes of this grid, weights), all [G, 1].

    `centred` sums to zero a group. Gain: by how much the line's squared error is below the sum of squares.
    """
    codes = _codes(centred, scale, bias, top)
    mean = codes.mean(axis=-1, keepdims=True)
    spread = mx.square(codes).sum(axis=-1, keepdims=True) - mx.square(mean) * codes.shape[-1]
    slope = (codes * centred).sum(axis=-1, keepdims=True) / mx.maximum(spread, 0.5)
    slope = mx.maximum(slope, TINY)
    return mx.square(slope) * spread, slope, -slope * mean


def _finish(groups: mx.array, scale: mx.array, bias: mx.array, top: int) -> tuple[mx.array, ...]:
    """(squared error, scale, bias, best codes) of a grid that is already rounded to bf16."""
    codes = _codes(groups, scale, bias, top)
    return mx.square(scale * codes + bias - groups).sum(axis=-1, keepdims=True), scale, bias, codes


def _codes(w: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    return mx.clip(mx.round((w - bias) / scale), 0, top)


def _bf16(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16).astype(mx.float32)


def _column(x: mx.array) -> mx.array:
    return x.astype(mx.float32).reshape(-1, 1)
