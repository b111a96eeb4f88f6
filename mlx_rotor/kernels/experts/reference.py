"""References of the expert kernels in plain mx operations, with float32 sums.

`matmul` is that of the matvec kernel and of the tiled one for one matrix, `gather` of the tiled one for experts.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ...errors import RotorError
from ..spec import PackedWeight

ACTIVATIONS = ("swiglu", "geglu", "gpt_oss")
ALPHA, LIMIT = 1.702, 7.0  # of gpt_oss


def activate(name: str, gate: mx.array, up: mx.array) -> mx.array:
    """swiglu: silu(gate) · up; geglu: gelu(gate) · up, gelu by its tanh form; gpt_oss: gpt-oss's clamped form."""
    if name == "swiglu":
        return gate * mx.sigmoid(gate) * up
    if name == "geglu":
        gelu: mx.array = nn.gelu_approx(gate)
        return gelu * up
    if name == "gpt_oss":
        gate, up = mx.minimum(gate, LIMIT), mx.clip(up, -LIMIT, LIMIT)
        return gate * mx.sigmoid(ALPHA * gate) * (up + 1)
    raise RotorError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def matmul(x: mx.array, w: PackedWeight) -> mx.array:
    """x [.., K] times the transpose of w [N, K], plus its bias: [.., N] in x's dtype."""
    out = x.astype(mx.float32) @ w.decoded().T
    return (out if w.bias is None else out + w.bias).astype(x.dtype)


def gather(x: mx.array, w: PackedWeight, indices: mx.array) -> mx.array:
    """Rows x [.., K], each times its own expert of w [E, N, K], `indices` [..]: [.., N] in float32."""
    lead, chosen = indices.shape, indices.flatten()
    if chosen.size < w.parts[0].shape[0]:  # fewer than there are experts: expand no more than these
        w = replace(w, parts=tuple(part[chosen] for part in w.parts), bias=None if w.bias is None else w.bias[chosen])
        chosen = mx.arange(chosen.size)
    rows = x.astype(mx.float32).reshape(-1, 1, w.columns)
    out = mx.gather_mm(rows, w.decoded().swapaxes(-1, -2), rhs_indices=chosen)[:, 0]
    out = out if w.bias is None else out + w.bias[chosen]
    return out.reshape(*lead, -1)


def gate_up(x: mx.array, gate: PackedWeight, up: PackedWeight, indices: mx.array, activation: str) -> mx.array:
    """Tokens x [.., K] through both projections of their experts [E, N, K], `indices` [.., k], and the activation:
    [.., k, N] in x's dtype."""
    rows = mx.broadcast_to(x[..., None, :], (*indices.shape, x.shape[-1]))
    return activate(activation, gather(rows, gate, indices), gather(rows, up, indices)).astype(x.dtype)


def down(h: mx.array, w: PackedWeight, indices: mx.array, weights: mx.array | None = None) -> mx.array:
    """h [.., k, N] through its experts' w [E, M, N]: [.., M], the sum over k times `weights` [.., k] or [.., k, 1], in
    h's dtype; without weights [.., k, M]."""
    out = gather(h, w, indices)
    if weights is not None:
        out = (out * weights.astype(mx.float32).reshape(*indices.shape, 1)).sum(axis=-2)
    return out.astype(h.dtype)
