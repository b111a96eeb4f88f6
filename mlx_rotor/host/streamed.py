"""The parts of `layerwise`: matrix products in NumPy on a CPU, and experts that are read one at a time.

MLX's own products have no BLAS on Linux and take 20 times as long; on a GPU they are MLX's. Each expert is read, used
on the rows that are routed to it, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU


def by_numpy() -> bool:
    return mx.default_device() != mx.Device(mx.gpu)


def product(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., K] times weight [R, K] transposed: [.., R]. Evaluated where NumPy makes it."""
    if not by_numpy() or x.dtype != mx.float32 or weight.dtype != mx.float32:
        return x @ weight.T
    rows = np.asarray(x).reshape(-1, x.shape[-1])
    return mx.array(rows @ np.asarray(weight).T).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """Stands in for a linear layer, with its arrays."""

    def __init__(self, stock: nn.Linear) -> None:
        nn.Module.__init__(self)
        for name, value in stock.items():
            self[name] = value

    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


def linears(path: str, layer: nn.Module) -> dict[str, nn.Module]:
    """Stand-ins for the linear layers under `path`, where NumPy is what computes."""
    found = layer.named_modules() if by_numpy() else []
    return {f"{path}.{inner}": Linear(module) for inner, module in found if type(module) is nn.Linear}


@contextmanager
def attention() -> Iterator[None]:
    """A context in which attention on the CPU is computed one head at a time.

    The scores of 48 heads of 2048 tokens would take 0.8 GB a sequence.
    """
    stock = mx.fast.scaled_dot_product_attention

    def attend(q: mx.array, k: mx.array, v: mx.array, *args: Any, **named: Any) -> mx.array:
        given = {name for name, value in named.items() if value is not None}  # mlx_lm passes `sinks` always
        plain = not args and "scale" in given and given <= {"scale", "mask"}
        if not plain or {q.dtype, k.dtype, v.dtype} != {mx.float32}:
            return stock(q, k, v, *args, **named)
        return _attend(q, k, v, named["scale"], named.get("mask"))

    if not by_numpy():
        yield
        return
    mx.fast.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = stock


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """q [B, H, L, D], k [B, h, S, D], v [B, h, S, V] -> [B, H, L, V]; `mask` as MLX's."""
    queries, keys, values = np.asarray(q), np.asarray(k), np.asarray(v)
    batch, heads, length = queries.shape[:3]
    shape = (batch, heads, length, keys.shape[2])
    if isinstance(mask, str):  # "causal"
        masks = np.broadcast_to(np.tri(*shape[2:], shape[3] - length, dtype=bool), shape)
    elif mask is not None:
        masks = np.broadcast_to(np.asarray(mask), shape)
    out = np.empty((batch, heads, length, values.shape[3]), np.float32)
    for b, h in np.ndindex(batch, heads):
        shared = h * keys.shape[1] // heads
        scores = (queries[b, h] * np.float32(scale)) @ keys[b, shared].T
        if mask is not None:
            one = masks[b, h]
            scores = np.where(one, scores, np.finfo(np.float32).min) if one.dtype == bool else scores + one
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        np.matmul(scores, values[b, shared], out=out[b, h])
    return mx.array(out)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# (projection, expert) -> its weight, float32 [rows, K]
Read = Callable[[str, int], mx.array]


class StreamedExperts(nn.Module):
    """Called as the `SwitchGLU` it stands for: x [.., K], indices [.., k] -> [.., k, rows], by plain matrix products.

    The biases are those that `stock` has when it is made.

    Attributes:
        experts: how many there are.
        watch: called with (x [n, K], indices int32 NumPy [n, k]) before anything is computed.
    """

    def __init__(self, stock: SwitchGLU, read: Read) -> None:
        super().__init__()
        self._read, self._activation = read, stock.activation
        self._biases: dict[str, Any] = {name: stock[name].get("bias") for name in PROJECTIONS}
        self.experts: int = stock.gate_proj.num_experts
        self.watch: Callable[[mx.array, np.ndarray], None] | None = None

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        rows, chosen = x.reshape(-1, x.shape[-1]), np.array(indices.astype(mx.int32))
        shape, chosen = chosen.shape, chosen.reshape(-1, chosen.shape[-1])
        if self.watch is not None:
            self.watch(rows, chosen)
        found, order = [], []
        for expert, slots in by_expert(chosen):
            found.append(self.output(expert, rows[mx.array(slots // chosen.shape[1])]))
            mx.eval(found[-1])
            order.append(slots)
        back = mx.array(np.argsort(np.concatenate(order)))
        out = mx.concatenate(found)
        mx.eval(out)
        found.clear()  # an 800 MB copy fewer for 8192 tokens of 8 experts each
        return out[back].reshape(*shape, -1)

    def output(self, expert: int, x: mx.array) -> mx.array:
        """One expert's output for x [n, K]: [n, rows of down]."""
        return self._product("down_proj", expert, self.intermediate(expert, x))

    def intermediate(self, expert: int, x: mx.array, **weights: mx.array) -> mx.array:
        """The input of an expert's down projection, [n, rows of gate].

        `weights`: matrices to use for gate_proj or up_proj instead of reading them.
        """
        gate, up = (self._product(name, expert, x, weights.get(name)) for name in PROJECTIONS[:2])
        out: mx.array = self._activation(up, gate)
        return out

    def weight(self, name: str, expert: int) -> mx.array:
        """One of `PROJECTIONS` of one expert, [rows, K]."""
        return self._read(name, expert)

    def _product(self, name: str, expert: int, x: mx.array, weight: mx.array | None = None) -> mx.array:
        y = product(x, self._read(name, expert) if weight is None else weight)
        bias = self._biases[name]
        return y if bias is None else y + bias[expert]


def by_expert(chosen: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(expert, its places in `chosen.ravel()` in rising order) of every expert in `chosen` [n, k], by number."""
    flat = chosen.ravel()
    order = np.argsort(flat, kind="stable")
    experts, starts = np.unique(flat[order], return_index=True)
    for expert, slots in zip(experts, np.split(order, starts[1:]), strict=True):
        yield int(expert), slots
