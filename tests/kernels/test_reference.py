"""The attention reference against NumPy's softmax over concatenated keys, and against MLX's own attention."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from grids import grid
from mlx_rotor import codec
from mlx_rotor.errors import RotorError
from mlx_rotor.kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, reference
from mlx_rotor.kernels.packing import encode_reference


def segments(lengths, kv_heads, d, dv, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda n, w: mx.array(rng.standard_normal((2, kv_heads, n, w)).astype(np.float32))  # noqa: E731
    return [ExactSegment(make(n, d), make(n, dv)) for n in lengths]


def expected(q, parts, scale, seen=None, add=None, sink_logits=None):
    """Float64 NumPy attention; seen: bool or None, add: additive mask or None, both [.., L, S]."""
    q = np.array(q, np.float64)
    k, v = (np.concatenate([np.array(getattr(p, s), np.float64) for p in parts], 2) for s in ("k", "v"))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    if add is not None:
        scores = scores + add
    if sink_logits is not None:
        column = np.broadcast_to(np.array(sink_logits, np.float64)[None, :, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, column], -1)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return weights[..., : k.shape[2]] @ v


@pytest.fixture(params=[None, 7], ids=["one tile", "tiles of 7"])
def tile(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reference, "MIN_TILE", request.param)
        monkeypatch.setattr(reference, "MAX_TILE", request.param)


@grid(2, lengths=[[1], [4, 33, 9], [20, 20], [0, 5, 0]], of=[(4, 4), (6, 2), (7, 1)], rows=[1, 5])
def test_causal(tile, lengths, of, rows):
    heads, kv_heads = of
    parts, total = segments(lengths, kv_heads, 32, 16), sum(lengths)
    rows = min(rows, total)
    q = mx.array(np.random.default_rng(1).standard_normal((2, heads, rows, 32)).astype(np.float32))
    seen = np.arange(total - rows, total)[:, None] >= np.arange(total)[None]
    out = reference.attend(q, parts, AttentionArgs(scale=0.2, mask="causal" if rows > 1 else None))
    assert out.shape == (2, heads, rows, 16)
    assert np.allclose(np.array(out), expected(q, parts, 0.2, seen), atol=2e-5)


def test_array_masks_and_sinks(tile):
    parts = segments([3, 30, 11], 2, 32, 32)
    rng = np.random.default_rng(2)
    q = mx.array(rng.standard_normal((2, 6, 4, 32)).astype(np.float32))
    seen = rng.random((2, 1, 4, 44)) < 0.6
    add = rng.standard_normal((4, 44)).astype(np.float32)
    sink_logits = mx.array(rng.standard_normal(6).astype(np.float32))
    for kwargs, truth in (
        ({"mask": mx.array(seen)}, {"seen": seen}),
        ({"mask": mx.array(add)}, {"add": add}),
        ({"sink_logits": sink_logits}, {"sink_logits": sink_logits}),
        ({"mask": mx.array(seen), "sink_logits": sink_logits}, {"seen": seen, "sink_logits": sink_logits}),
    ):
        out = reference.attend(q, parts, AttentionArgs(scale=0.3, **kwargs))
        assert np.allclose(np.array(out), expected(q, parts, 0.3, **truth), atol=2e-5), truth.keys()


def test_agrees_with_mlx():
    parts = segments([4, 60, 36], 2, 64, 64)
    q = mx.random.normal((2, 8, 5, 64))
    k, v = (mx.concatenate([getattr(p, s) for p in parts], 2) for s in ("k", "v"))
    sink_logits = mx.random.normal((8,))
    for mask, logits in (("causal", None), (None, None), ("causal", sink_logits)):
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask, sinks=logits)
        ours = reference.attend(q, parts, AttentionArgs(scale=0.1, mask=mask, sink_logits=logits))
        assert mx.allclose(ours, theirs, atol=1e-5)


def test_rows_and_tiles_that_see_nothing(tile):
    parts = segments([40], 2, 32, 32)
    q = mx.random.normal((2, 2, 3, 32))
    seen = np.zeros((3, 40), bool)
    seen[1, 30:] = True
    out = np.array(reference.attend(q, parts, AttentionArgs(scale=1.0, mask=mx.array(seen))))
    assert np.array_equal(out[:, :, [0, 2]], np.zeros_like(out[:, :, [0, 2]]))
    assert np.allclose(out[:, :, 1], expected(q, parts, 1.0, seen)[:, :, 1], atol=2e-5)


def test_dtype_is_the_queries():
    parts = segments([10], 2, 32, 32)
    assert reference.attend(mx.ones((2, 2, 1, 32), mx.bfloat16), parts, AttentionArgs(scale=1.0)).dtype == mx.bfloat16


def packed_runs(lengths, kv_heads, d, name="turbo4", seed=0):
    """Sinks, a packed body and recent tokens, and what attention of them must see: the body decoded."""
    sink, middle, recent = segments(lengths, kv_heads, d, d, seed)
    c = codec.get(name, d)
    sides = [PackedSide(c, *encode_reference(c, x)) for x in (middle.k, middle.v)]
    shown = ExactSegment(*(c.decode(side.packed(0, lengths[1])) for side in sides))
    return [sink, PackedSegment(lengths[1], *sides), recent], [sink, shown, recent]


def visible(slots, lengths, rows, causal, window, kept=False):
    """Which slots the queries of each batch row see, one by one from the definition: bool [B, 1, rows, sum(slots)]."""
    seen = np.zeros((len(lengths), 1, rows, sum(slots)), bool)
    for b, held in enumerate(lengths):
        for row in range(rows):
            query, position, slot = sum(held) - rows + row, 0, 0
            for segment, size in enumerate(slots):
                for i in range(size):
                    if i < held[segment] and query >= 0:
                        near = window is None or position > query - window or (kept and segment == 0)
                        seen[b, 0, row, slot + i] = near and (position <= query or not causal)
                        position += 1
                slot += size
    return seen


@grid(2, window=[1, 4, 20, 44, 1000], mask=[None, "causal", "bool", "add"], rows=[1, 2, 5])
def test_windows(tile, window, mask, rows):
    slots = [3, 30, 11]
    stored, parts = packed_runs(slots, 2, 64)
    rng = np.random.default_rng(3)
    q = mx.array(rng.standard_normal((2, 6, rows, 64)).astype(np.float32))
    seen = visible(slots, [slots] * 2, rows, mask == "causal", window)
    given, add = mask, None
    if mask == "bool":
        given = rng.random((2, 1, rows, 44)) < 0.7
        seen, given = seen & given, mx.array(given)
    elif mask == "add":
        add = rng.standard_normal((rows, 44)).astype(np.float32)
        given = mx.array(add)
    out = reference.attend(q, stored, AttentionArgs(scale=0.3, mask=given, window=window))
    assert np.allclose(np.array(out), expected(q, parts, 0.3, seen, add), atol=3e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", [[[3, 30, 11], [3, 30, 11]], [[3, 30, 2], [1, 0, 0]], [[2, 9, 4], [3, 0, 11]]])
def test_ragged_rows(tile, lengths, window, rows):
    slots = [3, 30, 11]
    stored, parts = packed_runs(slots, 2, 64)
    rng = np.random.default_rng(4)
    q = mx.array(rng.standard_normal((2, 6, rows, 64)).astype(np.float32))
    sink_logits = mx.array(rng.standard_normal(6).astype(np.float32))
    seen = visible(slots, lengths, rows, True, window)
    also = rng.random((2, 1, rows, 44)) < 0.8
    for kwargs, truth in (
        ({"mask": "causal"}, {"seen": seen}),
        ({"mask": "causal", "sink_logits": sink_logits}, {"seen": seen, "sink_logits": sink_logits}),
        ({"mask": mx.array(also)}, {"seen": also & visible(slots, lengths, rows, False, window)}),
        ({"mask": None}, {"seen": visible(slots, lengths, rows, False, window)}),
    ):
        out = reference.attend(
            q, stored, AttentionArgs(scale=0.3, window=window, lengths=mx.array(lengths, mx.int32), **kwargs)
        )
        assert np.allclose(np.array(out), expected(q, parts, 0.3, **truth), atol=3e-5), truth.keys()


@pytest.mark.parametrize("window", [1, 12, 30])
@pytest.mark.parametrize("rows", [1, 5])
def test_sink_tokens_may_stay_visible(tile, rows, window):
    slots = [9, 30, 11]
    stored, parts = packed_runs(slots, 2, 64)
    q = mx.array(np.random.default_rng(5).standard_normal((2, 6, rows, 64)).astype(np.float32))
    how = {"scale": 0.3, "mask": "causal", "window": window, "keep_first": True}
    for segments, shown in ((stored, parts), ([stored[0], stored[2]], [parts[0], parts[2]])):
        held = [segment.length for segment in segments]
        seen = visible(held, [held] * 2, rows, True, window, kept=True)
        assert np.allclose(
            np.array(reference.attend(q, segments, AttentionArgs(**how))), expected(q, shown, 0.3, seen), atol=3e-5
        )
    for segments, shown in ((stored[1:], parts[1:]), ([stored[2]], [parts[2]])):  # no sink tokens in front
        held = [segment.length for segment in segments]
        seen = visible(held, [held] * 2, rows, True, window)
        assert np.allclose(
            np.array(reference.attend(q, segments, AttentionArgs(**how))), expected(q, shown, 0.3, seen), atol=3e-5
        )
    lengths = [[9, 30, 11], [2, 17, 4]]
    out = reference.attend(q, stored, AttentionArgs(lengths=mx.array(lengths, mx.int32), **how))
    seen = visible(slots, lengths, rows, True, window, kept=True)
    assert np.allclose(np.array(out), expected(q, parts, 0.3, seen), atol=3e-5)


def test_several_packed_runs(tile):
    slots = [3, 30, 1, 20, 11]
    stored, parts = packed_runs([3, 30, 11], 2, 64)
    others, shown = zip(*(packed_runs([1, n, 1], 2, 64, seed=n) for n in (1, 20)), strict=True)
    stored = [*stored[:2], *(segments[1] for segments in others), stored[2]]
    parts = [*parts[:2], *(segments[1] for segments in shown), parts[2]]
    q = mx.array(np.random.default_rng(6).standard_normal((2, 6, 3, 64)).astype(np.float32))
    for window in (None, 25):
        seen = visible(slots, [slots] * 2, 3, True, window)
        out = reference.attend(q, stored, AttentionArgs(scale=0.3, mask="causal", window=window))
        assert np.allclose(np.array(out), expected(q, parts, 0.3, seen), atol=3e-5)
    with pytest.raises(RotorError, match="one packed segment, not with 3"):
        reference.attend(q, stored, AttentionArgs(scale=0.3, lengths=mx.zeros((2, 3), mx.int32)))


def test_slots_that_a_row_does_not_hold_may_hold_anything():
    slots, lengths = [3, 30, 11], [[3, 30, 7], [2, 0, 0]]
    stored, parts = packed_runs(slots, 2, 64)
    q, held = mx.random.normal((2, 4, 2, 64)), mx.array(lengths, mx.int32)
    expected = reference.attend(q, stored, AttentionArgs(scale=0.3, mask="causal", lengths=held))
    rubbish = []
    for segment, part, column in zip(stored, parts, range(3), strict=True):
        behind = (mx.arange(part.length) >= held[:, column][:, None])[:, None]
        if isinstance(segment, ExactSegment):
            rubbish.append(ExactSegment(*(mx.where(behind[..., None], mx.nan, x) for x in (segment.k, segment.v))))
        else:
            behind = mx.pad(behind, [(0, 0), (0, 0), (0, 2)], constant_values=True)
            sides = [PackedSide(s.codec, s.tiles, mx.where(behind, mx.nan, s.scale)) for s in (segment.k, segment.v)]
            rubbish.append(
                PackedSegment(segment.length, *(replace(s, scale=s.scale.astype(mx.float16)) for s in sides))
            )
    out = reference.attend(q, rubbish, AttentionArgs(scale=0.3, mask="causal", lengths=held))
    assert mx.array_equal(out, expected)


def test_a_ragged_batch_is_its_rows_one_by_one():
    slots, lengths = [3, 30, 11], [[3, 30, 7], [2, 0, 0]]
    stored, parts = packed_runs(slots, 2, 64)
    q = mx.random.normal((2, 4, 2, 64))
    out = reference.attend(q, stored, AttentionArgs(scale=0.3, mask="causal", lengths=mx.array(lengths, mx.int32)))
    for b, held in enumerate(lengths):
        own = [ExactSegment(p.k[b : b + 1, :, :n], p.v[b : b + 1, :, :n]) for p, n in zip(parts, held, strict=True)]
        alone = reference.attend(q[b : b + 1], own, AttentionArgs(scale=0.3, mask="causal"))
        assert mx.allclose(out[b : b + 1], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("present", "columns"),
    [([0, 1], [0, 1]), ([1, 2], [1, 2]), ([0, 2], [0, 2]), ([1], [1]), ([0], [0]), ([2], [2])],
)
def test_lengths_find_the_runs_that_are_there(present, columns):
    slots = [4, 20, 8]
    stored, parts = packed_runs(slots, 2, 64)
    held = [[n if i in columns else 0 for i, n in enumerate(row)] for row in ([2, 11, 5], [4, 20, 8])]
    q = mx.random.normal((2, 4, 1, 64))
    out = reference.attend(q, [stored[i] for i in present], AttentionArgs(scale=0.3, lengths=mx.array(held, mx.int32)))
    own = [slots[i] for i in present]
    seen = visible(own, [[row[i] for i in present] for row in held], 1, True, None)
    assert np.allclose(np.array(out), expected(q, [parts[i] for i in present], 0.3, seen), atol=3e-5)


@pytest.mark.parametrize("name", ["turbo4", "trellis3", "rotor2"])
def test_dequantize_is_the_codecs_decode(name):
    x = mx.random.normal((2, 3, 70, 80))
    c = codec.get(name, 80)
    side = PackedSide(c, *encode_reference(c, x))
    whole = c.decode(c.encode(x))
    for start, stop in ((0, 70), (33, 60), (31, 32), (5, 5)):
        part = reference.dequantize(side, start, stop, mx.float16)
        assert part.shape == (2, 3, stop - start, 80) and part.dtype == mx.float16
        assert mx.allclose(part, whole[:, :, start:stop].astype(mx.float16), atol=2e-3)


def test_what_no_attention_can_mean_is_refused():
    q, parts = mx.ones((2, 2, 1, 32)), segments([3, 3, 3, 3], 2, 32, 32)
    with pytest.raises(RotorError, match="window"):
        reference.attend(q, parts, AttentionArgs(scale=1.0, window=0))
    with pytest.raises(RotorError, match="unknown mask 'diagonal'"):
        reference.attend(q, parts, AttentionArgs(scale=1.0, mask="diagonal"))
    with pytest.raises(RotorError, match=r"lengths are \[B, 3\]"):
        AttentionArgs(scale=1.0, lengths=mx.zeros((2,), mx.int32))
    with pytest.raises(RotorError, match="4 segments"):
        reference.attend(q, parts, AttentionArgs(scale=1.0, lengths=mx.zeros((2, 3), mx.int32)))
