"""Kernels that read packed weights, and routing, against their references: the list of checks, and one of them run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..experts import formats
from ..kernels import check_results, experts
from ..kernels.experts import reference
from ..kernels.experts.routing import Routing, route, route_reference, sorted_partition
from ..kernels.spec import PackedWeight
from .checking import DTYPES, KERNEL_TOLERANCE, Found, Outcome, compared, normal, outcome

# What is checked, and the operation that runs it. Rows of more than MAX_ROWS are tiled.
KINDS = {
    "gate_up, 1 row": "gate_up",
    "gate_up, 8 rows": "gate_up",
    "gate_up, geglu": "gate_up",
    "gate_up, gpt_oss with biases": "gate_up",
    "down, 1 row": "down",
    "down, 8 rows": "down",
    "down, not summed": "down",
    "matmul, 1 row": "matmul",
    "matmul, 8 rows": "matmul",
    "matmul, many rows": "matmul",
    "gather, many rows": "gather",
}
USUAL = ("gate_up, 1 row", "down, 1 row", "matmul, 1 row")
# Model -> how it routes, experts, chosen, whether with a bias.
ROUTINGS = {
    "minimax": (Routing("sigmoid", True, epsilon=1e-20), 256, 8, True),
    "mixtral": (Routing("softmax_of_chosen", False), 8, 2, False),
    "qwen3_moe": (Routing("softmax", True, ascending=True), 128, 8, False),
    "gpt_oss": (Routing("softmax_of_chosen", False, ascending=True), 32, 4, False),
    "deepseek_v3": (Routing("sigmoid", True, 2.5, 1e-20, upcast=True, groups=8, kept=4), 256, 8, True),
}
ROUTE = "route, "
# Weights of routing are those of MLX's own kernels but where a compiler fuses differently.
ROUTE_TOLERANCE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class ExpertCheck:
    """One kernel. `spec`: mode, bits, group size of its weights, None for routing; `dtype` is that of activations."""

    kind: str
    spec: tuple[str, int, int] | None
    dtype: mx.Dtype

    @property
    def operation(self) -> str:
        return "route" if self.kind.startswith(ROUTE) else KINDS[self.kind]

    @property
    def dtype_name(self) -> str:
        return check_results.dtype_name(self.dtype)

    @property
    def reads(self) -> tuple[str, ...]:
        """What the kernel reads, as check results name it."""
        return () if self.spec is None else (check_results.format_id(formats.get(*self.spec)),)

    @property
    def name(self) -> str:
        return f"{self.kind}: {', '.join((*self.reads, self.dtype_name))}"

    def facts(self) -> dict[str, Any]:
        return {"weights": self.reads}


@dataclass(frozen=True)
class Size:
    """Of the matrices, how many there are, and rows of what is tiled."""

    rows: int = 192
    columns: int = 1536
    experts: int = 5
    chosen: int = 3
    tiled: int = 40


def every() -> list[ExpertCheck]:
    """All kinds, of all formats and dtypes."""
    specs = [
        (mode, bits, group)
        for mode in formats.modes()
        for bits in formats.known(mode)[0]
        for group in formats.known(mode)[1]
    ]
    routes = [ExpertCheck(f"{ROUTE}{model}", None, dtype) for model in ROUTINGS for dtype in DTYPES]
    return routes + [ExpertCheck(kind, spec, dtype) for spec in specs for kind in KINDS for dtype in DTYPES]


def quick() -> list[ExpertCheck]:
    """A part of `every`: in bfloat16, routing, the usual kinds of all formats in their usual groups, and all kinds of
    a mode's 3-bit or first format; the usual kinds of that in other dtypes."""
    chosen = []
    for check in every():
        if check.spec is None:
            chosen.append(check)
            continue
        mode, bits, group = check.spec
        all_bits, groups = formats.known(mode)
        full = (bits, group) == (3 if 3 in all_bits else all_bits[0], groups[0])
        usual = check.kind in USUAL and (full or (group == groups[0] and check.dtype == mx.bfloat16))
        if usual or (full and check.dtype == mx.bfloat16):
            chosen.append(check)
    return chosen


def run(check: ExpertCheck, size: Size | None = None) -> Outcome:
    """One check, as `attention_check.run`. Raises as it does."""
    return outcome(check, lambda: CHECKS[check.operation](check, size or Size()))


