"""Attention kernels: bodies in several packed segments, sink tokens seen whatever the window, codecs without scales."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid
from kernel_cases import (
    SCHEDULES,
    TOLERANCE,
    attend_segments,
    attending,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    problem,
    running,
)
from metal_sim import SUPPORTED
from mlx_rotor import RotorError, kernels
from mlx_rotor.kernels import AttentionArgs, attention, prefill, reference

DECODE, PREFILL = 2, 9  # query rows: with two or three heads a KV head, what either kernel takes


def agree(q, segments, options=None, **how) -> list[str]:
    """Checks, and gives the names of what was launched."""
    with running(options) as simulator:
        assert attending(q, segments, **how) <= TOLERANCE[q.dtype]
    assert simulator.objections == []
    return [name.split("_")[2] for name, _ in simulator.reports]


@needs_kernels
@grid(1, lengths=[(70, 33, 130), (32, 64), (1, 31, 300), (5,) * 6], queries=[DECODE, PREFILL])
def test_lengths(lengths, queries):
    agree(*problem(length=lengths, queries=queries, group=2, kv_heads=1))


@needs_kernels
def test_codecs_dimensions_and_dtypes():
    agree(*problem(("trellis3", "trellis2"), 80, (70, 33), group=8, dtype=mx.float16))
    agree(*problem(("iso4", "turbo2"), 128, (70, 33), queries=5, dtype=mx.bfloat16))
    agree(*problem(("turbo3", "rotor3"), 256, (33, 70), queries=5, batch=2))


@needs_kernels
@pytest.mark.parametrize("queries", [DECODE, PREFILL])
def test_with_and_without_exact_tokens(queries):
    for first, recent in ((0, 0), (4, 0), (0, 20)):
        agree(*problem(length=(40, 33), first=first, recent=recent, queries=queries, group=2, kv_heads=1))


@needs_kernels
@pytest.mark.parametrize("queries", [DECODE, PREFILL])
def test_a_mask_is_read_where_the_run_is(queries):
    q, segments = problem(batch=2, queries=queries, group=2, length=(45, 32, 20), kv_heads=1)
    slots = sum(segment.length for segment in segments)
    rng = np.random.default_rng(3)
    for shape in [(slots,), (2, 1, queries, slots), (1, 2, 1, slots)]:
        agree(q, segments, mask=mx.array(rng.random(shape) < 0.6))
    agree(
        q,
        segments,
        mask=mx.array(rng.standard_normal((queries, slots)).astype(np.float16)),
        sink_logits=mx.array([0.5, -1]),
    )


@needs_kernels
@grid(2, lengths=[(130,), (45, 32, 53)], queries=[DECODE, 20], kept=[False, True])
def test_windows_and_sinks_that_stay(lengths, queries, kept):
    q, segments = problem(queries=queries, length=lengths, group=2, recent=30, kv_heads=1)
    for window in (3, 100):
        agree(q, segments, window=window, keep_first=kept)
    agree(q, segments, window=40, keep_first=kept, mask=None)
    if kept:
        q, segments = problem(queries=queries, length=lengths, group=2, first=0, recent=30, kv_heads=1)
        agree(q, segments, window=25, keep_first=kept)


@needs_kernels
@pytest.mark.parametrize("queries", [DECODE, 20])
def test_ragged_batches_keep_their_own_sinks(queries):
    q, segments = problem(batch=3, queries=queries, group=2, length=100, kv_heads=1)
    agree(q, segments, lengths=mx.array([[4, 100, 37], [2, 60, 5], [3, 0, 37]]), window=12, keep_first=True)


@needs_kernels
def test_queries_whose_own_tokens_are_packed():
    """Rows of a block that end in different segments, and chunks in pieces."""
    agree(*problem(queries=70, length=(40, 45, 25), group=1, recent=5, kv_heads=1))
    q, segments = problem(queries=23, length=(40, 33), group=2, recent=3, kv_heads=1)
    whole = agree(q, segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "PARTIAL_BYTES", 10 * 4 * 2 * 3 * 64)
        pieces = agree(q, segments, window=30, keep_first=True)
    if SUPPORTED:
        assert sorted(whole) == ["merge", "prefill", "prefill", "rotate"] and sorted(pieces) == sorted(3 * whole)


@needs_simulator
def test_a_launch_for_each_and_one_more():
    assert agree(*problem(length=(40, 33, 20), kv_heads=1)) == ["decode"] * 3 + ["merge"]
    assert agree(*problem(length=40, kv_heads=1)) == ["decode", "merge"]


@needs_simulator
@grid(1, queries=[DECODE, PREFILL], options=SCHEDULES)
def test_no_schedule_matters(queries, options):
    q, segments = problem(("trellis3", "turbo2"), 80, (300, 70), queries=queries, group=3, recent=40, kv_heads=1)
    agree(q, segments, options=options, window=200, keep_first=True)


@needs_kernels
@grid(
    1,
    case=[
        (("fp8", "fp8"), 64, mx.float32),
        (("fp8:0.25", "turbo4"), 128, mx.float16),
        (("trellis4", "fp8:3.0"), 80, mx.bfloat16),
    ],
    queries=[DECODE, PREFILL],
)
def test_codecs_without_scales(case, queries):
    pair, dim, dtype = case
    agree(*problem(pair, dim, (70, 33), queries=queries, group=2, dtype=dtype, kv_heads=1))


def test_splits_are_shared_by_length():
    assert attention.share(8, [2048]) == [8]
    assert attention.share(8, [1024, 512, 512]) == [4, 2, 2]
    assert attention.share(8, [4000, 1, 40]) == [8, 1, 1]
    assert attention.share(1, [0]) == [1]
    for lengths in ([100] * 24, [100000] + [10] * 23, [5000] * 7):
        parts = attention.share(attention.splits_for(sum(lengths)), lengths)
        assert len(parts) == len(lengths) and min(parts) >= 1 and sum(parts) <= attention.MAX_SPLITS


def test_what_no_kernel_takes_is_named():
    q, segments = problem(length=(40, 33))
    with pytest.raises(RotorError, match="25 packed segments; the kernels take up to 24"):
        attend_segments(q, [segments[0], *[segments[1]] * 25, segments[-1]], scale=1.0)
    with pytest.raises(RotorError, match="lengths go with one packed segment, not with 2"):
        attend_segments(q, segments, scale=1.0, lengths=mx.array([[4, 73, 37]]))
    other = problem(("turbo3", "turbo2"), length=40)[1][1]
    with pytest.raises(RotorError, match=r"same codecs; these have .*turbo3.*turbo4"):
        attend_segments(q, [segments[0], segments[1], other, segments[-1]], scale=1.0)


@needs_kernels
def test_the_packages_attend_takes_them(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    q, segments = problem(length=(40, 33))
    how = {"scale": 0.1, "mask": "causal", "window": 20, "keep_first": True}
    with running() as simulator:
        got = kernels.attend(q, segments, AttentionArgs(**how))
        assert len(simulator.reports) == (3 if SUPPORTED else 0)
        exact = kernels.attend(q, [segments[0], segments[-1]], AttentionArgs(**how))
    assert distance(got, reference.attend(q, segments, AttentionArgs(**how))) <= TOLERANCE[mx.float32]
    assert (
        distance(exact, reference.attend(q, [segments[0], segments[-1]], AttentionArgs(**how))) <= TOLERANCE[mx.float32]
    )


def case(queries, first=3, **how):
    return lambda: attending(*problem(length=(70, 90, 33), queries=queries, group=2, first=first, recent=20), **how)


# A step of the prefill kernel that is of sinks alone.
FEW, MANY = case(DECODE, window=60, keep_first=True), case(20, first=33, window=60, keep_first=True)
WINDOW = case(DECODE, window=60)
MASKED = case(DECODE, mask=mx.array(np.random.default_rng(5).random((DECODE, 216)) < 0.7))


@needs_simulator
def test_nothing_is_wrong_without_a_mistake():
    for run in (FEW, MANY, WINDOW, MASKED):
        assert objections(run) == []


@needs_simulator
@pytest.mark.parametrize(
    ("run", "path", "old", "new"),
    [
        (WINDOW, "attention/rows.h", "? sizes[5] : t.sinks", "? t.sinks : t.sinks"),
        (FEW, "attention/rows.h", "p < kept &&", "p + 1 < kept &&"),
        (FEW, "attention/rows.h", "sizes[4] >> 4", "sizes[4] >> 3"),
        (FEW, "attention/rows.h", "i - sinks + before + body", "i + body"),
        (FEW, "attention/rows.h", "tokens.start() - tokens.before", "tokens.start() - tokens.sinks"),
        (FEW, "attention/decode.h", "tokens.sees(int(l), tokens.before + token)", "tokens.sees(int(l), token)"),
        (MASKED, "attention/decode.h", "tokens.body_slot + token", "tokens.sinks + token"),
        (MASKED, "attention/rows.h", "i - sinks + recent_slot", "i - sinks + body"),
        (MANY, "attention/prefill.h", " || first < tokens.kept", ""),
        (MANY, "attention/prefill.h", "body.first_position = tokens.before", "body.first_position = tokens.sinks"),
        (MANY, "attention/prefill.h", "max(0, span.x - tokens.before)", "max(0, span.x)"),
    ],
)
def test_a_loose_bound_or_a_wrong_operation_is_seen(run, path, old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, old, new):
        assert objections(run)
