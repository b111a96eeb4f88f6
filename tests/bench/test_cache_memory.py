"""Memory of prompts and of shared prefixes, against what the buffers say."""

import mlx.core as mx
import pytest

from mlx_rotor.bench.cache_memory import Prefill, prefill, prefix_hit
from mlx_rotor.cache import parse
from mlx_rotor.errors import RotorError


def test_a_stock_prefix_hit_copies_the_cache():
    found = prefix_hit(None, 1024)
    assert found.kv == "exact" and found.held == 1024 * 2 * 8 * 128 * 2
    assert found.added >= found.held


@pytest.mark.parametrize("name", ["turbo4v2", "fp8"])
def test_a_compressed_prefix_hit_adds_the_ring_and_one_segment_whatever_the_length(name):
    short, long = (prefix_hit(parse(name), n) for n in (1024, 4096))
    assert long.held > 2.4 * short.held, "the body grows"
    # What an array takes beside its numbers differs by some bytes.
    assert abs(long.added - short.added) < 4096
    assert long.added < 0.6 * short.held + long.ring
    assert long.added < 3 * long.ring


def test_bytes_in_16_bits():
    row = Prefill("turbo2", 100, 10, "float32", peak=1000, held=0, packed=200)
    assert row.peak_16_bit == 400 + 200
    assert Prefill("turbo2", 100, 10, "bfloat16", peak=1000, held=0, packed=200).peak_16_bit == 1000


def test_a_prompts_peak(checkpoints):
    import mlx_rotor

    model, _ = mlx_rotor.load(str(checkpoints["a"]))
    tokens, done = [i * 7 % 2000 for i in range(500)], []
    stock = list(prefill(model, None, tokens, [128, 384], 64, done.append))
    packed = list(prefill(model, parse("turbo2", ring=32), tokens, [384], 64))
    assert done == [64] * 6 and [p.tokens for p in stock] == [128, 384]
    per_token = 2 * 2 * 128 * 4
    assert stock[1].peak > stock[1].held >= 384 * per_token and stock[1].packed == 0
    assert stock[0].peak < stock[1].peak and stock[1].dtype == "float32"
    assert 0 < packed[0].packed < packed[0].held < stock[1].held
    mx.clear_cache()


@pytest.mark.parametrize("lengths", [[100], [128, 64], [64, 64], [640]])
def test_lengths_that_are_none(lengths, checkpoints):
    with pytest.raises(RotorError, match="must be ascending multiples of 64 up to 500"):
        next(prefill(None, None, list(range(500)), lengths, 64))
