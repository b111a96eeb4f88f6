"""A weight to what is stored of it, by any of the fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ...errors import RotorError
from ..policy import FITS, Spec
from .affine import fit_affine
from .chunks import chunks
from .gptq import fit_hessian
from .hessian import Hessian

NVFP4_LARGEST = 448.0 * 6.0  # E4M3's largest scale, E2M1's largest code


@dataclass(frozen=True)
class Fitted:
    """What mx.dequantize reads: `weight` uint32 [.., K*bits/32], `scales` and `biases` [.., K/group_size].

    Scales and biases are bf16 in mode affine; the other modes have uint8 scales and no biases.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None


def fit(
    w: mx.array,
    spec: Spec,
    method: str = "search",
    importance: mx.array | None = None,
    hessian: mx.array | Hessian | None = None,
) -> Fitted:
    """Quantizes weights [.., K], finite, to `spec`. Evaluates what it returns.

    `fast` is mx.quantize, whatever is known of the inputs, and so is every method in a mode other than affine, whose
    scales leave nothing to choose. `search` and `best` minimise the error of the weights, each counted as much as
    `importance` says (see `fit_affine`); with a `hessian` [K, K], for w [rows, K], that of the outputs, and importance
    is not looked at. A `Hessian` made once saves its factorisation where several weights see the same inputs.

    Raises:
        RotorError: shapes that don't go together; an unknown method; a Hessian that can't be factorised.
    """
    if method not in FITS:
        raise RotorError(f"unknown fit {method!r}; fits: {', '.join(FITS)}")
    if spec.mode != "affine":
        return _of_mode(w, spec)
    if hessian is None or method == "fast":
        seen = None if method == "fast" else importance
        return Fitted(*fit_affine(w, bits=spec.bits, group_size=spec.group_size, fit=method, importance=seen))
    hessian = hessian if isinstance(hessian, Hessian) else Hessian(hessian)
    return Fitted(*fit_hessian(w, hessian, bits=spec.bits, group_size=spec.group_size, fit=method))


def decode(fitted: Fitted, spec: Spec) -> mx.array:
    """The weights that were stored, float32 [.., K]; lazy."""
    scales, biases = fitted.scales, fitted.biases
    if spec.mode == "affine" and biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(fitted.weight, scales, biases, spec.group_size, spec.bits, mode=spec.mode, dtype=mx.float32)


def squared_error(w: mx.array, fitted: Fitted, spec: Spec) -> tuple[float, float]:
    """(sum of (w - decoded)^2, sum of w^2) in float32, decoded by mx.dequantize from what was stored."""
    error = norm = 0.0
    rows = w.reshape(-1, w.shape[-1])
    count = rows.shape[0]
    weight, scales = fitted.weight.reshape(count, -1), fitted.scales.reshape(count, -1)
    biases = None if fitted.biases is None else fitted.biases.reshape(count, -1)
    for part in chunks(*rows.shape):
        chunk = rows[part].astype(mx.float32)
        decoded = decode(Fitted(weight[part], scales[part], None if biases is None else biases[part]), spec)
        error += sum_of_squares(chunk - decoded)
        norm += sum_of_squares(chunk)
    return error, norm


def sum_of_squares(x: mx.array) -> float:
    """Sum of x**2 in float32, as a Python number."""
    return cast(float, mx.square(x.astype(mx.float32)).sum().item())


def _of_mode(w: mx.array, spec: Spec) -> Fitted:
    if w.shape[-1] % spec.group_size:
        raise RotorError(f"{spec.mode}: groups of {spec.group_size} do not divide {w.shape[-1]}, the last of {w.shape}")
    rows = w.reshape(-1, w.shape[-1])
    parts = []
    largest = cast(float, mx.max(mx.abs(rows)).item())
    if spec.mode == "nvfp4" and largest > NVFP4_LARGEST:  # other modes' scales have float32's range
        raise RotorError(f"{spec.mode} holds {NVFP4_LARGEST:g} at most, a weight is {largest:.4g}: use another mode")
    for part in chunks(*rows.shape):
        quantized = mx.quantize(rows[part].astype(mx.bfloat16), spec.group_size, spec.bits, mode=spec.mode)
        parts.append(quantized)
        mx.eval(quantized)
    weight, scales = (mx.concatenate(list(p)).reshape(*w.shape[:-1], -1) for p in zip(*parts, strict=True))
    mx.eval(weight, scales)
    return Fitted(weight, scales, None)
