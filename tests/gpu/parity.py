"""Distance between arrays of bits, and the largest one that is allowed: NumPy alone."""

from __future__ import annotations

import numpy as np

# Largest |got - wanted| / (1 + |wanted|); of integers, the share that differs.
LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of bits; bfloat16 comes as uint16."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def difference(got: np.ndarray, wanted: np.ndarray, dtype: str) -> float:
    """See LIMITS. Infinite where shapes differ, or only one of two values is not a number."""
    if got.shape != wanted.shape:
        return float("inf")
    if dtype not in LIMITS:
        return float(np.mean(got != wanted)) if got.size else 0.0
    a, b = (numbers(x, dtype).astype(np.float64) for x in (got, wanted))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b) / (1 + np.abs(b)))
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))


def agrees(got: np.ndarray, wanted: np.ndarray, dtype: str) -> bool:
    return difference(got, wanted, dtype) <= LIMITS.get(dtype, 0.0)
