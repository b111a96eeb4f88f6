"""Traffic, operations and launches of a layer's experts for a token, counted in the Metal simulator, beside MLX's own.

A few of the chosen experts are run, in a stack of that many: each costs the same, so sums are scaled to all of them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_rotor import bundled
from mlx_rotor.diagnose.expert_speed import (
    AFFINE_2_3,
    AFFINE_4,
    DEMO,
    IQ4_NL,
    LLOYD_2_3,
    LLOYD_3_4,
    MINIMAX,
    Dims,
    Triple,
)
from mlx_rotor.experts import formats
from mlx_rotor.experts.formats import Format
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.kernels.check_results import format_id
from mlx_rotor.kernels.experts.few_rows import down_metal, gate_up_metal
from mlx_rotor.kernels.experts.routing import Routing, route_metal
from mlx_rotor.kernels.spec import PackedWeight

from .. import Buffer, Options, mlx_source, run_file
from .kernel_traffic import Tally, counted
from .throughput import DEVICES, predict

# Operations of MLX that only look at an array otherwise: they launch nothing.
VIEWS = {
    *("Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"),
    "Unflatten",
}
QUANTIZED = (
    '#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"\n#include "mlx/backend/metal/kernels/quantized_utils.h"\n'
)
FAST_COLUMNS = 512  # that MLX takes at a time in affine_gather_qmv_fast
ROUTING = Routing("sigmoid", True, epsilon=1e-20)  # MiniMax's


TRIPLES: dict[Dims, tuple[Triple, ...]] = {
    MINIMAX: (AFFINE_2_3, AFFINE_4, LLOYD_2_3, LLOYD_3_4, IQ4_NL),
    DEMO: (AFFINE_2_3, (("lloyd", 2, 64),) * 3),
}


@dataclass(frozen=True)
class ExpertRow:
    """One token through a layer's experts. Bytes, launches, operations and times are of all `chosen` experts.

    `needed` are the packed bytes of the chosen experts, logits, the token, what is between the projections and the
    output; `operations`: kind -> how many a weight costs, idle lanes included; `predicted`: device -> seconds by the
    model of throughput.py. `run`: how many of the chosen experts the counts come from.
    """

    kernel: str
    weights: str
    model: str
    chosen: int
    run: int
    needed: int
    moved: int
    line_use: float
    launches: int
    operations: dict[str, float]
    predicted: dict[str, float]

    @property
    def bytes_ratio(self) -> float:
        return self.moved / self.needed

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_ratio": self.bytes_ratio}


def packed(form: Format, experts: int, rows: int, columns: int, seed: int, dtype: mx.Dtype) -> PackedWeight:
    """Random bits, and small numbers of `dtype` beside them where the format is MLX's."""
    rng = np.random.default_rng(seed)
    parts = []
    for tensor in form.tensors((experts, rows), columns):
        if tensor.kind == "weight":
            parts.append(mx.array(rng.integers(0, 2**32, tensor.shape, dtype=np.uint32)))
        else:
            own = dtype if form.mode == formats.MLX else tensor.dtype
            parts.append(mx.array(rng.standard_normal(tensor.shape).astype(np.float32) / columns).astype(own))
    return PackedWeight(form, tuple(parts), columns)


