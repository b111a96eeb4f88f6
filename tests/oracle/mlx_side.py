"""mlx_lm's MiniMax with mlx_rotor: loading in float32, and its states layer by layer. Knows nothing of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from traces import LayerTrace, Trace

from mlx_rotor.experts.layers import packed_of


def load(folder: Path) -> nn.Module:
    """mlx_lm's model of a checkpoint, what is not packed as float32."""
    model, _ = load_model(folder)
    model.apply(lambda values: values.astype(mx.float32) if values.dtype == mx.bfloat16 else values)
    model.eval()
    mx.eval(model.parameters())
    return model


class Recorded(nn.Module):
    """A module that keeps what goes in and comes out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[mx.array, mx.array]] = []

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        out = self.inner(x, *rest)
        self.seen.append((x, out))
        return out

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """[T, D] each, of all calls on one sequence in their order."""
        return tuple(np.concatenate([np.array(pair[i][0]) for pair in self.seen]) for i in range(2))


def trace(model: nn.Module, tokens: np.ndarray, cache: Any = None, step: int | None = None) -> Trace:
    """Of tokens [T], all at once, or `step` at a time through a cache."""
    step = step or len(tokens)
    layers = model.model.layers
    kept = list(layers)
    recorded = []
    logits = []
    try:
        for i, layer in enumerate(kept):
            layer.self_attn, layer.block_sparse_moe = Recorded(layer.self_attn), Recorded(layer.block_sparse_moe)
            layers[i] = Recorded(layer)
            recorded.append((layer.self_attn, layer.block_sparse_moe, layers[i]))
        for start in range(0, len(tokens), step):
            logits.append(model(mx.array(tokens[None, start : start + step]), cache=cache)[0])
            mx.eval(logits[-1], [pair for modules in recorded for m in modules for pair in m.seen[-1:]])
    finally:
        for i, layer in enumerate(kept):
            layers[i] = layer
            for name in ("self_attn", "block_sparse_moe"):
                if isinstance(layer[name], Recorded):
                    setattr(layer, name, layer[name].inner)
    return Trace(
        tuple(LayerTrace(a.arrays, e.arrays, whole.arrays[1]) for a, e, whole in recorded),
        np.array(mx.concatenate(logits)),
    )


def caches(model: nn.Module) -> list[Any]:
    """mlx_lm's own, empty."""
    return make_prompt_cache(model)


def attention(model: nn.Module, layer: int, hidden: np.ndarray) -> np.ndarray:
    """What attention of one layer makes of normed hidden states [T, D]."""
    return np.array(model.model.layers[layer].self_attn(mx.array(hidden)[None], "causal", None)[0])


def experts(model: nn.Module, layer: int, hidden: np.ndarray) -> np.ndarray:
    """What router and experts of one layer make of normed hidden states [T, D]."""
    return np.array(model.model.layers[layer].block_sparse_moe(mx.array(hidden)[None])[0])


def router(model: nn.Module, layer: int) -> np.ndarray:
    """The router's weights [E, D] as they are stored, decoded."""
    gate = model.model.layers[layer].block_sparse_moe.gate
    packed = packed_of(gate)
    return np.array((gate.weight if packed is None else packed.decoded()).astype(mx.float32))


class _Named(nn.Module):
    """Experts of which the e-th gives the e-th unit vector, so that their weighted sum is the routing itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return (indices[..., None] == mx.arange(self.count)).astype(mx.float32)


@contextmanager
def named_experts(block: Any) -> Iterator[None]:
    kept = block.switch_mlp
    block.switch_mlp = _Named(block.gate.weight.shape[0])
    try:
        yield
    finally:
        block.switch_mlp = kept


def route(model: nn.Module, layer: int, hidden: np.ndarray) -> np.ndarray:
    """Weights [T, E] that one layer's block routes normed hidden states [T, D] with; 0 for what is not chosen."""
    block = model.model.layers[layer].block_sparse_moe
    with named_experts(block):
        return np.array(block(mx.array(hidden)[None])[0])
