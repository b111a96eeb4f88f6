"""A compressed cache's cost in Python: time to build one layer's graph for one token, beside the stock cache's.

Nothing is evaluated inside the timed part. On a Mac, Python builds the next token's graph while the GPU computes this
one, so the time here has to fit into that. A stand-in makes kernels that only return lazy outputs: the launch code is
the Mac's own, but MLX's call behind it, some microseconds a launch, is not in the figure.
"""

from __future__ import annotations

import gc
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import Scheme
from ..host import attention
from ..host.attachment import layer_cache
from ..kernels import metal

HEADS, KV_HEADS, DIM = 8, 2, 128
BACKENDS = ("reference", "metal")


@dataclass(frozen=True)
class Overhead:
    """One scheme on one backend, at `tokens` tokens. Per layer and token, over whole cycles of packing.

    Attributes:
        microseconds, stock_microseconds: mean over a cycle of the median at each of its steps.
        nodes, stock_nodes: operations in the graph of a step.
        launches: of our kernels in a step, those of views included that nothing evaluates; 0 on the reference backend.
    """

    scheme: str
    backend: str
    tokens: int
    microseconds: float
    stock_microseconds: float
    nodes: float
    stock_nodes: float
    launches: float

    @property
    def ratio(self) -> float:
        return self.microseconds / self.stock_microseconds

    @property
    def ratio_a_node(self) -> float:
        """The same for each operation of the graph: whether Python does more than the graph needs."""
        return self.ratio * self.stock_nodes / self.nodes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "ratio_a_node": self.ratio_a_node}


@contextmanager
def launching(backend: str) -> Iterator[list[int]]:
    """`backend` chosen and, for metal, kernels whose outputs are lazy zeros; yields [launches so far]."""
    launches = [0]

    @cache
    def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        array = mx.zeros(shape, dtype)
        mx.eval(array)
        return array

    def make(**_: Any) -> Callable[..., list[mx.array]]:
        def launch(*, inputs: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            launches[0] += 1
            arrays = [blank(tuple(shape), dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            return list(mx.depends(arrays, inputs))  # one operation that needs the inputs, as a launch is

        return launch

    before = os.environ.get("MLX_ROTOR_BACKEND")
    os.environ["MLX_ROTOR_BACKEND"] = backend
    metal.use_maker(make if backend == "metal" else None)
    try:
        yield launches
    finally:
        metal.use_maker(None)
        os.environ.pop("MLX_ROTOR_BACKEND")
        if before is not None:
            os.environ["MLX_ROTOR_BACKEND"] = before


def nodes(out: mx.array) -> int:
    """Operations behind a lazy array."""
    text = io.StringIO()
    mx.export_to_dot(text, out)
    return text.getvalue().count("shape=rectangle")


class _Lane:
    """A cache and what its steps cost.

    Args:
        attended: evaluate attention between steps, too. With stand-ins for kernels only tokens are stored, stock's too:
            what runs between steps would otherwise leave one lane's caches of the CPU colder than another's.
    """

    def __init__(self, scheme: Scheme | None, tokens: int, rows: dict[str, mx.array], attended: bool) -> None:
        self.cache, self.rows, self.attended = layer_cache(scheme), rows, attended
        self.seconds: list[float] = []
        self.nodes: list[int] = []
        past = mx.random.normal((1, KV_HEADS, tokens, DIM), key=mx.random.key(1)).astype(rows["k"].dtype)
        self._settle(self._attend(past, past))

    def _attend(self, k: mx.array, v: mx.array) -> mx.array:
        k, v = self.cache.update_and_fetch(k, v)
        return mx.fast.scaled_dot_product_attention(self.rows["q"], k, v, scale=DIM**-0.5, mask=None)

    def _settle(self, out: mx.array) -> None:
        mx.eval(self.cache.state, *([out] if self.attended else []))

    def step(self, count: bool) -> None:
        k, v = self.rows["k"], self.rows["v"]
        start = time.perf_counter()
        out = self._attend(k, v)
        self.seconds.append(time.perf_counter() - start)
        if count:
            self.nodes.append(nodes(out))
        self._settle(out)


def measure_cache_overhead(schemes: Sequence[Scheme], backend: str, tokens: int, cycles: int = 8) -> list[Overhead]:
    """Each scheme's overhead on `backend`, with the stock cache's from the same run. Times are this machine's."""
    keys = [mx.random.key(i) for i in range(3)]
    rows = {
        "q": mx.random.normal((1, HEADS, 1, DIM), key=keys[0]).astype(mx.float16),
        "k": mx.random.normal((1, KV_HEADS, 1, DIM), key=keys[1]).astype(mx.float16),
        "v": mx.random.normal((1, KV_HEADS, 1, DIM), key=keys[2]).astype(mx.float16),
    }
    mx.eval(rows)
    installed = attention.installed()
    attention.install()
    try:
        with launching(backend) as launches:
            lanes = [_Lane(s, tokens, rows, attended=backend == "reference") for s in (None, *schemes)]
            cycle = max([s.block for s in schemes], default=1)
            for lane in lanes:
                for _ in range(cycle):
                    lane.step(count=False)
                lane.seconds.clear()
            launched = _run(lanes, cycle, cycles, launches)
    finally:
        if not installed:
            attention.uninstall()
    stock = lanes[0]
    return [
        Overhead(
            scheme.name,
            backend,
            tokens,
            _microseconds(lane.seconds, cycle),
            _microseconds(stock.seconds, cycle),
            float(np.mean(lane.nodes)),
            float(np.mean(stock.nodes)),
            calls,
        )
        for scheme, lane, calls in zip(schemes, lanes[1:], launched[1:], strict=True)
    ]


def _run(lanes: list[_Lane], cycle: int, cycles: int, launches: list[int]) -> list[float]:
    """Takes the steps, a cycle of each lane in turn, so that noise meets all alike. Returns launches a step."""
    total = [0] * len(lanes)
    gc.collect()
    gc.disable()
    try:
        for i in range(cycles):
            for n, lane in enumerate(lanes):
                before = launches[0]
                for _ in range(cycle):
                    lane.step(count=i == 0)
                total[n] += launches[0] - before
    finally:
        gc.enable()
    return [t / (cycle * cycles) for t in total]


def _microseconds(seconds: list[float], cycle: int) -> float:
    return 1e6 * float(np.median(np.array(seconds).reshape(-1, cycle), axis=0).mean())
