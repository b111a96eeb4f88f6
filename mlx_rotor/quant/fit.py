"""Fits a weight to a spec, in MLX's modes and our own formats; and the error of each fit on normal weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from ..errors import RotorError
from ..experts import formats
from ..experts.formats.affine import fit_affine
from ..fit import FITS
from ..fit.feedback import Hessian, fit_hessian
from ..fit.packing import pack
from ..fit.rows import by_chunks, chunks, largest_of
from .spec import BITS, FIXED, Spec

__all__ = [
    "FITS",
    "Fitted",
    "Hessian",
    "decode",
    "fit",
    "fit_affine",
    "measure",
    "pack",
    "print_errors",
    "relative_error",
    "squared_error",
    "sum_of_squares",
]

NVFP4_LARGEST = 448.0 * 6.0  # E4M3's largest scale, E2M1's largest code
FIXED_ERRORS = {"mxfp4": 0.01328, "mxfp8": 0.0007127, "nvfp4": 0.009034}  # as `Format.errors`, of every fit
ROWS, COLUMNS = 1024, 1024  # weights that errors are measured on: they are known to half a percent
SEED = 0


@dataclass(frozen=True)
class Fitted:
    """What is stored of weights [.., K], in the order a reader takes it: codes uint32 [.., K*bits/32], then by groups.

    That is scales and biases in mode affine (bf16), scales alone in MLX's other modes (uint8), and what
    `experts.formats` says of ours.
    """

    parts: tuple[mx.array, ...]


def fit(
    w: mx.array,
    spec: Spec,
    method: str = "search",
    importance: mx.array | None = None,
    hessian: mx.array | Hessian | None = None,
) -> Fitted:
    """Quantizes weights [.., K], finite, to `spec`. Evaluates what it returns.

    `fast` looks at the weights alone: in mode affine it is mx.quantize, and so is every method in MLX's other modes,
    whose scales leave nothing to choose. `search` and `best` minimise the error of the weights, each counted as much as
    `importance` says (see `Format.fit`); with a `hessian` [K, K], for w [rows, K], that of the outputs, and importance
    is not looked at. A `Hessian` made once saves its factorisation where several weights see the same inputs.

    Raises:
        RotorError: shapes that don't go together; an unknown method; a Hessian that can't be factorised; weights
            beyond what the format holds.
    """
    if method not in FITS:
        raise RotorError(f"unknown fit {method!r}; fits: {', '.join(FITS)}")
    if spec.mode in FIXED:
        return _of_mode(w, spec)
    form = formats.get(spec.mode, spec.bits, spec.group_size)
    if hessian is None or method == "fast":
        return Fitted(form.fit(w, method, importance))
    form.check_weights(w)
    hessian = hessian if isinstance(hessian, Hessian) else Hessian(hessian)
    return Fitted(fit_hessian(w, hessian, spec.group_size, form.grid(method), method))


def decode(fitted: Fitted, spec: Spec) -> mx.array:
    """The weights that were stored, float32 [.., K]; lazy."""
    if spec.mode in FIXED:
        codes, scales = fitted.parts
        return mx.dequantize(codes, scales, None, spec.group_size, spec.bits, mode=spec.mode, dtype=mx.float32)
    columns = fitted.parts[0].shape[-1] * 32 // spec.bits
    return formats.get(spec.mode, spec.bits, spec.group_size).decode(fitted.parts, columns)


def squared_error(w: mx.array, fitted: Fitted, spec: Spec) -> tuple[float, float]:
    """(sum of (w - decoded)^2, sum of w^2) in float32, decoded from what was stored."""
    error = norm = 0.0
    rows = w.reshape(-1, w.shape[-1])
    stored = [part.reshape(rows.shape[0], -1) for part in fitted.parts]
    for part in chunks(*rows.shape):
        chunk = rows[part].astype(mx.float32)
        error += sum_of_squares(chunk - decode(Fitted(tuple(s[part] for s in stored)), spec))
        norm += sum_of_squares(chunk)
    return error, norm


def sum_of_squares(x: mx.array) -> float:
    """Sum of x**2 in float32, as a Python number."""
    return cast(float, mx.square(x.astype(mx.float32)).sum().item())


def _of_mode(w: mx.array, spec: Spec) -> Fitted:
    if w.shape[-1] % spec.group_size:
        raise RotorError(f"{spec.mode}: groups of {spec.group_size} do not divide {w.shape[-1]}, the last of {w.shape}")
    largest = largest_of(w)
    if spec.mode == "nvfp4" and largest > NVFP4_LARGEST:  # other modes' scales have float32's range
        raise RotorError(f"{spec.mode} holds {NVFP4_LARGEST:g} at most, a weight is {largest:.4g}: use another mode")

    def work(rows: mx.array, _: mx.array | None) -> tuple[mx.array, ...]:
        return tuple(mx.quantize(rows.astype(mx.bfloat16), spec.group_size, spec.bits, mode=spec.mode))

    return Fitted(by_chunks(w, None, work))


def relative_error(bits: int, group_size: int, fit: str = "search", mode: str = "affine") -> float:
    """Squared error over squared length of normal weights, which is what is known of a weight before it is read.

    Raises:
        RotorError: there is no such spec or fit.
    """
    if fit not in FITS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(FITS)}")
    Spec(bits, group_size, mode)
    return FIXED_ERRORS[mode] if mode in FIXED else formats.get(mode, bits, group_size).error(fit)


def measure(spec: Spec, method: str, rows: int = ROWS, seed: int = SEED) -> float:
    """The same, measured on `rows` x COLUMNS independent normal weights."""
    w = mx.random.normal((rows, COLUMNS), key=mx.random.key(seed))
    error, norm = squared_error(w, fit(w, spec, method), spec)
    return error / norm


def print_errors() -> None:
    """Prints the `errors` of every format, and FIXED_ERRORS, as source."""
    for mode in formats.modes():
        bits, sizes = formats.known(mode)
        print(f"    # {mode}\n    errors = {{")
        for spec in [Spec(b, g, mode) for b in bits if mode != formats.MLX or b in BITS for g in sorted(sizes)]:
            found = ", ".join(f"{measure(spec, method):.4g}" for method in FITS)
            print(f"        ({spec.bits}, {spec.group_size}): ({found}),")
        print("    }")
    fixed = (f'"{mode}": {measure(Spec(*form, mode), "fast"):.4g}' for mode, form in FIXED.items())
    print(f"FIXED_ERRORS = {{{', '.join(fixed)}}}")