def fused(dims: Dims, triple: Triple, run: int = 2, model: bool = True) -> list[ExpertRow]:
    """Rows of gate_up, down, and the layer: these and the routing."""
    gate, up, down = (
        packed(formats.get(*spec), run, *shape, seed, mx.bfloat16)
        for seed, (spec, shape) in enumerate(zip(triple, dims.shapes(), strict=True))
    )
    x = mx.array(np.random.default_rng(9).standard_normal((1, dims.hidden)).astype(np.float32)).astype(mx.bfloat16)
    indices = mx.arange(run, dtype=mx.uint32)[None]
    weights = mx.full((1, run), 1 / run, mx.bfloat16)
    hidden = mx.zeros((1, run, dims.intermediate), mx.bfloat16)
    logits, bias = (mx.array(np.random.default_rng(i).standard_normal(dims.experts), mx.float32) for i in (1, 2))

    def routed() -> None:
        route_metal(logits[None], dims.chosen, ROUTING, bias, mx.bfloat16)

    def projected() -> None:
        gate_up_metal(x, gate, up, indices, "swiglu")

    def summed() -> None:
        down_metal(hidden, down, indices, weights)

    name = "+".join(format_id(w.format) for w in (gate, up, down))
    scale = dims.chosen / run
    routing = 8 * dims.experts + 6 * dims.chosen  # logits and bias; indices and weights in 16 bits
    middle = 2 * dims.chosen * dims.intermediate
    kernels = (
        ("route", routed, 1.0, routing),
        ("gate_up", projected, scale, round(scale * (gate.nbytes + up.nbytes)) + x.nbytes + middle),
        ("down", summed, scale, round(scale * down.nbytes) + middle + x.nbytes),
    )
    counts = []
    for kernel, call, times, needed in kernels:
        with counted("count") as tally:
            call()
        issued: Counter[str] = Counter()
        if model:
            with counted("arithmetic") as operations:
                call()
            issued = operations.issued
        counts.append(_Count(kernel, needed, times, tally, issued))
    both = [counts[1:2], counts[2:], counts]
    rows = [_row(c[0].kernel if len(c) == 1 else "layer", name, dims, run, c) for c in both]
    return rows if model else [_without_model(row) for row in rows]


def stock(dims: Dims, triple: Triple, run: int = 2, model: bool = True) -> ExpertRow:
    """MLX's own affine_gather_qmv_fast from the wheel, unchanged, for each projection; `launches` are those of
    mlx_lm's whole block of experts behind the router's matrix."""
    counts = []
    for seed, (spec, (rows, columns)) in enumerate(zip(triple, dims.shapes(), strict=True)):
        weight = packed(formats.get(*spec), run, rows, columns, seed, mx.float16)
        of = run if (rows, columns) == (dims.hidden, dims.intermediate) else 1
        x = np.random.default_rng(seed).standard_normal((of, 1, columns)).astype(np.float16)
        tally, issued = Tally(), Counter[str]()
        report, scalars = _gather_qmv(weight, x, run, "count")
        tally.add(report, scalars)
        if model:
            issued.update(_gather_qmv(weight, x, run, "arithmetic")[0].issued)
        scale = dims.chosen / run
        activations = x.nbytes * (scale if of == run else 1) + 2 * dims.chosen * rows
        counts.append(_Count("stock", round(scale * weight.nbytes + activations), scale, tally, issued))
    name = "+".join(format_id(formats.get(*spec)) for spec in triple)
    row = _row("MLX gather_qmv", name, dims, run, counts)
    made = ExpertRow(**asdict(row) | {"launches": sum(stock_launches().values())})
    if not model:
        return _without_model(made)
    # Caches may spare it what several threadgroups read: the model gives it each byte once.
    total = {kind: round(n * _values(dims, 3)) for kind, n in made.operations.items()}
    predicted = {name: predict(total, made.needed, device).seconds for name, device in DEVICES.items()}
    return ExpertRow(**asdict(made) | {"predicted": predicted})


def stock_launches() -> Counter[str]:
    """Operation -> how many of it mlx_lm's MiniMax block makes of a token behind its router's matrix, as MLX's graph
    names them, without views, which launch nothing. Copies that MLX makes of arrays in other layouts are not seen."""
    config = json.loads((bundled.MODEL / "config.json").read_text())
    config.pop("quantization_config", None)
    block = skeleton(config).layers[0].block_sparse_moe
    nn.quantize(block, 64, 4, class_predicate=lambda path, _: path.endswith("_proj"))
    block.set_dtype(mx.bfloat16)
    x = mx.zeros((1, 1, config["hidden_size"]), mx.bfloat16)
    mx.eval(block.parameters(), x)
    return _operations(block(x)) - _operations(block.gate(x.astype(mx.float32)))


