"""The largest keys and values that calibration sees: which layers, and through a restart."""

import mlx.core as mx
import pytest

import zoo_configs
from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.host.watch import KvLargest, attended, compressed_layers
from mlx_rotor.quant.plan import read_config


def test_layers_without_a_cache_of_keys_are_left_out():
    assert compressed_layers(skeleton(read_config(MODEL)), "fp8") == list(range(8))
    short = skeleton(zoo_configs.config("llama"))  # two layers with windows too short to be worth it
    assert compressed_layers(short, "fp8") == [2]
    mixed = skeleton(zoo_configs.config("qwen3_next"))
    linear = [i for i, layer in enumerate(mixed.layers) if layer.is_linear]
    found = compressed_layers(mixed, "fp8")
    assert linear and found and not set(linear) & set(found)


def test_what_attention_takes_is_seen_and_only_while_it_is_watched():
    seen, stock = [], mx.fast.scaled_dot_product_attention
    q, k, v = (mx.random.normal((1, 2, 3, 32)) for _ in range(3))
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)
    with attended(lambda k, v: seen.append((k, v))):
        assert mx.array_equal(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0), expected)
    assert len(seen) == 1 and seen[0][0] is k and seen[0][1] is v
    assert mx.fast.scaled_dot_product_attention is stock


def test_the_largest_of_all_is_kept_through_a_restart():
    largest = KvLargest([0, 2])
    assert largest.of(1) is None
    largest.of(0)(mx.array([1.0, -3.0]), mx.array([0.5]))
    largest.of(0)(mx.array([2.0]), mx.array([-0.75]))
    with pytest.raises(RotorError, match="layers 2 showed no keys and values"):
        largest.pairs()
    again = KvLargest([0, 2])
    again.restore(largest.state())
    again.of(2)(mx.array([4.0]), mx.array([0.0]))
    assert again.pairs() == [(3.0, 0.75), (4.0, 0.0)]
    with pytest.raises(RotorError, match="layer 2 of the source has keys or values that are not finite"):
        again.of(2)(mx.array([float("inf")]), mx.array([1.0]))
