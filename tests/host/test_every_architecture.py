"""Every architecture of mlx_lm over compressed caches, held against its own logits over mlx_lm's caches."""

import copy
from pathlib import Path

import mlx.core as mx
import pytest

import zoo
from mlx_rotor.cache import RotorCache, Scheme, rotor
from mlx_rotor.host import attention, layers, probe, report
from mlx_rotor.host.attachment import stock_cache
from mlx_rotor.host.layers import compress
from mlx_rotor.host.slots import slots
from zoo import CHUNKS, logits, model_of, worst

LOSSLESS = Scheme("raw32", "raw32", sinks=2, ring=3, protect_layers=0)
RUNNABLE = [name for name in zoo.architectures() if name not in zoo.EXCLUDED]
# At least one architecture of each kind in docs/architectures.md's table, and those people run most. The others' turn
# comes at night.
USUAL = {
    *("llama", "qwen3", "phi3", "minimax", "mixtral", "qwen3_moe", "glm4_moe", "Klear"),
    *("gemma3_text", "gemma3n", "gemma4_text", "gpt_oss", "cohere2", "baichuan_m1", "recurrent_gemma"),
    *("deepseek_v3", "deepseek_v32", "kimi_linear", "deepseek_v41", "minimax_m3_vl", "phi3small"),
    *("gemma2", "stablelm", "llama4", "mamba2", "falcon_h1", "qwen3_next"),
}
ARCHITECTURES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.nightly) for name in RUNNABLE]
REASONS = {probe.FUSED, probe.EXPANDED, probe.LATENT, probe.INDEX}


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Windows of 8 tokens are compressed; nothing is compiled, which would take a second for each function."""
    monkeypatch.setattr(layers, "SHORTEST_WINDOW", 4)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def poisoned(monkeypatch):
    """Views that look right and hold NaN: whoever reads them instead of the packed tokens is found out."""
    views = rotor.views

    def poison(k, v, handle):
        return views(*(mx.full(a.shape, mx.nan, a.dtype) for a in (k, v)), handle)

    monkeypatch.setattr(rotor, "views", poison)


def compressed(model, uses=None):
    uses = uses or probe.uses(model, stock_cache(model))
    return compress(stock_cache(model), LOSSLESS, uses) if probe.FUSED in uses.values() else None


def packed(caches):
    return [c.body.length for c in slots(caches).values() if isinstance(c, RotorCache)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_to_packed_tokens(name, poisoned):
    model = model_of(name)
    expected = logits(model, stock_cache(model))
    attention.install()
    assert mx.array_equal(logits(model, stock_cache(model)), expected), "plain caches no longer give the same"
    uses = probe.uses(model, stock_cache(model))
    assert set(uses.values()) <= REASONS
    if (caches := compressed(model)) is None:
        return
    assert worst(logits(model, caches), expected) < 3e-6
    assert len(packed(caches)) == list(uses.values()).count(probe.FUSED) and min(packed(caches)) > 10
    used = report.layers(caches)
    assert used.fallback_calls == 0 and used.fused_calls >= len(CHUNKS) * len(packed(caches))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_to_expanded_tokens(name):
    """Without our attention, and in the layers that never use it and are left exact for that."""
    model = model_of(name)
    uses = probe.uses(model, stock_cache(model))
    forced = {path: use if use == probe.INDEX else probe.FUSED for path, use in uses.items()}
    attention.uninstall()
    if (caches := compressed(model, forced if probe.FUSED not in uses.values() else uses)) is None:
        return
    assert worst(logits(model, caches), logits(model, stock_cache(model))) < 3e-6
    used = report.layers(caches)
    assert used.fused_calls == 0 and used.fallback_calls >= len(CHUNKS) * len(packed(caches)) > 0


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text", "plamo3", "falcon_h1", "baichuan_m1", "gpt_oss", "qwen3_5"])
def test_rows_of_a_batch_are_single_sequences(name):
    model, tokens = (
        model_of(name),
        [[5, 60, 7, 8, 9, 1, 0, 33, 12, 3, 44, 17], [2, 3, 4, 5, 6, 7, 8, 21, 30, 11, 12, 13]],
    )
    attention.install()
    rows = [compressed(model), compressed(model)]
    for cache, row, n in zip(rows, tokens, (3, 12), strict=True):
        mx.eval(model(mx.array([row[:n]]), cache=cache))
    singles = copy.deepcopy(rows)
    batch = [first.merge([first, second]) for first, second in zip(*rows, strict=True)]
    at = mx.array(tokens)
    for step in ([0, 4], [4, 5], [5, 6], [6, 11]):
        got = model(at[:, slice(*step)], cache=batch)
        for i, cache in enumerate(singles):
            assert worst(got[i : i + 1], model(at[i : i + 1, slice(*step)], cache=cache)) < 3e-6


def test_none_is_missing():
    """Every module of mlx_lm.models with a Model has a tiny config, or a reason why not."""
    assert set(zoo.EXCLUDED) <= set(zoo.architectures())
    assert all(zoo.EXCLUDED.values())
    assert len(RUNNABLE) > 100 and set(RUNNABLE) >= USUAL


@pytest.mark.nightly
def test_most_attend_to_packed_tokens():
    plain = [name for name in RUNNABLE if probe.FUSED in probe.uses(m := model_of(name), stock_cache(m)).values()]
    assert len(plain) > 90


@pytest.mark.nightly
def test_the_documented_table_is_this_mlx_lms(monkeypatch):
    monkeypatch.undo()
    docs = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert docs.read_text() == zoo.table(), "run: python tests/host/zoo.py > docs/architectures.md"
