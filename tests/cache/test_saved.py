"""States from files: another format or parts that don't fit are refused, with the part's name."""

import mlx.core as mx
import pytest

from mlx_rotor import RotorError
from mlx_rotor.cache import RotorCache


def test_a_foreign_state_is_refused():
    state = RotorCache("turbo4", "turbo4").state
    for foreign in ([mx.zeros((1,))], [], [*state[:8], 1, *state[9:]], [*state[:8], "2", *state[9:]]):
        with pytest.raises(RotorError, match="format 2"):
            RotorCache.from_state(foreign)


SINK_K, RING_K, RING_V, TILES_K, SCALE_K, TILES_V, SCALE_V = 0, 2, 3, 4, 5, 6, 7
SINKS, RING, BLOCK, BODY, RING_LENGTH, DIM_K, CODEC_K = 9, 10, 11, 12, 13, 14, 16


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        (SINK_K, lambda x: x[:, :, :1], "first tokens are K"),
        (SINK_K, lambda x: None, "K or V only"),
        (SINK_K, lambda x: "x", "should be an array"),
        (RING_K, lambda x: None, "K or V only"),
        (RING_K, lambda x: x.astype(mx.int32), "int32"),
        (RING_K, lambda x: x[0], "recent tokens are K"),
        (RING_K, lambda x: x[:, :, :, :32], "first tokens are"),
        (RING_V, lambda x: x[:, :1], "recent tokens are K"),
        (TILES_K, lambda x: None, "packed K lacks words"),
        (TILES_K, lambda x: x.astype(mx.float32), "packed K is mlx.core.float32"),
        (TILES_K, lambda x: x[:, :, :, :-1], "no tiles of turbo4"),
        (TILES_V, lambda x: x[0], "no tiles of turbo3"),
        (TILES_K, lambda x: x[:, :, :4], "scales mlx.core.float16"),
        (SCALE_V, lambda x: x.astype(mx.float32), "scales mlx.core.float32"),
        (SINKS, lambda x: 1, "2 first tokens where 1"),
        (SINKS, lambda x: 3, "first tokens are missing"),
        (RING, lambda x: 2, "room for 40 tokens"),
        (BLOCK, lambda x: 0, "block is 0"),
        (BODY, lambda x: 1000, "holds 1000"),
        (BODY, lambda x: -1, "lengths"),
        (RING_LENGTH, lambda x: 41, "holds 41"),
        (RING_LENGTH, lambda x: 1.5, "lengths"),
        (DIM_K, lambda x: 64, "dimension 64"),
        (CODEC_K, lambda x: "turbo5", "turbo5"),
        (CODEC_K, lambda x: "turbo3", "no tiles of turbo3"),
    ],
)
def test_a_damaged_state_is_refused_and_says_where(part, change, says):
    cache = RotorCache("turbo4", "turbo3", 2, 32, 8)
    for n in (140, 10):
        cache.append(mx.random.normal((2, 3, n, 128)), mx.random.normal((2, 3, n, 128)))
    state = cache.state
    assert RotorCache.from_state(state).offset == 150
    state[part] = change(state[part])
    with pytest.raises(RotorError, match=says):
        RotorCache.from_state(state)