def _route(check: ExpertCheck, size: Size) -> Found:
    """Indices must be the reference's, which runs where MLX runs; weights almost. Many scores are equal."""
    how, count, k, biased = ROUTINGS[check.kind.removeprefix(ROUTE)]
    x = normal(check.name, 9, count)
    x = mx.where(normal(f"{check.name} ties", 9, count) > 0, mx.round(x), x).astype(check.dtype)
    bias = mx.round(normal(f"{check.name} bias", count)) / 8 if biased else None
    indices, weights = route(x, k, how, bias)
    want_indices, want = route_reference(x, k, how, bias, partition=sorted_partition)
    mx.eval(indices, weights, want_indices, want)
    if indices.shape != want_indices.shape:
        return False, None, None, f"indices {indices.shape} instead of {want_indices.shape}"
    if wrong := int((np.array(indices) != np.array(want_indices)).sum()):
        return False, None, None, f"{wrong} of {indices.size} experts are not the stock model's"
    passed, error, tolerance, note = compared(weights, want.astype(mx.float32), want.dtype, ROUTE_TOLERANCE)
    return passed, error, tolerance, note or ("" if error == 0 else "weights are rounded otherwise than stock's")


def _gate_up(check: ExpertCheck, size: Size) -> Found:
    _, _, what = check.kind.partition(", ")
    biased = what == "gpt_oss with biases"
    activation = what.partition(" ")[0] if what.startswith("g") else "swiglu"
    gate, up = (_stack(check, size, name, biased) for name in ("gate", "up"))
    tokens = 8 if what == "8 rows" else 1
    x = normal(check.name, tokens, size.columns).astype(check.dtype)
    indices = _indices(check.name, tokens, size)
    got = experts.gate_up(x, gate, up, indices, activation)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.gate_up(x.astype(mx.float32), gate, up, indices, activation)
    return compared(got, want, check.dtype, KERNEL_TOLERANCE)


def _down(check: ExpertCheck, size: Size) -> Found:
    w = _stack(check, size, "down", False)
    tokens = 8 if check.kind.endswith("8 rows") else 1
    h = normal(check.name, tokens, size.chosen, size.columns).astype(check.dtype)
    indices = _indices(check.name, tokens, size)
    weights = None if check.kind.endswith("summed") else mx.abs(normal(f"{check.name} weights", *indices.shape))
    weights = None if weights is None else weights.astype(check.dtype)
    got = experts.down(h, w, indices, weights)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.down(h.astype(mx.float32), w, indices, weights)
    return compared(got, want, check.dtype, KERNEL_TOLERANCE)


def _matmul(check: ExpertCheck, size: Size) -> Found:
    w = _stack(check, size, "matrix", True)
    assert w.bias is not None
    w = PackedWeight(w.format, tuple(part[0] for part in w.parts), w.columns, w.bias[0])
    rows = {"1 row": 1, "8 rows": 8}.get(check.kind.partition(", ")[2], size.tiled)
    x = normal(check.name, rows, size.columns).astype(check.dtype)
    got = experts.matmul(x, w)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.matmul(x.astype(mx.float32), w)
    return compared(got, want, check.dtype, KERNEL_TOLERANCE)


def _gather(check: ExpertCheck, size: Size) -> Found:
    w = _stack(check, size, "gathered", False)
    x = normal(check.name, size.tiled, size.columns).astype(check.dtype)
    indices = mx.sort(mx.arange(size.tiled, dtype=mx.uint32) % size.experts)
    got = experts.gather(x, w, indices)
    mx.eval(got)
    with mx.stream(mx.cpu):
        want = reference.gather(x.astype(mx.float32), w, indices)
    return compared(got, want, check.dtype, KERNEL_TOLERANCE)


CHECKS: dict[str, Callable[[ExpertCheck, Size], Found]] = {
    "route": _route,
    "gate_up": _gate_up,
    "down": _down,
    "matmul": _matmul,
    "gather": _gather,
}


def _stack(check: ExpertCheck, size: Size, seed: str, biased: bool) -> PackedWeight:
    """Random codes, with numbers beside them in the activations' dtype where the format is MLX's."""
    assert check.spec is not None
    form, parts = formats.get(*check.spec), []
    for tensor in form.tensors((size.experts, size.rows), size.columns):
        if tensor.dtype == mx.uint32:
            rng = np.random.default_rng(list(f"{check.name} {seed}".encode()))
            parts.append(mx.array(rng.integers(0, 2**32, tensor.shape, dtype=np.uint32)))
        else:
            own = check.dtype if form.mode == formats.MLX else tensor.dtype
            parts.append((normal(f"{seed} {tensor.kind}", *tensor.shape) / size.columns**0.5).astype(own))
    bias = normal(f"{seed} bias", size.experts, size.rows).astype(check.dtype) if biased else None
    return PackedWeight(form, tuple(parts), size.columns, bias)


def _indices(seed: str, tokens: int, size: Size) -> mx.array:
    """Different experts for each token, [T, k]."""
    return mx.argsort(normal(f"{seed} experts", tokens, size.experts), axis=-1)[:, : size.chosen].astype(mx.uint32)
