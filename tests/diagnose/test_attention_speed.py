"""Timing of attention: what is measured, what is skipped, on the backend this machine has."""

import mlx.core as mx
import pytest

from mlx_rotor import kernels
from mlx_rotor.diagnose import attention_speed, timing
from mlx_rotor.diagnose.attention_speed import DIM, KV_HEADS, cells, measure_attention


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(attention_speed, "CHAIN", 2)
    monkeypatch.setattr(timing, "REPEATS", 3)
    monkeypatch.setattr(attention_speed, "WARM_UP", 1)


def test_both_attend_to_as_many_tokens(monkeypatch):
    ours, stock = [], []
    attend, theirs = kernels.attend, mx.fast.scaled_dot_product_attention

    def seen(q, segments, args):
        ours.append((q.shape, q.dtype, [segment.length for segment in segments]))
        return attend(q, segments, args)

    def stock_seen(q, k, v, **how):
        stock.append((q.shape, k.shape, v.shape, k.dtype))
        return theirs(q, k, v, **how)

    monkeypatch.setattr(kernels, "attend", seen)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", stock_seen)
    line = measure_attention("turbo4v2", 16, 300)
    assert line.skipped == "" and line.fp16_ms > 0 and line.ours_ms > 0
    assert line.ratio == line.fp16_ms / line.ours_ms == line.to_dict()["ratio"]
    query = (1, 16, 1, DIM)
    assert set(stock) == {(query, (1, KV_HEADS, 300, DIM), (1, KV_HEADS, 300, DIM), mx.float16)}
    assert all(call == (query, mx.float16, [4, 168, 128]) for call in ours)
    assert len(ours) == len(stock) == 2 * (1 + 3), "one warm-up and three repeats of a chain of two"


def test_a_length_that_does_not_fit_is_skipped_and_says_what_it_needs():
    line = measure_attention("turbo4v2", 32, 128 << 10, room=10**9)
    assert line.fp16_ms is line.ours_ms is line.ratio is None
    assert line.skipped == "needs 1.8 GB, 1.0 GB free"
    assert measure_attention("turbo4v2", 32, 200, room=10**7).skipped == ""


def test_a_kernel_that_does_not_run_is_a_line_that_says_so(monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernels, "attend", broken)
    line = measure_attention("trellis3", 32, 200)
    assert line.skipped == "RuntimeError: no such kernel" and line.ratio is None


def test_small_sizes_read_more_than_a_cache_holds(monkeypatch):
    made = []
    exact = attention_speed._exact
    monkeypatch.setattr(attention_speed, "_exact", lambda tokens: made.append(tokens) or exact(tokens))
    monkeypatch.setattr(attention_speed, "COLD_BYTES", 4 * KV_HEADS * DIM * 200)
    measure_attention("turbo4v2", 8, 200)
    assert made.count(200) == 2
    made.clear()
    measure_attention("turbo4v2", 8, 200, room=2 * 4 * KV_HEADS * DIM * 200 * 5 // 3 + 1)
    assert made.count(200) == 1, "one copy where two do not fit"


def test_every_line_that_is_promised():
    lines = cells()
    assert {tokens for *_, tokens in lines} == {1024 << i for i in range(8)}
    assert {(scheme, heads) for scheme, heads, _ in lines} == {
        (s, h) for s in ("turbo4v2", "trellis3") for h in (32, 48)
    }
    assert timing.memory() > 0
