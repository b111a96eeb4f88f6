"""The cost of fused experts and packed matrices in Python: time to build the graph for one token, beside stock's.

As in `cache_overhead`, nothing is evaluated inside the timed part and stand-ins make lazy outputs instead of kernels.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts import layers
from ..host.experts import FUSED, attach_experts
from ..host.skeleton import skeleton
from .cache_overhead import launching, nodes

HIDDEN, INNER = 256, 128  # Python's time is the same for any
CONFIG: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "head_dim": 64, "rotary_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
ROPE: dict[str, Any] = {
    "short_factor": [1.0] * 32, "long_factor": [1.0] * 32, "short_mscale": 1.0, "long_mscale": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Of the first the router is a kernel too; the second keeps its own.
BLOCKS: dict[str, dict[str, Any]] = {
    "minimax": {
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
    },
    "phimoe": {"num_local_experts": 16, "num_experts_per_tok": 2, "rope_scaling": ROPE},
}
FORMATS = {"gate_proj": (2, 64), "up_proj": (2, 64), "down_proj": (3, 64)}
MATRIX = ("q8", 8, 32)

Run = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class ExpertOverhead:
    """One token through `what`, stock's way beside it: median microseconds, operations in the graph, our launches."""

    what: str
    microseconds: float
    stock_microseconds: float
    nodes: int
    stock_nodes: int
    launches: int

    @property
    def ratio(self) -> float:
        return self.microseconds / self.stock_microseconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def measure_expert_overhead(rounds: int = 400) -> list[ExpertOverhead]:
    """A block of each model in BLOCKS, and a matrix of ours beside MLX's of as many bits. Times are this machine's."""
    with launching("metal") as launches:
        found = [_compared(f"{name}'s experts", *_blocks(name), launches, rounds) for name in BLOCKS]
        return [*found, _compared("a q8 matrix", *_matrices(), launches, rounds)]


def _compared(what: str, ours: Run, stock: Run, launches: list[int], rounds: int) -> ExpertOverhead:
    x = mx.random.normal((1, 1, HIDDEN), key=mx.random.key(1)).astype(mx.bfloat16)
    mx.eval(x)
    for run in (ours, stock):
        run(x)  # what is kept from here on
    before = launches[0]
    counted = nodes(ours(x)), nodes(stock(x)), launches[0] - before
    with _no_collection():
        seconds = np.array([[_seconds(run, x) for run in (ours, stock)] for _ in range(rounds)])
    mine, theirs = 1e6 * np.median(seconds, axis=0)
    return ExpertOverhead(what, float(mine), float(theirs), *counted)


def _seconds(run: Run, x: mx.array) -> float:
    start = time.perf_counter()
    out = run(x)
    taken = time.perf_counter() - start
    del out
    return taken


def _blocks(name: str) -> tuple[Run, Run]:
    """A model's block with its experts fused, and one as it is."""
    return _block(name, True), _block(name, False)


def _block(name: str, fused: bool) -> Run:
    model = skeleton({"model_type": name, **CONFIG, **BLOCKS[name]})
    experts = model.layers[0].block_sparse_moe.switch_mlp
    for projection, (bits, group) in FORMATS.items():
        setattr(experts, projection, experts[projection].to_quantized(group, bits))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    if fused:
        attach_experts(model, FUSED)
    return model.layers[0].block_sparse_moe  # type: ignore[no-any-return]


def _matrices() -> tuple[Run, Run]:
    mode, bits, group = MATRIX
    plain = nn.Linear(HIDDEN, HIDDEN, bias=False)
    made = layers.of(plain, mode, bits, group)
    for tensor in made.format.tensors((HIDDEN,), HIDDEN):
        made[tensor.kind] = mx.zeros(tensor.shape, tensor.dtype)
    stock: Any = plain.to_quantized(group, bits)
    mx.eval(made.parameters(), stock.parameters())
    return made, stock


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
