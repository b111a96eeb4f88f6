"""A kernel's check: its outcome, the comparison that decides it, and the inputs that are the same on every machine."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .. import kernels
from ..errors import RotorError
from ..kernels import check_results

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
# Largest |kernel - reference| over largest |reference|. Both round inputs alike; a kernel also keeps decoded tiles,
# weights and its result in the dtype.
KERNEL_TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}

# Whether the check passed, the error and its tolerance (None where the kernel gave nothing to compare), and a note.
Found = tuple[bool, float | None, float | None, str]


class AnyCheck(Protocol):
    """The facts of a check that are the same for attention and expert kernels."""

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
    """The result of a check: `error` on the scale of `tolerance`; `note` says why it failed or what else was seen."""

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


def outcome(check: AnyCheck, made: Callable[[], Found]) -> Outcome:
    """Runs a check: `made` compares kernel and reference. Whatever it raises, from the compiler on, is a failure.

    Raises:
        RotorError: the kernels' backend is not Metal, so that a reference would be compared with itself.
    """
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


def compared(got: mx.array, want: mx.array, dtype: mx.Dtype, tolerances: dict[mx.Dtype, float]) -> Found:
    """Whether a kernel's result in `dtype` has the reference's shape and lies within the tolerance of its dtype."""
    if got.shape != want.shape or got.dtype != dtype:
        return False, None, None, f"{got.dtype} {got.shape} instead of {dtype} {want.shape}"
    with mx.stream(mx.cpu):
        a, b = np.array(got.astype(mx.float32), np.float64), np.array(want, np.float64)
    error, tolerance = float(np.abs(a - b).max() / np.abs(b).max()), tolerances[dtype]
    # No number compares as within the tolerance.
    passed = error <= tolerance
    return passed, error if np.isfinite(error) else None, tolerance, "" if np.isfinite(a).all() else "NaN or infinity"


def normal(seed: str, *shape: int) -> mx.array:
    """Normal numbers in float32, which depend on the seed and the shape alone."""
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    return mx.array(rng.standard_normal(shape).astype(np.float32))
