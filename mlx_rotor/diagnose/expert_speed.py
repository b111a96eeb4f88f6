"""Time of a layer's experts, fused against mlx_lm's own layer, by model, weight formats and tokens."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..experts import formats, layers
from ..experts.fused import FusedExperts
from ..host.skeleton import skeleton
from ..kernels import check_results
from ..kernels.check_results import TIMED_ROWS
from ..kernels.spec import PackedWeight
from .timing import SHARE, memory, repeated


@dataclass(frozen=True)
class Dims:
    """A layer of experts: `chosen` of `experts`, each `hidden` to `intermediate` and back."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    chosen: int

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Rows and columns of gate, up and down."""
        yield from ((self.intermediate, self.hidden), (self.intermediate, self.hidden))
        yield (self.hidden, self.intermediate)


Triple = Sequence[tuple[str, int, int]]  # mode, bits and group size of gate, up and down

MINIMAX = Dims("MiniMax-M2.7", 3072, 1536, 256, 8)
QWEN3 = Dims("Qwen3-30B-A3B", 2048, 768, 128, 8)
GPT_OSS = Dims("gpt-oss-20b", 2880, 2880, 32, 4)
MIXTRAL = Dims("Mixtral-8x7B", 4096, 14336, 8, 2)
DEMO = Dims("bundled model", 256, 64, 16, 2)

AFFINE_2_3 = (("affine", 2, 64), ("affine", 2, 64), ("affine", 3, 64))
AFFINE_3, AFFINE_4 = (("affine", 3, 64),) * 3, (("affine", 4, 64),) * 3
LLOYD_2_3 = (("lloyd", 2, 256), ("lloyd", 2, 256), ("lloyd", 3, 256))
LLOYD_3_4 = (("lloyd", 3, 256), ("lloyd", 3, 256), ("lloyd", 4, 256))
IQ4_NL = (("iq4_nl", 4, 16),) * 3


# Layers in a row in one measurement, each taking the last one's output, with experts of its own, as in a model.
CHAIN = 8
WARM_UP = 2
NOISE = 1.03  # stock has to be that much faster to be preferred
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

MODELS = (MINIMAX, QWEN3, GPT_OSS, MIXTRAL)
TRIPLES: tuple[Triple, ...] = (AFFINE_2_3, AFFINE_3, AFFINE_4, LLOYD_2_3, LLOYD_3_4, IQ4_NL)


@dataclass(frozen=True)
class ExpertTiming:
    """Milliseconds a layer, None where not measured; `skipped` says why. `key` is `check_results.experts_key`."""

    model: str
    key: str
    rows: int
    stock_ms: float | None = None
    fused_ms: float | None = None
    skipped: str = ""

    @property
    def ratio(self) -> float | None:
        """The speed over stock's."""
        return self.stock_ms / self.fused_ms if self.stock_ms and self.fused_ms else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def cells() -> list[tuple[Dims, Triple]]:
    """Every pair of a model and formats that its dimensions have; each is measured for all numbers of TIMED_ROWS."""
    return [(model, triple) for model in MODELS for triple in TRIPLES if _fits(model, triple)]


def measure_experts(model: Dims, triple: Triple, room: int | None = None) -> list[ExpertTiming]:
    """A timing for each number of TIMED_ROWS; `room` in bytes, None: what MLX may take. A kernel that does not run is a
    timing that says so. Graphs are built before the clock starts."""
    room = memory() if room is None else room
    size = sum(
        t.dtype.size * math.prod(t.shape)
        for spec, (rows, columns) in zip(triple, model.shapes(), strict=True)
        for t in formats.get(*spec).tensors((model.experts, rows), columns)
    )
    if size > SHARE * room:
        why = f"needs {size / SHARE / 1e9:.1f} GB, {room / 1e9:.1f} GB free"
        return [ExpertTiming(model.name, _key(model, triple), rows, skipped=why) for rows in TIMED_ROWS]
    try:
        weights = [_packed(spec, model.experts, *shape) for spec, shape in zip(triple, model.shapes(), strict=True)]
        mx.eval([weight.parts for weight in weights])
        return [_timing(model, triple, weights, rows) for rows in TIMED_ROWS]
    finally:
        mx.clear_cache()


