"""What caches cost in Python: counts are exact, times only have an order."""

import os

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor import kernels
from mlx_rotor.bench import cache_overhead
from mlx_rotor.bench.cache_overhead import Overhead, launching, measure_cache_overhead, nodes
from mlx_rotor.cache import parse
from mlx_rotor.host import attention
from mlx_rotor.kernels import metal

SCHEMES = [parse("turbo4v2"), parse("fp8")]


@pytest.fixture(scope="module")
def measured():
    rows = [o for b in cache_overhead.BACKENDS for o in measure_cache_overhead(SCHEMES, b, 256, cycles=2)]
    return {(o.scheme, o.backend): o for o in rows}


def test_launches_of_a_token(measured):
    """Two kernels to attend; every 32 tokens one to pack a side and one for its new view, which stays lazy."""
    assert measured["turbo4v2", "reference"].launches == 0
    assert measured["turbo4v2", "metal"].launches == 2 + 4 / 32


def test_nodes_of_a_token(measured):
    row = measured["turbo4v2", "metal"]
    assert row.launches <= row.nodes < row.stock_nodes, "a launch is one operation"
    assert measured["turbo4v2", "reference"].nodes > 50


def test_python_does_no_more_for_a_node_than_with_the_stock_cache(measured):
    for scheme in ("turbo4v2", "fp8"):
        assert measured[scheme, "reference"].ratio_a_node < 1.3


def test_ratios():
    row = Overhead("s", "metal", 1, microseconds=30, stock_microseconds=10, nodes=6, stock_nodes=12, launches=2)
    assert (row.ratio, row.ratio_a_node) == (3, 6)


def test_a_median_of_each_step_of_a_cycle():
    """One slow step in three cycles is noise; a step that is slow in each is packing."""
    seconds = [1e-6, 2e-6, 9e-6] * 3
    seconds[3] = 5.0
    assert cache_overhead._microseconds(seconds, 3) == pytest.approx(4.0)


def test_nodes_are_operations():
    x = mx.ones((4,))
    mx.eval(x)
    assert nodes(x) == 0 and nodes(mx.abs(mx.exp(x))) == 2


def test_stand_ins_leave_nothing_behind(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    with pytest.raises(ValueError), launching("metal"):
        assert kernels.backend() == "metal" and metal.simulated()
        raise ValueError
    assert os.environ["MLX_ROTOR_BACKEND"] == "reference" and not metal.simulated()
    measure_cache_overhead(SCHEMES[:1], "metal", 64, cycles=1)
    assert not attention.installed() and not metal.simulated()


def test_a_stand_in_launch_needs_its_inputs():
    with launching("metal") as launches:
        made = metal._maker[0](name="x")
        x = mx.ones((4,))
        a, b = made(
            inputs=[mx.exp(x)], output_shapes=[(2,), (3,)], output_dtypes=[mx.float16, mx.uint32], grid=(1, 1, 1)
        )
        assert launches == [1] and a.shape == (2,) and b.dtype == mx.uint32
        mx.eval(x)
        assert nodes(a) == 2
        np.testing.assert_array_equal(np.array(b), 0)
