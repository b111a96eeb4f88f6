"""Timing of experts: what is measured, that both compute the same, what is skipped, and what is remembered of it."""

import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.diagnose import expert_speed, timing
from mlx_rotor.diagnose.expert_speed import Dims, ExpertTiming, cells, measure_experts, record, stock_layer
from mlx_rotor.experts.fused import FusedExperts
from mlx_rotor.kernels import check_results

SMALL = Dims("small", 256, 512, 6, 2)
AFFINE = (("affine", 2, 64), ("affine", 2, 64), ("affine", 3, 64))
LLOYD = (("lloyd", 2, 256),) * 3
KEY = "affine2:64+affine2:64+affine3:64 256x512"


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(expert_speed, "CHAIN", 2)
    monkeypatch.setattr(timing, "REPEATS", 3)
    monkeypatch.setattr(expert_speed, "WARM_UP", 1)
    check_results.forget()
    yield
    check_results.forget()


@pytest.mark.parametrize("triple", [AFFINE, LLOYD])
def test_both_compute_the_same(triple):
    weights = [
        expert_speed._packed(spec, SMALL.experts, *shape) for spec, shape in zip(triple, SMALL.shapes(), strict=True)
    ]
    x = mx.random.normal((3, SMALL.hidden))
    indices = mx.array([[0, 5], [2, 1], [4, 4]], mx.uint32)
    scores = mx.array([[0.25, 0.75]] * 3)
    stock = np.array(stock_layer(SMALL, weights)(x, indices, scores))
    fused = np.array(FusedExperts(*weights, activation="swiglu").weighted(x, indices, scores))
    assert stock.shape == (3, SMALL.hidden) and np.abs(stock).max() > 0
    assert np.allclose(stock, fused, rtol=1e-3, atol=1e-4 * np.abs(stock).max())


def test_every_number_of_rows_is_timed_with_medians(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 1e9)
    timings = measure_experts(SMALL, AFFINE)
    assert [t.rows for t in timings] == [1, 2, 4, 8]
    for t in timings:
        assert t.key == KEY and t.skipped == "" and t.stock_ms > 0 and t.fused_ms > 0
        assert t.ratio == t.stock_ms / t.fused_ms == t.to_dict()["ratio"]


def test_the_time_is_the_median_of_one_layer(monkeypatch):
    readings = iter([0, 9, 0, 1, 0, 5, 0, 3])  # the warm-up, then three
    monkeypatch.setattr(expert_speed, "repeated", lambda once: [once() for _ in range(3)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    assert expert_speed._milliseconds(SMALL, 1, lambda x, indices, scores: x + 1) == 1e3 * 3 / 2


def test_what_does_not_fit_is_skipped_and_says_what_it_needs():
    large = Dims("large", 4096, 4096, 300, 2)
    timings = measure_experts(large, AFFINE, room=2 * 10**9)
    assert [t.skipped for t in timings] == ["needs 8.9 GB, 2.0 GB free"] * 4
    assert all(t.key == KEY.replace("256x512", "4096x4096") and t.ratio is None for t in timings)


def test_a_kernel_that_does_not_run_is_a_timing_that_says_so(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(FusedExperts, "weighted", broken)
    assert {t.skipped for t in measure_experts(SMALL, AFFINE)} == {"RuntimeError: no such kernel"}


def test_auto_is_told_where_stock_won():
    other = KEY.replace("512", "768")
    record([
        ExpertTiming("m", KEY, 1, 2.0, 1.0),
        ExpertTiming("m", KEY, 2, 1.0, 1.02),
        ExpertTiming("m", KEY, 4, 1.0, 1.5),
        ExpertTiming("m", KEY, 8, skipped="no room"),
        ExpertTiming("m", other, 1, 1.0, 4.0),
    ])  # fmt: skip
    assert [check_results.prefers_stock(KEY, rows) is not None for rows in range(1, 10)] == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert check_results.prefers_stock(KEY, 4) == "fused took 1.500 ms and stock 1.000 for 4 rows on this machine"
    assert "for 1 row on" in check_results.prefers_stock(other, 1)
    record([ExpertTiming("m", KEY, 4, 1.0, 0.5), ExpertTiming("m", KEY, 8, skipped="no room")])
    assert check_results.prefers_stock(KEY, 4) is None and check_results.prefers_stock(other, 1)


def test_every_cell_that_is_promised():
    found = {(model.name, triple[0][0]) for model, triple in cells()}
    names = {"MiniMax-M2.7", "Qwen3-30B-A3B", "gpt-oss-20b", "Mixtral-8x7B"}
    assert {name for name, _ in found} == names
    assert {(name, "affine") for name in names} <= found and ("MiniMax-M2.7", "lloyd") in found
    assert ("gpt-oss-20b", "lloyd") not in found, "2880 is no multiple of 256"
