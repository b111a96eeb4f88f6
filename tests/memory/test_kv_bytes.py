"""Predicted KV bytes against caches that really hold as many tokens."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_rotor
from mlx_rotor import bundled
from mlx_rotor.cache import RotorCache, parse
from mlx_rotor.errors import RotorError
from mlx_rotor.host import report
from mlx_rotor.memory import kv

BUNDLED = json.loads((bundled.MODEL / "config.json").read_text())
M27 = json.loads((Path(__file__).parents[2] / "examples" / "minimax_m27" / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["exact", "turbo4v2", "fp8"])
@pytest.mark.parametrize("tokens", [7, 700])
def test_bytes_are_those_of_caches_that_hold_the_tokens(scheme, tokens):
    model, _ = mlx_rotor.load(str(bundled.MODEL))
    caches = mlx_rotor.make_prompt_cache(model, scheme)
    layers = len(caches)
    for cache in caches:
        k = mx.random.normal((1, BUNDLED["num_key_value_heads"], tokens, BUNDLED["head_dim"])).astype(mx.bfloat16)
        cache.update_and_fetch(k, k)
    assert layers == BUNDLED["num_hidden_layers"]
    assert kv.kv_bytes(BUNDLED, tokens, parse(scheme)) == report.kv_bytes(caches)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3000), sinks=st.integers(0, 9), ring=st.integers(0, 200), codecs=st.sampled_from(["turbo3", "fp8"])
)
def test_a_long_context_is_reckoned_as_it_is_packed(n, sinks, ring, codecs):
    scheme = parse(codecs, sinks=sinks, ring=ring)
    made = [RotorCache(codecs, codecs, sinks, ring, scheme.block) for _ in range(2)]
    x = mx.zeros((1, 1, n, 64), mx.bfloat16)
    made[0].update_and_fetch(x, x)
    assert kv._filled(made[1], ((1, 1, 64), (1, 1, 64)), n) == made[0].nbytes


def test_stock_cache_of_minimax_m27():
    assert kv.kv_bytes(M27, 65536, None) == 253_952 * 65536


def test_a_compressed_cache_is_smaller_and_protected_layers_cost_more():
    plain, exact = (kv.kv_bytes(M27, 65536, parse(s, protect_layers=0)) for s in ("turbo4", "exact"))
    protected = kv.kv_bytes(M27, 65536, parse("turbo3v2", protect_layers=2))
    bare = kv.kv_bytes(M27, 65536, parse("turbo3v2", protect_layers=0))
    assert bare < protected < plain < exact / 3


def test_a_window_bounds_what_is_held():
    config = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": 100,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    }
    short, long = (kv.kv_bytes(config, n, None) for n in (50_000, 100_000))
    assert long - short == pytest.approx(50_000 * 2 * 64 * 2, rel=0.01)  # one layer in six sees everything


def test_no_tokens_is_an_error():
    with pytest.raises(RotorError, match="0 tokens"):
        kv.kv_bytes(BUNDLED, 0, None)
