"""Attached models against mlx_lm's own: same logits, same tokens, and no silent fallback."""

import copy
import importlib
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_lm import generate
from mlx_lm.models import cache as stock

import mlx_rotor
from grids import thinned
from mlx_rotor import RotorError
from mlx_rotor.cache import RotorCache, Scheme, parse
from mlx_rotor.host import attention, report, versions
from tiny_models import tiny

LOSSLESS = Scheme("raw32", "raw32", sinks=2, ring=8, protect_layers=1)
stream_generate = importlib.import_module("mlx_lm").stream_generate


def logits(model, tokens, caches, chunks):
    out, at = [], 0
    for n in chunks:
        out.append(model(tokens[:, at : at + n], cache=caches))
        mx.eval(out[-1])
        at += n
    return mx.concatenate(out, axis=1)


def worst(a, b):
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


@pytest.mark.parametrize(
    "model_type", thinned(["llama", "qwen3", "minimax", "gpt_oss", "gemma3_text"], ["minimax", "gpt_oss"])
)
@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_stocks(model_type, fused):
    model, tokens = tiny(model_type), mx.random.randint(0, 256, (1, 60))
    chunks = [20, 1, 1, 7, 1, 28, 1, 1]
    expected = logits(model, tokens, stock.make_prompt_cache(model), chunks)
    caches = mlx_rotor.make_prompt_cache(model, LOSSLESS)
    if not fused:
        attention.uninstall()
    assert worst(logits(model, tokens, caches, chunks), expected) < 3e-6
    layers = report.layers(caches)
    assert layers.compressed and layers.fused_calls + layers.fallback_calls == len(layers.compressed) * len(chunks)
    assert (layers.fallback_calls == 0) is fused
    assert all(c.body.length > 30 for c in caches if isinstance(c, RotorCache))


def test_only_plain_layers_are_compressed():
    kinds = [type(c).__name__ for c in mlx_rotor.make_prompt_cache(tiny("gpt_oss"), "turbo4")]
    assert kinds == ["RotatingKVCache", "RotorCache", "RotorCache"]


def test_batches_of_equal_length():
    model, tokens = tiny("qwen3"), mx.random.randint(0, 256, (3, 40))
    expected = logits(model, tokens, stock.make_prompt_cache(model), [30, 1, 9])
    assert worst(logits(model, tokens, mlx_rotor.make_prompt_cache(model, LOSSLESS), [30, 1, 9]), expected) < 3e-6


def test_greedy_text_is_stocks_through_attach_and_after_detach(bundled):
    model, tokenizer = bundled
    prompt = tokenizer.encode("def read(path):\n    with open(path) as f:\n", add_special_tokens=False)
    expected = generate(model, tokenizer, prompt, max_tokens=24)
    try:
        assert mlx_rotor.attach(model, LOSSLESS) is model
        assert all(type(c) is RotorCache for c in stock.make_prompt_cache(model))
        assert generate(model, tokenizer, prompt, max_tokens=24) == expected
    finally:
        mlx_rotor.detach(model)
    assert all(type(c) is stock.KVCache for c in stock.make_prompt_cache(model))
    assert generate(model, tokenizer, prompt, max_tokens=24) == expected


def test_attach_again_replaces_and_exact_detaches():
    model = tiny("llama")
    for name in ("turbo4", "turbo3"):
        mlx_rotor.attach(model, name, protect_layers=0)
        assert stock.make_prompt_cache(model)[0].codecs == (name, name)
    mlx_rotor.attach(model, "exact")
    assert type(stock.make_prompt_cache(model)[0]) is stock.KVCache
    assert "make_cache" not in model.parameters()


def test_anothers_hook_is_kept_below_ours():
    model = tiny("llama")
    theirs = lambda: [stock.KVCache(), stock.RotatingKVCache(max_size=8), stock.KVCache()]  # noqa: E731
    object.__setattr__(model, "make_cache", theirs)
    mlx_rotor.attach(model, "turbo4")
    kinds = [type(c) for c in stock.make_prompt_cache(model)]
    assert kinds == [RotorCache, stock.RotatingKVCache, RotorCache]
    assert [type(c) for c in mlx_rotor.make_prompt_cache(model, "exact")] == [type(c) for c in theirs()]
    assert mlx_rotor.detach(model).make_cache is theirs


def test_a_models_own_cache_list_is_the_start():
    model = tiny("gemma3_text")
    mlx_rotor.attach(model, "turbo4")
    kinds = {type(c) for c in stock.make_prompt_cache(model)}
    assert kinds == {RotorCache, stock.RotatingKVCache}
    assert {type(c) for c in mlx_rotor.make_prompt_cache(model, "exact")} == {stock.KVCache, stock.RotatingKVCache}


