"""What is found out about a model once, and kept; threads; the order of imports; reports."""

import subprocess
import sys
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models import cache as stock

import mlx_rotor
from grids import thinned
from mlx_rotor import RotorError
from mlx_rotor.cache import RotorCache, Scheme
from mlx_rotor.host import attention, probe, report
from mlx_rotor.host.attachment import stock_cache
from mlx_rotor.host.slots import replaced, slots
from zoo import CHUNKS, build, logits, worst

LOSSLESS = Scheme("raw32", "raw32", sinks=2, ring=3, protect_layers=0)


@pytest.fixture(autouse=True)
def uncompiled():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def runs(monkeypatch):
    """How often a model was run to find out."""
    seen, run = [], probe._run
    monkeypatch.setattr(probe, "_run", lambda *args: seen.append(1) or run(*args))
    return seen


def test_a_model_is_asked_once(runs):
    model = build("qwen3")
    parameters = set(model.parameters())
    threads = [threading.Thread(target=mlx_rotor.make_prompt_cache, args=(model, LOSSLESS)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    mlx_rotor.attach(model, LOSSLESS)
    model.make_cache()
    assert len(runs) == 1 and set(model.parameters()) == parameters
    # Caches of another kind may be used in another way.
    object.__setattr__(model, "make_cache", lambda: [stock.RotatingKVCache(1024) for _ in model.layers])
    mlx_rotor.make_prompt_cache(model, LOSSLESS)
    mlx_rotor.make_prompt_cache(model, LOSSLESS)
    assert len(runs) == 2


def test_some_layers_of_a_model_expand():
    model = build("phi3small")
    caches = mlx_rotor.make_prompt_cache(model, LOSSLESS)
    assert [type(c) for c in caches] == [stock.KVCache, RotorCache, stock.KVCache]
    line = report.describe(caches)
    assert line == f"layers 1: K raw32, V raw32 (MLX operations); layers 0, 2: left exact ({probe.EXPANDED})"
    assert all(isinstance(c, stock.KVCache) or c.body.length for c in mlx_rotor.verify(model, LOSSLESS))


def test_an_index_beside_attention_stays():
    (first, second, third) = mlx_rotor.make_prompt_cache(build("minimax_m3_vl"), LOSSLESS)
    assert [type(c) for c in first.caches] == [RotorCache]
    for layer in (second, third):
        assert type(layer) is stock.CacheList and [type(c) for c in layer.caches] == [RotorCache, stock.KVCache]
    assert report.layers([first, second, third]).compressed == [0, 1, 2]


def test_a_model_that_can_not_run_is_named():
    with pytest.raises(RotorError, match=r"olmo does not run on two tokens"):
        mlx_rotor.attach(build("olmo"), LOSSLESS)


def test_verify_names_the_layer_that_expands():
    model = build("phi3small")
    kinds = tuple(((i,), "_WatchedKV") for i in range(3))
    object.__setattr__(model, "_rotor_uses", {kinds: dict.fromkeys([(0,), (1,), (2,)], probe.FUSED)})
    with pytest.raises(RotorError, match=r"layers \[0, 2\] attended to expanded"):
        mlx_rotor.verify(model, LOSSLESS)


def test_a_cache_of_one_thread_serves_another():
    model = build("gemma3_text", head_dim=64)
    expected = logits(model, stock_cache(model))
    made, got = [], []

    def make():
        made.append(mlx_rotor.make_prompt_cache(model, "turbo4", protect_layers=0))
        made.append(mlx_rotor.make_prompt_cache(model, LOSSLESS))
        logits(model, made[0])

    def use(caches):
        got.append(logits(model, caches))

    for target, args in ((make, ()), (use, lambda: (made[1],))):
        thread = threading.Thread(target=target, args=args() if callable(args) else args)
        thread.start()
        thread.join()
    assert worst(got[0], expected) < 3e-6
    assert mx.isfinite(logits(model, made[0])).all()


@pytest.mark.parametrize("first", thinned(["mlx_rotor.host", "mlx_lm.models.gemma3_text"], 2))
def test_order_of_imports_does_not_matter(first):
    code = f"""
import importlib
importlib.import_module({first!r})
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.disable_compile()
import zoo, mlx_rotor
from mlx_rotor.host import report
model = zoo.build("gemma3_text", head_dim=64)
caches = mlx_rotor.make_prompt_cache(model, "turbo4", ring=4, protect_layers=0)
zoo.logits(model, caches)
print(report.layers(caches).fused_calls, report.layers(caches).fallback_calls)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == f"{len(CHUNKS)} 0", done.stderr


def test_models_beside_ours_are_untouched():
    ours, theirs = build("llama"), build("llama")
    expected = logits(theirs, stock_cache(theirs))
    mlx_rotor.attach(ours, LOSSLESS)
    assert attention.installed()
    assert mx.array_equal(logits(theirs, stock.make_prompt_cache(theirs)), expected)
    assert all(type(c) in (stock.KVCache, stock.RotatingKVCache) for c in stock.make_prompt_cache(theirs))


def test_caches_know_their_model():
    model, other = build("qwen3"), build("qwen3", hidden_size=128)
    prints = {c.fingerprint for m in (model, other) for c in mlx_rotor.make_prompt_cache(m, LOSSLESS)}
    assert len(prints) == 2 and "" not in prints
    calibrated = replace(LOSSLESS, model=mlx_rotor.make_prompt_cache(model, LOSSLESS)[0].fingerprint)
    mlx_rotor.make_prompt_cache(model, calibrated)
    with pytest.raises(RotorError, match="another model"):
        mlx_rotor.make_prompt_cache(other, calibrated)


def test_slots_of_nested_lists():
    a, b, c, d = (stock.KVCache() for _ in range(4))
    caches = [a, stock.CacheList(b, stock.CacheList(c, d))]
    assert slots(caches) == {(0,): a, (1, 0): b, (1, 1, 0): c, (1, 1, 1): d}
    new = stock.KVCache()
    out = replaced(caches, {(1, 1, 0): new})
    assert slots(out) == {(0,): a, (1, 0): b, (1, 1, 0): new, (1, 1, 1): d}
    assert slots(caches)[1, 1, 0] is c
