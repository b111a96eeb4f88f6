"""Prefill attention in the simulator against its reference: many query rows, every codec, head dimension and dtype."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import (
    SCHEDULES,
    TOLERANCE,
    attend_segments,
    barriers,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    problem,
    running,
)
from mlx_rotor import RotorError
from mlx_rotor.kernels import AttentionArgs, prefill, reference

# Every codec as K and as V, every head dimension, every dtype: pairs of them, not all triples.
CASES = [
    ("turbo4", "turbo2", 64, mx.float32),
    ("turbo3", "turbo4", 80, mx.float32),
    ("turbo2", "turbo3", 80, mx.float16),
    ("trellis4", "trellis2", 64, mx.bfloat16),
    ("trellis3", "trellis4", 80, mx.float32),
    ("trellis2", "trellis3", 112, mx.float32),
    ("trellis3", "trellis3", 96, mx.float16),
    ("trellis4", "trellis3", 128, mx.float16),
    ("trellis2", "turbo4", 256, mx.float32),
    ("turbo3", "trellis2", 256, mx.bfloat16),
    ("rotor3", "iso3", 192, mx.float16),
    ("iso4", "planar2", 112, mx.bfloat16),
    ("planar3", "rotor4", 128, mx.float32),
    ("turbo4", "trellis4", 192, mx.float32),
]


def off(q, segments, **how) -> float:
    how = {"scale": q.shape[-1] ** -0.5, "mask": "causal", **how}
    got = attend_segments(q, segments, **how)
    assert got.dtype == q.dtype
    if how.get("lengths") is None:
        segments = [segment for segment in segments if segment]
    return distance(got, reference.attend(q.astype(mx.float32), segments, AttentionArgs(**how)))


def agree(q, segments, options=None, **how):
    """Checks, with the prefill kernel, and gives its reports."""
    with running(options) as simulator:
        assert off(q, segments, **how) <= TOLERANCE[q.dtype]
    assert simulator.objections == []
    return [report for name, report in simulator.reports if "prefill" in name]


@needs_kernels
@pytest.mark.parametrize("case", thinned(CASES, 5), ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}-{c[3]}")
def test_codecs_head_dimensions_and_dtypes(case):
    agree(*problem(case[:2], case[2], 70, queries=11, dtype=case[3]))


@needs_kernels
def test_values_of_another_dimension():
    agree(*problem(("turbo4", "turbo3"), 192, 60, v_dim=128, queries=5))
    agree(*problem(("turbo2", "trellis3"), 64, 60, v_dim=96, queries=5))


@needs_kernels
@pytest.mark.parametrize("length", thinned([0, 1, 31, 32, 33, 127, 1000], [0, 33]))
def test_lengths(length):
    agree(*problem(length=length, group=10, dtype=mx.float16, kv_heads=1))
    agree(*problem(length=length, group=10, first=0, recent=33, kv_heads=1))
    if length:
        agree(*problem(length=length, group=10, first=5, recent=0, kv_heads=1))
        agree(*problem(length=length, group=10, first=0, recent=0, kv_heads=1))


@needs_kernels
@pytest.mark.parametrize(
    ("group", "queries"),
    thinned([(1, 9), (1, 32), (1, 33), (3, 3), (3, 70), (4, 3), (6, 2), (7, 5), (8, 2)], 4, spread=True),
)
def test_query_heads_and_rows(group, queries):
    agree(*problem(group=group, queries=queries, kv_heads=1 if group * queries > 200 else 2))


@needs_kernels
def test_speculative_rows_take_it_too():
    """Rows of a KV head are what counts: four rows of three heads are too many for the decode kernel."""
    assert agree(*problem(queries=4, group=3))
    assert not agree(*problem(queries=2, group=4))


@needs_kernels
def test_masks():
    q, segments = problem(batch=2, queries=9, group=2, length=45)
    slots = sum(segment.length for segment in segments)
    rng = np.random.default_rng(3)
    for shape in [(9, slots), (1, 4, 1, slots)]:
        agree(q, segments, mask=mx.array(rng.random(shape) < 0.6))
    agree(q, segments, mask=mx.array(rng.standard_normal((2, 1, 9, slots)).astype(np.float32)))
    agree(q, segments, mask=mx.array(np.where(rng.random((9, slots)) < 0.5, 0, -np.inf)).astype(mx.float16))
    with running():
        assert not np.array(attend_segments(q, segments, scale=1.0, mask=mx.zeros((9, slots), mx.bool_))).any()


@needs_kernels
def test_sink_logits():
    q, segments = problem(group=3, queries=9)
    agree(q, segments, sink_logits=mx.array([0.5, -2.0, 30.0, 0.0, 1.0, -30.0]))


@needs_kernels
@pytest.mark.parametrize("window", [1, 40, 139])
def test_windows(window):
    agree(*problem(queries=40, length=200, group=2), window=window)
    agree(*problem(queries=20, length=200, first=2, recent=0), window=window, mask=None)


@needs_kernels
def test_a_chunk_longer_than_the_exact_tokens():
    """Queries whose own tokens are packed already: rows of a block see different parts of the body."""
    agree(*problem(queries=70, length=110, group=1, recent=5))
    agree(*problem(queries=70, length=70, group=1, first=0, recent=0))


@needs_kernels
def test_ragged_batches():
    q, segments = problem(batch=3, queries=12, group=2, length=100)
    lengths = mx.array([[4, 100, 37], [4, 33, 5], [2, 0, 0]])
    agree(q, segments, lengths=lengths)
    agree(q, segments, lengths=lengths, window=30)
    agree(q, segments, lengths=lengths, mask=None, sink_logits=mx.zeros((4,)))


@needs_kernels
def test_layouts():
    """Queries with every element a step apart; the exact tokens of `problem` are transposed and cut already."""
    q, segments = problem(("turbo4", "turbo2"), 64, 50, queries=9)
    wide = mx.repeat(q, 2, axis=-1)
    agree(wide[..., ::2], segments)
    agree(mx.contiguous(q), segments)


@needs_kernels
def test_long_chunks_in_pieces(monkeypatch):
    q, segments = problem(batch=2, queries=23, length=60, group=2)
    assert len(agree(q, segments)) == 1
    monkeypatch.setattr(prefill, "PARTIAL_BYTES", 10 * 4 * q.shape[0] * q.shape[1] * 2 * 64)
    assert len(agree(q, segments)) == 3  # of 10, 10 and 3 queries
    agree(q, segments, window=25, lengths=mx.array([[4, 60, 37], [1, 10, 0]]))
    slots = sum(segment.length for segment in segments)
    for shape in [(23, slots), (1, 4, 1, slots)]:
        agree(q, segments, mask=mx.array(np.random.default_rng(0).random(shape) < 0.7))


@needs_kernels
def test_splits(monkeypatch):
    """More than the body has tiles too, and some that no query sees."""
    q, segments = problem(queries=20, length=300, group=2)
    for count in (2, 3, 16):
        monkeypatch.setattr(prefill, "splits_for", lambda *_, count=count: count)
        agree(q, segments)
    agree(q, segments, window=90)


def test_how_work_is_cut():
    body = problem(length=1, kv_heads=2)[1][1]

    def queries(count):
        return mx.zeros((1, 6, count, 64))

    assert prefill.splits_for(queries(4), body, 16) == 16
    assert prefill.splits_for(queries(320), body, 16) == 5
    assert prefill.splits_for(queries(3200), body, 16) == 1
    assert prefill.piece_for(queries(100), body, 1) == 100
    assert prefill.piece_for(queries(100000), body, 1) == prefill.PARTIAL_BYTES // (4 * 6 * 2 * 64)


@needs_simulator
@grid(1, case=[("turbo3", "trellis2", mx.float32), ("trellis3", "turbo4", mx.float16)], options=SCHEDULES)
def test_no_schedule_matters(case, options):
    *pair, dtype = case
    agree(*problem(pair, 80, 70, queries=13, group=3, recent=40, dtype=dtype), options=options)


def body_bytes(run, tokens):
    """Bytes of packed words that hold `tokens` tokens' tiles of one KV head: K's and V's."""
    tiles = -(-tokens // 32)
    return [4 * tiles * side.tiles.shape[-1] for side in (run.k, run.v)]


@needs_simulator
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_packed_words_are_loaded_once_for_a_block_of_rows(dtype):
    q, segments = problem(("turbo4", "turbo2"), 128, 160, queries=24, group=4, dtype=dtype)
    (report,) = agree(q, segments)
    blocks, heads = 3, 2
    k, v = (blocks * heads * size for size in body_bytes(segments[1], 160))
    assert (report.buffers["k_tiles"].loaded, report.buffers["v_tiles"].loaded) == (k, v)
    assert report.buffers["k_scale"].loaded == blocks * heads * 160 * 2
    # Exact tokens of float32 leave room for steps of 16 tokens: half a line of words.
    assert report.line_use(["k_tiles", "v_tiles"]) == (1.0 if dtype == mx.float16 else 0.5)


@needs_simulator
def test_a_trellis_loads_three_words_more_a_thread():
    q, segments = problem(("trellis4", "trellis3"), 128, 160, queries=24, group=4, dtype=mx.float16)
    (report,) = agree(q, segments)
    for name, size in zip(("k_tiles", "v_tiles"), body_bytes(segments[1], 160), strict=True):
        once = 3 * 2 * size
        assert once < report.buffers[name].loaded <= 2.5 * once
        assert report.buffers[name].per_group <= 1.01 * once


@needs_simulator
def test_tiles_that_no_row_sees_are_not_loaded():
    q, segments = problem(("turbo4", "turbo2"), 64, 640, queries=64, group=1, kv_heads=1, recent=0, first=0)
    one_tile = 4 * segments[1].k.tiles.shape[-1]
    (report,) = agree(q, segments, window=32)  # rows 0 to 31 see 31 tokens before their own, rows 32 to 63 too
    assert report.buffers["k_tiles"].loaded == 4 * one_tile
    (report,) = agree(q, segments)
    assert report.buffers["k_tiles"].loaded == (19 + 20) * one_tile


@needs_kernels
def test_what_it_does_not_take_is_named():
    q, segments = problem(("turbo4", "turbo2"), 512, 3, queries=9)
    with running(), pytest.raises(RotorError, match="256, not 512"):
        attend_segments(q, segments, scale=1.0)


def attending():
    q, segments = problem(("trellis3", "turbo3"), 80, 230, group=4, queries=12, recent=46, first=3, kv_heads=1)
    return max(off(q, segments, window=window) for window in (None, 46))


def attending_to_packed_ones_own():
    return off(*problem(("trellis3", "turbo3"), 80, 70, group=1, queries=40, recent=5, first=3, kv_heads=1))


def attending_masked():
    q, segments = problem(group=3, queries=5)
    return off(q, segments, mask=mx.array(np.random.default_rng(5).random((1, 6, 5, 141)) < 0.7))


ATTEND, OWN, MASKED = attending, attending_to_packed_ones_own, attending_masked


@needs_simulator
def test_nothing_is_wrong_without_a_mistake():
    for run in (ATTEND, OWN, MASKED):
        assert objections(run) == []


@needs_simulator
@pytest.mark.parametrize(("path", "call", "at"), barriers("attention/prefill.h"), ids=lambda x: str(x)[:24])
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(ATTEND)


@needs_simulator
@pytest.mark.parametrize(
    ("run", "path", "old", "new", "at"),
    [
        (ATTEND, "attention/steps.h", "u < end", "u <= end", 0),
        (ATTEND, "attention/steps.h", "u < end", "u + 1 < end", 0),
        (ATTEND, "attention/steps.h", "(part + 1) * Q::UNITS / parts", "(part * Q::UNITS + 1) / parts", 0),
        (ATTEND, "attention/steps.h", "uint(first) % MLX_ROTOR_TILE + mine", "mine", 0),
        (ATTEND, "attention/steps.h", "if (thread_index < Steps<S>::TOKENS)", "", 0),
        (ATTEND, "attention/steps.h", "token < count ? float(v", "token <= count ? float(v", 0),
        (ATTEND, "attention/steps.h", "t < Steps<T>::TOKENS", "t < Steps<T>::TOKENS + 8", 0),
        (ATTEND, "attention/steps.h", "t < Steps<T>::TOKENS", "t + 4 < Steps<T>::TOKENS", 0),
        (ATTEND, "attention/steps.h", "e < DIM", "e <= DIM", 0),
        (ATTEND, "attention/steps.h", "token < count ? row[e]", "token <= count ? row[e]", 0),
        (ATTEND, "attention/rows.h", "i < sinks ? i :", "i <= sinks ? i :", 0),
        (MASKED, "attention/rows.h", "i < sinks ? i :", "i <= sinks ? i :", 1),
        (MASKED, "attention/prefill.h", "token < source.count", "token <= source.count", 0),
        (ATTEND, "attention/prefill.h", "highest = fmax(highest, simd_shuffle_xor(highest, ushort(8)));", "", 0),
        (ATTEND, "attention/prefill.h", "sum *= keep", "", 0),
        (ATTEND, "attention/prefill.h", "o[d].thread_elements()[1] *= keep", "", 0),
        (ATTEND, "attention/prefill.h", "sum += simd_shuffle_xor(sum, ushort(1))", "", 0),
        (ATTEND, "attention/prefill.h", "if (real)", "", 0),
        (ATTEND, "attention/prefill.h", "min(first_row + MLX_ROTOR_PREFILL_ROWS, rows) - 1", "first_row + 31", 0),
        (ATTEND, "attention/prefill.h", "one_head ? int(first_row % queries) : 0", "int(first_row % queries)", 0),
        (ATTEND, "attention/prefill.h", ": int(queries) - 1", ": int(last_row % queries)", 0),
        (ATTEND, "attention/prefill.h", ">= span.x", "> span.x + 30", 0),
        (ATTEND, "attention/prefill.h", "< span.y", "< span.y - 20", 0),
        (ATTEND, "attention/prefill.h", "first < exact.count;", "first + 16 < exact.count;", 0),
        (ATTEND, "attention/prefill.h", "+ int(P::TOKENS), exact.count) - 1", ", exact.count) - 1", 0),
        (ATTEND, "attention/prefill.h", "(stop + MLX_ROTOR_TILE - 1)", "stop", 0),
        (ATTEND, "attention/prefill.h", "span.x - tokens.before) /", "span.x - tokens.before + 32) /", 0),
        (OWN, "attention/prefill.h", "span.y - tokens.before)", "span.y - tokens.before - 32)", 0),
        (ATTEND, "attention/prefill.h", "first < end;", "first + 16 < end;", 0),
        (MASKED, "attention/prefill.h", "own_row % queries", "own_row / queries", 0),
        (MASKED, "attention/prefill.h", "first_head + own_row / queries", "own_row / queries", 0),
        (ATTEND, "attention/rows.h", "own(l) - window + 1)", "own(l) - window + 40)", 0),
        (ATTEND, "attention/rows.h", "own(last) + 1", "own(last) - 30", 0),
        (ATTEND, "codec/trellis.h", "u >= back ?", "u > back ?", 0),
        (ATTEND, "codec/trellis.h", "u - back) << Layout::STRIDE", "u - back)", 0),
        (ATTEND, "codec/trellis.h", "BITS == 3 && first % 2 == 1", "false", 0),
        (ATTEND, "codec/scalar.h", "BITS == 3 && first % 2 == 1", "false", 0),
    ],
)
def test_a_loose_bound_or_a_wrong_operation_is_seen(run, path, old, new, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, old, new, at):
        assert objections(run)