def test_speculative_decoding_trims(bundled):
    model, tokenizer = bundled
    prompt = mx.array(tokenizer.encode("import os\nimport sys\n", add_special_tokens=False))
    expected = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=24)]
    caches = [*mlx_rotor.make_prompt_cache(model, LOSSLESS), *stock.make_prompt_cache(model)]
    options = {"draft_model": model, "num_draft_tokens": 3, "prompt_cache": caches}
    got = list(stream_generate(model, tokenizer, prompt, max_tokens=24, **options))
    assert [r.token for r in got] == expected and any(r.from_draft for r in got)


def test_a_prefix_serves_two_continuations():
    model, tokens = tiny("qwen3"), mx.random.randint(0, 256, (1, 60))
    first = mlx_rotor.make_prompt_cache(model, LOSSLESS)
    logits(model, tokens[:, :40], first, [40])
    second = copy.deepcopy(first)
    expected = logits(model, tokens, stock.make_prompt_cache(model), [40, 20])[:, 40:]
    for caches in (first, second):
        assert worst(logits(model, tokens[:, 40:], caches, [1] * 20), expected) < 3e-6


def test_verify_packs_in_every_layer():
    caches = mlx_rotor.verify(tiny("minimax"), "turbo4v2")
    assert all(c.body.length and c.counts.fused and not c.counts.fallback for c in caches)


def test_a_model_whose_attention_expands_is_refused():
    with pytest.raises(RotorError, match=r"nothing to compress: latent attention.*--kv exact"):
        mlx_rotor.attach(tiny("deepseek_v3"), "turbo4")


def test_verify_refuses_when_the_wrapper_is_bypassed(monkeypatch):
    model = tiny("llama")
    mlx_rotor.make_prompt_cache(model)
    attention.uninstall()
    monkeypatch.setattr(attention, "install", lambda: None)
    with pytest.raises(RotorError, match=r"layers \[0, 1, 2\]"):
        mlx_rotor.attach(model, "turbo4")


def test_nothing_to_compress():
    with pytest.raises(RotorError, match=r"nothing to compress.*exact"):
        mlx_rotor.attach(tiny("mamba"), "turbo4")


def test_a_head_dimension_the_codec_cant_take():
    with pytest.raises(RotorError, match="head dimension 24"):
        mlx_rotor.attach(tiny("llama", head_dim=24), "turbo4")


def test_plain_attention_is_untouched():
    q, k = mx.random.normal((1, 4, 3, 64)), mx.random.normal((1, 2, 9, 64))
    before = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask="causal")
    attention.install()
    assert attention.installed()
    assert mx.array_equal(mx.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask="causal"), before)
    attention.uninstall()
    assert not attention.installed()


@pytest.mark.parametrize(
    ("installed", "fits"), [("0.32.2", 1), ("0.32.9", 1), ("0.32.1", 0), ("0.33.0", 0), ("1.0", 0)]
)
def test_versions(installed, fits):
    if fits:
        versions.check(installed)
    else:
        with pytest.raises(RotorError, match="pip install"):
            versions.check(installed)


@pytest.mark.parametrize("first", thinned(["mlx_lm.models.llama", "mlx_rotor.host"], 2))
def test_order_of_imports_does_not_matter(first):
    code = f"""
import importlib
importlib.import_module({first!r})
import mlx.core as mx, mlx_rotor
from mlx_lm.models import llama
args = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
            rms_norm_eps=1e-5, vocab_size=64, head_dim=64)
model = llama.Model(llama.ModelArgs.from_dict(args))
caches = mlx_rotor.verify(model, "turbo4")
print([c.counts.fused for c in caches])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[3, 3]", done.stderr


def test_report_counts_stock_caches_too():
    model, tokens = tiny("llama"), mx.random.randint(0, 256, (1, 100))
    caches = stock.make_prompt_cache(model)
    assert report.kv_bytes(caches) == 0 == report.kv_bytes_fp16(caches)
    mx.eval(model(tokens, cache=caches))
    per_token = 3 * 2 * 2 * 64
    assert report.kv_bytes(caches) == 256 * per_token * 4
    assert report.kv_bytes_fp16(caches) == 100 * per_token * 2
    affine = [c.to_quantized(group_size=64, bits=8) for c in caches]
    assert report.kv_bytes_fp16(affine) == 100 * per_token * 2
    ours = mlx_rotor.make_prompt_cache(model, parse("turbo4"))
    mx.eval(model(tokens, cache=ours))
    assert report.kv_bytes_fp16(ours) == 100 * per_token * 2
    assert report.spans([0, 1, 2, 5]) == "0-2, 5"
    assert "layers 0-2: K turbo4, V turbo4" in report.describe(ours)


def test_public_names_need_no_further_import():
    code = """
import mlx_rotor, sys
assert "mlx_lm" not in sys.modules
import mlx.core as mx
c = mlx_rotor.codec.get("turbo4", 128)
print(c.bits, mlx_rotor.codec.get("turbo4", 128).decode(c.encode(mx.ones((2, 128)))).shape)
print(all(callable(getattr(mlx_rotor, n)) for n in mlx_rotor.__all__), mlx_rotor.host.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["4.125 (2, 128)", "True mlx_rotor.host"], done.stderr
