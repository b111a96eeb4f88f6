import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.bench import fits
from mlx_rotor.bench.fits import LayerError, inputs, lines, measure_fits, measure_layers
from mlx_rotor.quant.fit import relative_error
from mlx_rotor.quant.policy import Spec


@pytest.fixture(scope="module")
def costs():
    # Large enough that what a call costs whatever it does is small.
    return list(measure_fits((Spec(2, 64), Spec(4, 64)), shape=(256, 1024), rounds=3))


def test_search_takes_at_most_sixty_times_as_long_as_mx_quantize(costs):
    for cost in costs:
        assert cost.fit != "search" or 1 < cost.ratio < 60
        assert cost.fit != "search" or cost.ratio < cost.weighed < 90


def test_what_costs_more_loses_less(costs):
    assert [c.fit for c in costs] == 2 * ["fast", "search", "best"]
    for fast, search, best in (costs[:3], costs[3:]):
        assert fast.ratio < 5 < search.ratio < best.ratio
        assert fast.error > search.error > best.error
        assert search.error == pytest.approx(relative_error(search.spec.bits, 64), rel=0.02)


def test_outputs_lose_less_the_more_is_known():
    (error,) = measure_layers((Spec(2, 64),), ("search",), shape=(32, 256))
    assert error.hessian < 0.85 * error.importance < 0.5 * error.plain


def test_the_time_of_this_process_is_what_counts(monkeypatch):
    ticks = iter((1.0, 3.5))
    name = "process_time" if mx.default_device() == mx.Device(mx.cpu) else "perf_counter"
    monkeypatch.setattr(fits.time, name, lambda: next(ticks))
    assert fits._seconds(lambda: None) == 2.5


def test_inputs_are_correlated_and_have_outliers():
    x = np.array(inputs(256, 4096, 0), np.float64)
    moments = x.T @ x / len(x)
    loud = np.sort(np.diag(moments))[::-1]
    assert loud[3] > 10 * loud[4 + 8]  # 256 / 64 of them
    correlation = np.corrcoef(x.T) - np.eye(256)
    assert np.abs(correlation).mean() > 3 / np.sqrt(4096)
    assert not np.array_equal(x[:64], np.array(inputs(256, 64, 0, first=4096)))


def test_lines_and_data_say_the_same(costs):
    layer = LayerError(Spec(2, 64), "search", 0.1, 0.03, 0.02)
    text = list(lines(costs[:2], [layer]))
    assert "2b g64" in text[2] and "fast" in text[2] and f"{costs[0].ratio:.1f}x" in text[2]
    assert text[-1].split() == ["2b", "g64", "search", "0.1000", "0.0300", "0.0200"]
    assert json.loads(json.dumps(costs[0].to_dict()))["group_size"] == 64
    assert layer.to_dict() == {
        "fit": "search",
        "plain": 0.1,
        "importance": 0.03,
        "hessian": 0.02,
        "bits": 2,
        "group_size": 64,
        "mode": "affine",
    }


def test_modes_that_mlx_does_not_have_are_measured_beside_its_own():
    (cost,) = measure_fits((Spec(3, 256, "lloyd"),), ("search",), shape=(64, 512), rounds=1)
    assert cost.error == pytest.approx(relative_error(3, 256, mode="lloyd"), rel=0.05) and cost.ratio > 1
    assert list(lines([cost], []))[2].split()[:4] == ["3b", "g256", "lloyd", "search"]
    (error,) = measure_layers((Spec(2, 256, "lloyd"),), ("search",), shape=(32, 256))
    assert error.hessian < error.importance < error.plain
