"""Means of K's groups and of V's segments in the attention kernels: put back without touching the tokens."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import (
    SCHEDULES,
    TOLERANCE,
    attend_segments,
    attending,
    barriers,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    problem,
    running,
)
from metal_sim import Options
from mlx_rotor import RotorError
from mlx_rotor.kernels import AttentionArgs, attention, reference

DECODE, PREFILL = 1, 9  # query rows: with three heads a KV head, what either kernel takes
CASES = [
    (("turbo4", "turbo2"), 64, mx.float32, 64, False),
    (("trellis3", "turbo3"), 80, mx.float32, None, True),
    (("trellis4", "trellis2"), 80, mx.float16, 32, True),
    (("turbo4", "trellis3"), 128, mx.float16, 256, True),
    (("iso3", "iso3"), 128, mx.bfloat16, 96, True),
    (("turbo3", "rotor2"), 256, mx.float32, 64, True),
    (("planar4", "iso4"), 256, mx.float16, 0, True),
]


def agree(q, segments, options=None, **how) -> None:
    with running(options) as simulator:
        assert attending(q, segments, **how) <= TOLERANCE[q.dtype]
    assert simulator.objections == []


@needs_kernels
@pytest.mark.parametrize(
    ("pair", "dim", "dtype", "span", "centred"),
    thinned(CASES, 3, spread=True),
    ids=[f"{'-'.join(c[0])}-{c[1]}-{c[3]}" for c in CASES],
)
def test_codecs_dimensions_dtypes_and_spans(pair, dim, dtype, span, centred):
    given = {"dtype": dtype, "span": span, "centred": centred, "kv_heads": 1}
    agree(*problem(pair, dim, 150, queries=DECODE, **given))
    if dim < 256 or dtype == mx.float32:
        agree(*problem(pair, dim, 70, queries=PREFILL, **given))


@needs_kernels
def test_they_weigh_as_much_as_tokens():
    """Without K's means, or without V's, the result is another one."""
    q, (sinks, body, recent) = problem(length=300, span=64, centred=True)
    how = {"scale": q.shape[-1] ** -0.5}
    with running():
        whole = attend_segments(q, [sinks, body, recent], **how)
        for side in ("k", "v"):
            less = replace(body, **{side: replace(getattr(body, side), mean=None, span=0)})
            assert distance(attend_segments(q, [sinks, less, recent], **how), whole) > 0.03


@needs_kernels
@pytest.mark.parametrize("queries", [DECODE, PREFILL])
def test_a_split_of_many_groups(queries, monkeypatch):
    """More of them than a threadgroup has products of at a time, and splits that begin inside a group."""
    for splits, span in ((1, 32), (3, 96)):
        monkeypatch.setattr(attention, "splits_for", lambda _, splits=splits: splits)
        agree(*problem(length=620, span=span, centred=True, queries=queries, kv_heads=1))


@needs_kernels
@pytest.mark.parametrize("queries", [2, PREFILL])
def test_masks_windows_and_ragged_batches(queries):
    q, segments = problem(batch=2, queries=queries, group=2, length=140, span=64, centred=True, kv_heads=1)
    slots = sum(segment.length for segment in segments)
    rng = np.random.default_rng(3)
    agree(q, segments, mask=mx.array(rng.random((2, 1, queries, slots)) < 0.6))
    agree(
        q,
        segments,
        mask=mx.array(rng.standard_normal((queries, slots)).astype(np.float32)),
        sink_logits=mx.array([0.5, -1]),
    )
    agree(q, segments, window=90)
    agree(q, segments, lengths=mx.array([[4, 140, 37], [2, 33, 0]]), window=50)


@needs_kernels
@pytest.mark.parametrize("queries", [DECODE, PREFILL])
def test_packed_runs_have_means_of_their_own(queries):
    q, segments = problem(length=(70, 33, 130), span=32, centred=True, queries=queries, kv_heads=1)
    agree(q, segments)
    bare = problem(length=70, kv_heads=1)[1][1]
    agree(q, [segments[0], bare, *segments[2:]])
    if queries == DECODE:  # more segments than MLX passes ends of in constant memory
        agree(*problem(length=(32,) * 9, span=0, centred=True, queries=queries, kv_heads=1))


@needs_simulator
def test_a_mean_that_runs_share_is_read_once():
    q, (sinks, first, second, recent) = problem(length=(70, 33), span=32, centred=True, kv_heads=1)
    segments = [sinks, first, replace(second, v=replace(second.v, mean=first.v.mean)), recent]
    agree(q, segments)
    with running(Options(mode="count")) as simulator:
        attend_segments(q, segments, scale=1.0)
    rows = q.shape[1] * q.shape[2]
    assert simulator.reports[-1][1].buffers["mean"].loaded == rows * q.shape[3] * 2


@needs_simulator
@grid(1, queries=[DECODE, PREFILL], options=SCHEDULES)
def test_no_schedule_matters(queries, options, monkeypatch):
    monkeypatch.setattr(attention, "splits_for", lambda _: 1)
    agree(*problem(("trellis3", "iso2"), 80, 330, queries=queries, span=32, centred=True, kv_heads=1), options=options)


@needs_kernels
def test_means_that_do_not_fit_are_named():
    q, (sinks, body, recent) = problem(length=100, span=64, centred=True)

    def attend(**sides):
        with running():
            attend_segments(q, [sinks, replace(body, **sides), recent], scale=1.0)

    with pytest.raises(RotorError, match="multiples of 32"):
        attend(k=replace(body.k, span=48))
    with pytest.raises(RotorError, match=r"at least 2, 64"):
        attend(k=replace(body.k, mean=body.k.mean[:, :, :1]))
    with pytest.raises(RotorError, match="float32"):
        attend(k=replace(body.k, mean=body.k.mean.astype(mx.float32)))
    with pytest.raises(RotorError, match="one mean for all tokens"):
        attend(v=replace(body.v, mean=body.k.mean, span=64))


def case(splits, **changes):
    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "splits_for", lambda _: splits)
            return attending(*problem(("trellis3", "turbo2"), 80, first=3, recent=20, centred=True, **changes))

    return run


# Groups of two tiles, more than a threadgroup has at a time; splits of four tiles, groups of three.
ATTEND, CHUNK = case(1, length=(560, 40), span=64, group=2, queries=2), case(3, length=330, span=96, queries=12)


@needs_simulator
def test_nothing_is_wrong_without_a_mistake():
    for run in (ATTEND, CHUNK):
        assert objections(run) == []


@needs_simulator
@pytest.mark.parametrize(("path", "call", "at"), barriers("attention/means.h"), ids=lambda x: str(x)[:24])
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(ATTEND)


@needs_simulator
@pytest.mark.parametrize(
    ("run", "path", "old", "new"),
    [
        (ATTEND, "attention/means.h", "group <= last", "group < last"),
        (ATTEND, "attention/means.h", "sum = p < DIM ?", "sum = true ?"),
        (ATTEND, "attention/means.h", "32 / Q::FIELDS * i", "i"),
        (ATTEND, "attention/decode.h", "(MLX_ROTOR_GROUPS + 1) * ROWS", "(MLX_ROTOR_GROUPS - 1) * ROWS"),
        (ATTEND, "attention/decode.h", "(head * groups + first_group)", "(head * groups)"),
        (ATTEND, "attention/merge.h", "lane < end", "lane <= end"),
        (ATTEND, "attention/merge.h", "begin = end;", ""),
        (ATTEND, "attention/merge.h", "long(row / group_rows) * segments", "long(row / group_rows)"),
        (ATTEND, "attention/merge.h", "g * DV + VQ", "VQ"),
        (CHUNK, "attention/steps.h", "first == first_token || ", ""),
        (CHUNK, "attention/steps.h", " || uint(first) % (SPAN * MLX_ROTOR_TILE) == 0", ""),
        (CHUNK, "attention/steps.h", "p < KEY_DIM", "p <= KEY_DIM"),
        (CHUNK, "attention/prefill.h", "product += simd_shuffle_xor(product, ushort(8));", ""),
        (CHUNK, "attention/prefill.h", "mean[8 * k + column + 1]", "mean[8 * k + column]"),
        (CHUNK, "attention/prefill.h", "k_mean + head * groups * P::KEY_DIM", "k_mean"),
    ],
)
def test_a_loose_bound_or_a_wrong_operation_is_seen(run, path, old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, old, new):
        assert objections(run)


def test_the_reference_adds_them_to_the_tokens():
    """K's to each group of tokens, V's to all, in the codec's basis."""
    q, (_, body, _) = problem(length=130, span=64, centred=True, first=0, recent=0)
    k, v = (np.array(side.codec.decode_rotated(side.packed(0, 130))) for side in (body.k, body.v))
    for token in range(130):
        k[:, :, token] += np.array(body.k.mean)[:, :, token // 64]
        v[:, :, token] += np.array(body.v.mean)[:, :, 0]
    k, v = (side.codec.unrotate(mx.array(x)) for side, x in ((body.k, k), (body.v, v)))
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2)
    assert mx.abs(reference.attend(q, [body], AttentionArgs(scale=0.2)) - want).max() < 1e-5
    for side, x in ((body.k, k), (body.v, v)):
        assert mx.allclose(reference.dequantize(side, 33, 100, mx.float32), x[:, :, 33:100], atol=1e-5)
