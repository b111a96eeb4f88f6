"""Time and error of each fit of weights, beside mx.quantize: on normal weights, and on a layer's outputs.

Times are processor time of this process, so that other processes hardly count; on a GPU they are wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..quant.fit import FITS, Hessian, decode, fit, squared_error, sum_of_squares
from ..quant.spec import OURS, Spec

SPECS = (
    *(Spec(2, 64), Spec(2, 128), Spec(3, 64), Spec(3, 128), Spec(4, 64), Spec(6, 64), Spec(8, 64)),
    *(Spec(bits, 256, "lloyd") for bits in (2, 3, 4)),
    *(Spec(4, 16, "iq4_nl"), Spec(8, 32, "q8")),
)
SHAPE = (256, 1024)
ROUNDS, SEED = 3, 0
LAYER_SPECS = (
    *(Spec(2, 64), Spec(3, 128), Spec(4, 64)),
    *(Spec(2, 256, "lloyd"), Spec(3, 256, "lloyd"), Spec(4, 16, "iq4_nl")),
)
LAYER_SHAPE, TOKENS = (64, 512), 2048


@dataclass(frozen=True)
class FitCost:
    """One fit to one spec of normal weights.

    Attributes:
        error: squared error over squared length.
        nanoseconds: a weight.
        ratio: nanoseconds over those of mx.quantize, called on all weights at once, in the same round; the median. For
            modes that MLX doesn't have it is called with their bits in groups of 64.
        weighed: the same with an importance.
    """

    spec: Spec
    fit: str
    error: float
    nanoseconds: float
    ratio: float
    weighed: float

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "spec"} | self.spec.as_config()


@dataclass(frozen=True)
class LayerError:
    """Squared error over squared length of a layer's outputs, on inputs held out; see `inputs`.

    Attributes:
        plain, importance, hessian: with nothing known of the inputs, their mean squares, their second moments.
    """

    spec: Spec
    fit: str
    plain: float
    importance: float
    hessian: float

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "spec"} | self.spec.as_config()


def measure_fits(
    specs: Sequence[Spec] = SPECS, fits: Sequence[str] = FITS, shape: tuple[int, int] = SHAPE, rounds: int = ROUNDS
) -> Iterator[FitCost]:
    """Every fit of every spec, spec by spec."""
    w = mx.random.normal(shape, key=mx.random.key(SEED))
    importance = mx.exp(mx.random.normal(shape[-1:], key=mx.random.key(SEED + 1)))
    mx.eval(w, importance)
    for spec in specs:
        for name in fits:
            stored = fit(w, spec, name)  # also warms up
            times: list[tuple[float, float, float]] = []
            for _ in range(rounds):
                # The short one takes many calls to be measured as well as the long ones.
                base = sum(_seconds(partial(_plain, w, spec)) for _ in range(8)) / 8
                alone = _seconds(partial(fit, w, spec, name))
                heeding = _seconds(partial(fit, w, spec, name, importance))
                times.append((alone, alone / base, heeding / base))
            alone, ratio, weighed = (float(x) for x in np.median(times, axis=0))
            error, norm = squared_error(w, stored, spec)
            yield FitCost(spec, name, error / norm, alone / w.size * 1e9, ratio, weighed)


def measure_layers(
    specs: Sequence[Spec] = LAYER_SPECS, fits: Sequence[str] = FITS, shape: tuple[int, int] = LAYER_SHAPE
) -> Iterator[LayerError]:
    """The same for outputs, with what a calibration learns of the inputs."""
    w = mx.random.normal(shape, key=mx.random.key(SEED))
    seen, held_out = inputs(shape[1], TOKENS, SEED), inputs(shape[1], TOKENS, SEED, first=TOKENS)
    moments = seen.T @ seen / seen.shape[0]
    hessian, importance = Hessian(moments), mx.diagonal(moments)
    norm = sum_of_squares(held_out @ w.T)
    for spec in specs:
        for name in fits:
            stored = (fit(w, spec, name), fit(w, spec, name, importance), fit(w, spec, name, hessian=hessian))
            lost = [sum_of_squares(held_out @ (decode(s, spec) - w).T) / norm for s in stored]
            yield LayerError(spec, name, *lost)


def inputs(size: int, count: int, seed: int, first: int = 0) -> mx.array:
    """`count` inputs [count, size] of a made-up layer, from number `first` on, float32.

    Two thirds of the variance lie in a quarter of the directions, channels differ by a log-normal factor (0.5), and
    one in 64 is 15 times as large: the outliers that real hidden states have.
    """
    layer = np.random.default_rng(seed)
    mixing = layer.standard_normal((size // 4, size)) / np.sqrt(size // 4)
    channels = np.exp(0.5 * layer.standard_normal(size))
    channels[layer.choice(size, max(1, size // 64), replace=False)] *= 15
    draw = np.random.default_rng((seed, first))
    x = 0.8 * draw.standard_normal((count, size // 4)) @ mixing + 0.6 * draw.standard_normal((count, size))
    return mx.array((x * channels).astype(np.float32))


def lines(costs: Iterable[FitCost], layers: Iterable[LayerError]) -> Iterator[str]:
    """Both as tables, a line each as it is measured."""
    yield "fits of normal weights: squared error over squared length; time over that of mx.quantize"
    yield f"{'':14} {'fit':7} {'error':>9} {'ns/weight':>10} {'time':>7} {'with importance':>16}"
    for c in costs:
        yield f"{c.spec.short:14} {c.fit:7} {c.error:9.3g} {c.nanoseconds:10.1f} {c.ratio:6.1f}x {c.weighed:15.1f}x"
    yield ""
    yield "outputs of a layer with correlated inputs and outlier channels: squared error over squared length, held out"
    yield f"{'':14} {'fit':7} {'nothing known':>14} {'importance':>11} {'Hessian':>9}"
    for e in layers:
        yield f"{e.spec.short:14} {e.fit:7} {e.plain:14.4f} {e.importance:11.4f} {e.hessian:9.4f}"


def _plain(w: mx.array, spec: Spec) -> None:
    mx.eval(mx.quantize(w, 64 if spec.mode in OURS else spec.group_size, spec.bits))


def _seconds(work: Callable[[], object]) -> float:
    clock = time.process_time if mx.default_device() == mx.Device(mx.cpu) else time.perf_counter
    start = clock()
    work()
    return clock() - start
