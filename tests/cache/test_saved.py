"""States from files: another format or parts that don't fit are refused, with the part's name."""

import copy

import mlx.core as mx
import pytest

from mlx_rotor import RotorError
from mlx_rotor.cache import RotorCache


def test_a_foreign_state_is_refused():
    state = RotorCache("turbo4", "turbo4").state
    for foreign in ([mx.zeros((1,))], [], {}, {**state, "format": 2}, {**state, "format": "3"}, None):
        with pytest.raises(RotorError, match="format 3"):
            RotorCache.from_state(foreign)


def exact(i, change):
    return lambda s: s["exact"].__setitem__(i, change(s["exact"][i]))


def packed(i, change):
    """Part i of the one segment: length, open, then tiles, scale, mean of K and of V."""
    return lambda s: s["segments"][0].__setitem__(i, change(s["segments"][0][i]))


def put(name, value):
    return lambda s: s.__setitem__(name, value)


SINK_K, RING_K, RING_V = 0, 2, 3
LENGTH, OPEN, TILES_K, SCALE_K, MEAN_K, TILES_V, SCALE_V, MEAN_V = range(8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (exact(SINK_K, lambda x: x[:, :, :1]), "first tokens are K"),
        (exact(SINK_K, lambda x: None), "K or V only"),
        (exact(SINK_K, lambda x: "x"), "exact tokens are none"),
        (exact(RING_K, lambda x: None), "K or V only"),
        (exact(RING_K, lambda x: x.astype(mx.int32)), "int32"),
        (exact(RING_K, lambda x: x[0]), "recent tokens are K"),
        (exact(RING_K, lambda x: x[:, :, :, :32]), "first tokens are"),
        (exact(RING_V, lambda x: x[:, :1]), "recent tokens are K"),
        (packed(TILES_K, lambda x: None), "packed K is missing"),
        (packed(TILES_K, lambda x: x.astype(mx.float32)), "packed K is mlx.core.float32"),
        (packed(TILES_K, lambda x: x[:, :, :, :-1]), "no tiles of turbo4"),
        (packed(TILES_V, lambda x: x[0]), "no tiles of turbo3"),
        (packed(TILES_K, lambda x: x[:, :, :4]), "scales mlx.core.float16"),
        (packed(SCALE_V, lambda x: x.astype(mx.float32)), "scales mlx.core.float32"),
        (packed(SCALE_K, lambda x: None), "packed K lacks its scales"),
        (packed(MEAN_K, lambda x: None), "packed K lacks its means"),
        (packed(MEAN_V, lambda x: x[..., :3]), "packed V has means"),
        (packed(MEAN_V, lambda x: mx.concatenate([x, x], axis=2)), "packed V has means"),
        (packed(MEAN_K, lambda x: x[:, :, :0]), "packed K has means"),
        (packed(LENGTH, lambda x: 1000), "holds 1000"),
        (packed(LENGTH, lambda x: -1), "-1 tokens"),
        (packed(OPEN, lambda x: 1), "segment has"),
        (lambda s: s["segments"].append(s["segments"][0]), "segments don't fit"),
        (lambda s: s["segments"][0].pop(), "segment of packed tokens is none"),
        (put("sinks", 1), "2 first tokens, not 1"),
        (put("sinks", 3), "first tokens are missing"),
        (put("ring", 2), "room for 40 tokens"),
        (put("block", 0), "block is 0"),
        (put("ring_length", 41), "holds 41"),
        (put("ring_length", 1.5), "lengths"),
        (put("window", 0), "window is 0"),
        (put("centre", 1), "means"),
        (put("codecs", 4), "names are none"),
        (put("exact", 4), "exact tokens are none"),
        (put("segments", 4), "segments are none"),
        (put("codecs", ["turbo5", "turbo3"]), "turbo5"),
        (put("codecs", ["turbo3", "turbo3"]), "no tiles of turbo3"),
        (lambda s: s.pop("dropped"), "lacks dropped"),
    ],
)
def test_a_damaged_state_is_refused_and_says_where(change, says):
    cache = RotorCache("turbo4", "turbo3", 2, 32, 8)
    for n in (140, 10):
        cache.append(mx.random.normal((2, 3, n, 128)), mx.random.normal((2, 3, n, 128)))
    state = cache.state
    assert RotorCache.from_state(state).offset == 150
    change(state)
    with pytest.raises(RotorError, match=says):
        RotorCache.from_state(state)


def test_segments_that_are_loaded_share_the_mean_of_v():
    cache = RotorCache("turbo4", "turbo3", 0, 8, 2)
    for _ in range(2):
        cache.append(mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 2, 300, 64)))
        cache = copy.deepcopy(cache)
    state = cache.state
    state["segments"][1][MEAN_V] = mx.array(state["segments"][0][MEAN_V])
    means = [s.v.mean for s in RotorCache.from_state(state).body.segments]
    assert len(means) == 3 and all(mean is means[0] for mean in means)
    state["segments"][1][MEAN_V] += 1
    with pytest.raises(RotorError, match="packed V has several means"):
        RotorCache.from_state(state)