def _operations(out: mx.array) -> Counter[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), out)
        names = re.findall(r'label ?= ?"(\w+)", shape=rectangle', path.read_text())
    return Counter(name for name in names if name not in VIEWS)


@dataclass(frozen=True)
class _Count:
    """One kernel's launch: what it must move for all chosen experts, and what it did, to be taken `times` over."""

    kernel: str
    needed: int
    times: float
    tally: Tally
    issued: Mapping[str, int]


def _row(kernel: str, weights: str, dims: Dims, run: int, counts: Sequence[_Count]) -> ExpertRow:
    """Sums over launches. The third of a layer's matrices each: gate_up has two of them, down one."""
    matrices = {"gate_up": 2, "down": 1}.get(kernel, 3)
    values = _values(dims, matrices)
    moved = round(sum(c.times * c.tally.moved for c in counts))
    issued: Counter[str] = Counter()
    for c in counts:
        issued.update({kind: round(c.times * n) for kind, n in c.issued.items()})
    lines = sum(c.times * c.tally.lines for c in counts)
    return ExpertRow(
        kernel,
        weights,
        dims.name,
        dims.chosen,
        run,
        sum(c.needed for c in counts),
        moved,
        sum(c.times * c.tally.ideal_lines for c in counts) / max(1, lines),
        sum(c.tally.launches for c in counts),
        {kind: n / values for kind, n in sorted(issued.items())},
        {name: predict(issued, moved, device).seconds for name, device in DEVICES.items()},
    )


def _values(dims: Dims, matrices: int) -> int:
    """Weights in so many projections of the chosen experts."""
    return matrices * dims.hidden * dims.intermediate * dims.chosen


def _without_model(row: ExpertRow) -> ExpertRow:
    return ExpertRow(**asdict(row) | {"operations": {}, "predicted": {}})


def _gather_qmv(weight: PackedWeight, x: np.ndarray, run: int, mode: str) -> tuple[Any, list[str]]:
    """The report of one launch, and which buffers are constants."""
    codes, scales, biases = (np.array(part) for part in weight.parts)
    rows, columns = weight.rows, weight.columns

    def given(name: str, value: np.ndarray) -> Any:
        return Buffer(name, np.ascontiguousarray(value))

    def strides(a: np.ndarray) -> np.ndarray:
        return np.array([s // a.itemsize for s in a.strides], np.int64)

    out = Buffer("y", np.zeros((run, rows), np.float16), writable=True, written=False)
    which = np.arange(run, dtype=np.uint32)
    lhs = which if x.shape[0] == run else np.zeros(run, np.uint32)
    arrays = {"w": codes, "scales": scales, "biases": biases, "x": x, "lhs": lhs, "rhs": which}
    ones = {name: np.array(value, np.int32) for name, value in (("in_size", columns), ("out_size", rows))}
    one, step = np.array(1, np.int32), np.array([1], np.int64)
    about = {
        "x_ndim": one, "x_dims": np.array(x.shape, np.int32), "x_steps": strides(x), "w_ndim": one,
        "w_dims": np.array(codes.shape, np.int32), "w_steps": strides(codes), "s_steps": strides(scales),
        "b_steps": strides(biases), "ndim": one, "dims": np.array([run], np.int32), "l_steps": step, "r_steps": step,
    }  # fmt: skip
    scalars = {**ones, **about}
    _, report = run_file(
        mlx_source("quantized.h"),
        "affine_gather_qmv_fast",
        ["half", str(weight.format.group_size), str(weight.format.bits), "false"],
        [*(given(*item) for item in arrays.items()), out, *(given(*item) for item in scalars.items())],
        (32, rows // 4, run),
        (32, 2, 1),
        before=QUANTIZED,
        options=Options(mode=mode, timeout=3600.0),
    )
    return report, [*scalars, "lhs", "rhs"]
