"""Tiny models whose experts are packed, and their logits."""

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_rotor.experts import layers
from mlx_rotor.host.attachment import stock_cache

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXED = (2, 4, 3)
TOKENS = [(5 * i * i + 3 * i + 1) % 61 for i in range(40)]


def expert_layers(model):
    """(path, layer) of every SwitchGLU, also of one that is fused."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, SwitchGLU)]
    return sorted(found, key=lambda item: [(p.isdigit(), int(p) if p.isdigit() else p) for p in item[0].split(".")])


def pack(model, bits=MIXED, group_size=32):
    """Quantizes the experts of `model` in place, each projection to its own bits in MLX's format. Returns the model."""
    for _, layer in expert_layers(model):
        for name, of in zip(PROJECTIONS, bits, strict=True):
            setattr(layer, name, layer[name].to_quantized(group_size, of))
    mx.eval(model.parameters())
    return model


def pack_in(model, *specs):
    """As `pack` in formats that are ours, (mode, bits, group size) for each projection, with random codes."""
    for _, layer in expert_layers(model):
        for name, spec in zip(PROJECTIONS, specs, strict=True):
            stock = layer[name]
            made = layers.of(stock, *spec)
            for tensor in made.format.tensors(stock.weight.shape[:-1], stock.weight.shape[-1]):
                if tensor.dtype == mx.uint32:
                    made[tensor.kind] = mx.random.randint(0, 1 << 31, tensor.shape).astype(mx.uint32)
                else:
                    scale = 1e-3 if tensor.kind == "scales" else 0.1
                    made[tensor.kind] = (scale * mx.random.normal(tensor.shape)).astype(mx.float16)
            if "bias" in stock:
                made["bias"] = stock.bias
            setattr(layer, name, made)
    mx.eval(model.parameters())
    return model


def logits(model, chunks=(7, 12, 1, 1, 4, 1), rows=1, caches=None):
    """Of `rows` sequences that come in chunks, one of them too long for the kernels: [rows, tokens, vocabulary]."""
    caches = stock_cache(model) if caches is None else caches
    every = mx.array([[(t + 7 * row) % 61 for t in TOKENS] for row in range(rows)])
    out, at = [], 0
    for n in chunks:
        out.append(model(every[:, at : at + n], cache=caches))
        mx.eval(out[-1])
        at += n
    return mx.concatenate(out, axis=1)


def apart(got, want):
    """The largest difference, by the largest value; inf where one is no number and the other is."""
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    if got.shape != want.shape or not mx.array_equal(mx.isfinite(got), mx.isfinite(want)):
        return float("inf")
    got, want = (mx.where(mx.isfinite(a), a, 0) for a in (got, want))
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()
