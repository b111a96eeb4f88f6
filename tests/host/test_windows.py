"""Sliding windows over compressed caches: long runs, a limit of the user's own, and caches that are full already."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import mlx_rotor
from mlx_rotor import RotorError
from mlx_rotor.cache import RotorCache, Scheme, parse
from mlx_rotor.host import attention, layers, report
from mlx_rotor.host.attachment import stock_cache
from mlx_rotor.host.layers import compress
from mlx_rotor.host.slots import slots
from zoo import build, logits, model_of, worst

LOSSLESS = Scheme("raw32", "raw32", sinks=2, ring=6, protect_layers=0)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(layers, "SHORTEST_WINDOW", 4)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("fused", [True, False])
def test_many_windows_long(name, fused):
    """Tokens behind the window are dropped, and nobody misses them."""
    model, chunks = build(name, sliding_window=20), [9, 1, 1, 30, *[1] * 30, 270, 1, 1, 40, 1, 300, *[1] * 12]
    expected = logits(model, stock_cache(model), chunks)
    caches = mlx_rotor.make_prompt_cache(model, LOSSLESS)
    if not fused:
        attention.uninstall()
    assert worst(logits(model, caches, chunks), expected) < 3e-6
    windows = [c for c in caches if c.window is not None]
    assert len(windows) == 2 and all(c.window == 20 and c.dropped >= 512 and c.held < 300 for c in windows)
    assert all(c.offset == sum(chunks) and not c.is_trimmable() for c in windows)


def test_a_limit_of_the_users():
    """The first 4 tokens and the last 20, through three windows of single tokens."""
    model, chunks = model_of("qwen3"), [11, 8, *[1] * 61]
    expected = logits(model, stock.make_prompt_cache(model, max_kv_size=24), chunks)
    caches = mlx_rotor.make_prompt_cache(model, LOSSLESS, max_kv_size=24)
    assert {(type(c), c.window, c.sinks) for c in caches} == {(RotorCache, 20, 4)}
    assert worst(logits(model, caches, chunks), expected) < 3e-6
    assert "layers 0-2: a window of 20 tokens" in report.describe(caches)


def test_a_limit_leaves_windows_of_the_models_own_alone():
    model = model_of("gemma3_text")
    caches = mlx_rotor.make_prompt_cache(model, LOSSLESS, max_kv_size=24)
    assert [(c.window, c.sinks) for c in caches] == [(8, 0), (8, 0), (20, 4)]
    expected = logits(model, [*stock_cache(model)[:2], stock.RotatingKVCache(24, keep=4)], [20, *[1] * 40])
    assert worst(logits(model, caches, [20, *[1] * 40]), expected) < 3e-6


def test_a_limit_that_can_not_be():
    with pytest.raises(RotorError, match=r"--max-kv-size.*index"):
        mlx_rotor.make_prompt_cache(model_of("minimax_m3_vl"), LOSSLESS, max_kv_size=24)
    with pytest.raises(RotorError, match=r"--max-kv-size 3 .* 4 or more"):
        mlx_rotor.make_prompt_cache(model_of("qwen3"), LOSSLESS, max_kv_size=3)


@pytest.mark.parametrize("name", ["gemma3_text", "baichuan_m1", "falcon_h1", "qwen3"])
@pytest.mark.parametrize("before", [[5], [7, 6], [7, 6, *[1] * 9], [*[1] * 14]])
def test_full_caches_are_taken_over(name, before):
    model = model_of(name)
    plain = stock.make_prompt_cache(model, max_kv_size=12) if name == "qwen3" else stock_cache(model)
    logits(model, plain, before)
    caches = compress(copy.deepcopy(plain), LOSSLESS)
    ours = [c for c in slots(caches).values() if isinstance(c, RotorCache)]
    assert ours and all(c.offset == sum(before) for c in ours)
    for chunks in ([1] * 11,) if name == "qwen3" else ([1, 1, 1], [5], [1] * 9):
        assert worst(logits(model, caches, chunks), logits(model, plain, chunks)) < 3e-6


def test_short_windows_are_left_exact_and_said_so(monkeypatch):
    monkeypatch.undo()
    model = build("gemma3_text", head_dim=64, sliding_window=layers.SHORTEST_WINDOW - 1)
    caches = mlx_rotor.make_prompt_cache(model, "turbo4", protect_layers=0)
    assert [type(c) for c in caches] == [stock.RotatingKVCache] * 2 + [RotorCache]
    left = f"layers 0-1: left exact ({layers.SHORT})"
    assert report.describe(caches) == f"layers 2: K turbo4, V turbo4 (reference kernels); {left}"
    wide = mlx_rotor.make_prompt_cache(
        build("gemma3_text", head_dim=64, sliding_window=layers.SHORTEST_WINDOW), "turbo4"
    )
    assert [c.window for c in wide] == [layers.SHORTEST_WINDOW] * 2 + [None]


def test_the_shortest_window_that_is_compressed_saves_memory(monkeypatch):
    monkeypatch.undo()
    plain = stock.RotatingKVCache(layers.SHORTEST_WINDOW)
    (ours,) = compress([stock.RotatingKVCache(layers.SHORTEST_WINDOW)], parse("turbo4", protect_layers=0))
    for n in [layers.SHORTEST_WINDOW, *[100, 1] * 12]:
        tokens = mx.random.normal((1, 2, n, 64)).astype(mx.float16)
        plain.update_and_fetch(tokens, tokens)
        ours.append(tokens, tokens)
        assert ours.nbytes < 0.8 * plain.nbytes


def test_layers_of_one_window_are_compressed_together():
    """They share a mask: one that is left exact leaves the others exact."""
    caches = [stock.RotatingKVCache(8), stock.RotatingKVCache(8), stock.RotatingKVCache(16), stock.KVCache()]
    out = compress(caches, LOSSLESS, {(1,): "attention reads expanded keys and values"})
    assert [type(c) for c in out] == [stock.RotatingKVCache] * 2 + [RotorCache] * 2
    assert layers.SHARED in report.describe(out)