def record(timings: Sequence[ExpertTiming]) -> None:
    """Stores which of those that were measured stock won, for `check_results.prefers_stock`."""
    lost, timed = [], []
    for t in timings:
        if t.fused_ms is None or t.stock_ms is None:
            continue
        timed.append((t.key, t.rows))
        if t.fused_ms > NOISE * t.stock_ms:
            lost.append(check_results.Slower(t.key, t.rows, t.fused_ms, t.stock_ms))
    check_results.record_timings(timed, lost)


def stock_layer(model: Dims, weights: Sequence[PackedWeight]) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """mlx_lm's own layer over packed weights, and the sum over experts as its models write it: of x [T, K], indices
    [T, k] and weights [T, k], [T, K]."""
    made = skeleton({
        "model_type": "mixtral", "vocab_size": 8, "hidden_size": model.hidden, "num_attention_heads": 1,
        "intermediate_size": model.intermediate, "num_hidden_layers": 1, "num_key_value_heads": 1,
        "num_local_experts": model.experts, "num_experts_per_tok": model.chosen,
    }).layers[0].block_sparse_moe.switch_mlp  # fmt: skip
    for name, weight in zip(PROJECTIONS, weights, strict=True):
        form = weight.format
        if form.mode == formats.MLX:
            layer = made[name].to_quantized(form.group_size, form.bits)
        else:
            layer = layers.of(made[name], form.mode, form.bits, form.group_size, name)
        names = ("weight", *formats.get(form.mode, form.bits, form.group_size).beside)
        for tensor, part in zip(names, weight.parts, strict=True):
            setattr(layer, tensor, part)
        setattr(made, name, layer)

    def run(x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        out: mx.array = (made(x, indices) * scores[..., None]).sum(axis=-2)
        return out

    return run


def _timing(model: Dims, triple: Triple, weights: Sequence[PackedWeight], rows: int) -> ExpertTiming:
    key = check_results.experts_key(*weights)
    gate, up, down = weights
    try:
        with check_results.ignored():
            stock_ms = _milliseconds(model, rows, stock_layer(model, weights))
            fused_ms = _milliseconds(model, rows, FusedExperts(gate, up, down, "swiglu").weighted)
    except Exception as e:
        return ExpertTiming(model.name, key, rows, skipped=f"{type(e).__name__}: {str(e)[:300]}")
    return ExpertTiming(model.name, key, rows, stock_ms, fused_ms)


def _milliseconds(model: Dims, rows: int, run: Callable[[mx.array, mx.array, mx.array], mx.array]) -> float:
    """The median time of one of `CHAIN` layers in a row. Each takes experts of its own: a GPU's cache has none."""
    x = mx.random.normal((rows, model.hidden)).astype(mx.bfloat16)
    scores = mx.full((rows, model.chosen), 1 / model.chosen, mx.bfloat16)
    chosen = [
        mx.argsort(mx.random.uniform(shape=(rows, model.experts)), axis=-1)[:, : model.chosen] for _ in range(CHAIN)
    ]
    chosen = [mx.contiguous(indices) for indices in chosen]
    mx.eval(x, scores, chosen)

    def once() -> float:
        out = x
        for indices in chosen:
            out = run(out, indices, scores)
        started = time.perf_counter()
        mx.eval(out)
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        once()
    return 1e3 * statistics.median(repeated(once)) / CHAIN


def _packed(spec: tuple[str, int, int], experts: int, rows: int, columns: int) -> PackedWeight:
    """Any bits are codes; what is beside them is small."""
    form, parts = formats.get(*spec), []
    for tensor in form.tensors((experts, rows), columns):
        if tensor.dtype == mx.uint32:
            parts.append(mx.random.randint(0, 1 << 31, tensor.shape).astype(mx.uint32))
        else:
            parts.append((mx.random.normal(tensor.shape) / columns).astype(tensor.dtype))
    return PackedWeight(form, tuple(parts), columns)


def _fits(model: Dims, triple: Triple) -> bool:
    return all(columns % spec[2] == 0 for spec, (_, columns) in zip(triple, model.shapes(), strict=True))


def _key(model: Dims, triple: Triple) -> str:
    """`check_results.experts_key` of weights that are not made."""
    made = [
        PackedWeight(formats.get(*spec), (mx.zeros((1, rows, 1)),), columns)
        for spec, (rows, columns) in zip(triple, model.shapes(), strict=True)
    ]
    return check_results.experts_key(*made)
