"""What fused experts cost in Python: counts are exact, times only have an order."""

import os

import pytest

from mlx_rotor.bench.expert_overhead import ExpertOverhead, measure_expert_overhead
from mlx_rotor.kernels import metal


@pytest.fixture(scope="module")
def measured():
    return {row.what: row for row in measure_expert_overhead(rounds=60)}


def test_launches_and_nodes(measured):
    minimax, phimoe, matrix = measured.values()
    assert (minimax.launches, phimoe.launches, matrix.launches) == (3, 3, 1)
    assert matrix.nodes == 1, "a matrix is one launch and nothing else"
    assert minimax.nodes <= 10 < 35 < minimax.stock_nodes, "a reshape before and one behind, and the router's matrix"
    assert phimoe.nodes < phimoe.stock_nodes


def test_ratios_and_nothing_left_behind(measured):
    row = ExpertOverhead("x", microseconds=30, stock_microseconds=20, nodes=1, stock_nodes=2, launches=1)
    assert row.ratio == row.to_dict()["ratio"] == 1.5
    assert not metal.simulated() and os.environ.get("MLX_ROTOR_BACKEND") != "metal"
