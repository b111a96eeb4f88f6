"""Which checks of kernels there are: operations, codecs, head dimensions, dtypes. Runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import codec
from ..errors import RotorError

# What is checked, and the operation of `mlx_rotor.kernels` that runs it. In segments: two packed ones, with means where
# the codec takes some, a window, and sinks that are seen beyond it.
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
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
# K and V of different codecs: the schemes people use, and two quantizers and two rotations in one kernel.
MIXED = (("turbo4", "turbo2"), ("trellis4", "iso3"))
USUAL_DIM = 128


@dataclass(frozen=True)
class Check:
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


def every() -> list[Check]:
    """All checks of all codecs that have a kernel. Those of one pair of codecs and one dimension are neighbours."""
    names = codec.names()
    pairs = [(name, name) for name in names] + [pair for pair in MIXED if set(pair) <= set(names)]
    return [
        Check(kind, k, v, dim, dtype)
        for dim in DIMS
        for k, v in pairs
        if _has_kernel(k, dim) and _has_kernel(v, dim)
        for dtype in DTYPES
        for kind in KINDS
        if (k == v or kind in OF_PAIRS) and (kind not in CENTRED or codec.get(k, dim).scaled)
    ]


def quick() -> list[Check]:
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
