"""Every way mlx_lm uses a cache, by its own code: batches with late joins, draft models, the prompt store, chunks."""

import importlib

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

import mlx_rotor
from grids import thinned
from mlx_rotor.cache import RotorCache
from mlx_rotor.host.generation import fill
from tiny_models import tiny

G = importlib.import_module("mlx_lm.generate")
KV = {"sinks": 2, "ring": 8}


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def alone(model, prompt, n, cache=None):
    cache = cache or stock.make_prompt_cache(model)
    steps = G.generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache, prefill_step_size=8)
    return [int(t) for t, _ in steps]


@pytest.mark.parametrize("name", thinned(["llama", "minimax", "gpt_oss"], ["minimax"]))
@pytest.mark.parametrize("kv", ["k=raw32,v=raw32", "turbo4v2"])
def test_a_batch_with_late_joins_writes_what_each_row_writes_alone(name, kv):
    model = mlx_rotor.attach(tiny(name), kv, **KV)
    texts = prompts((5, 33, 17, 1, 60, 90))
    want = [alone(model, p, 12) for p in texts]
    generator = G.BatchGenerator(
        model, max_tokens=12, completion_batch_size=4, prefill_batch_size=3, prefill_step_size=8
    )
    order = generator.insert(texts[:4])
    got = {uid: [] for uid in order}
    for step in range(300):
        if step in (5, 9):
            order += generator.insert([texts[len(order)]])
            got[order[-1]] = []
        for response in generator.next()[1]:
            got[response.uid].append(response.token)
        if len(order) == 6 and all(len(tokens) == 12 for tokens in got.values()):
            break
    assert [got[uid] for uid in order] == want


def test_a_draft_model_trims_what_it_guessed_wrong():
    model, draft = mlx_rotor.attach(tiny("llama"), "k=raw32,v=raw32", **KV), tiny("llama", num_hidden_layers=1)
    (text,) = prompts((50,))
    want = alone(model, text, 30)
    caches = stock.make_prompt_cache(model) + stock.make_prompt_cache(draft)
    steps = G.speculative_generate_step(
        mx.array(text), model, draft, num_draft_tokens=3, max_tokens=30, prompt_cache=caches, prefill_step_size=8
    )
    assert [int(token) for token, *_ in steps] == want
    assert caches[0].offset >= 79 and caches[0].body.length > 0


def test_the_prompt_store_finds_prefixes_shorter_and_longer():
    model = mlx_rotor.attach(tiny("llama"), "k=raw32,v=raw32", **KV)
    (text,) = prompts((300,))
    cache = stock.make_prompt_cache(model)
    fill(model, text[:280], cache)
    store = stock.LRUPromptCache(max_size=4)
    store.insert_cache("m", text[:280], cache)
    for asked, reused in ((text, 280), ([*text[:200], 7, 8], 200), (text[:30], 29)):
        found, rest = store.fetch_nearest_cache("m", asked)
        assert len(asked) - len(rest) == reused
        assert all(c.offset == len(asked) - len(rest) for c in found)
        assert alone(model, rest, 8, found) == alone(model, asked, 8)
    assert all(c.offset == 280 for c in store.fetch_nearest_cache("m", text)[0])


def test_hits_share_the_bodys_memory():
    model = mlx_rotor.attach(tiny("llama"), "turbo4", sinks=4, ring=32)
    (text,) = prompts((3000,))
    caches = stock.make_prompt_cache(model)
    for c in caches:  # Long prompts take long to run: straight into the caches.
        x = mx.random.normal((1, 2, 3000, 64))
        c.append(x, x)
    store = stock.LRUPromptCache(max_size=4)
    mx.eval([c.state for c in caches])
    store.insert_cache("m", text, caches)
    store.fetch_nearest_cache("m", [*text, 1])
    mx.eval([c.state for c in caches])
    mx.clear_cache()
    before, size = mx.get_active_memory(), sum(c.nbytes for c in caches)
    hits = [store.fetch_nearest_cache("m", [*text, i])[0] for i in range(4)]
    for i, hit in enumerate(hits):
        for c in hit:
            c.append(mx.full((1, 2, 1, 64), float(i)), mx.full((1, 2, 1, 64), float(i)))
        mx.eval([c.state for c in hit])
    mx.clear_cache()
    ring, segment = 3 * 2 * 2 * 64 * 4 * (32 + 8), 3 * 2 * 2 * 256 * (64 // 2 + 2) * 2
    assert (mx.get_active_memory() - before) / 4 <= ring + segment < size / 2


@pytest.mark.parametrize("name", ["minimax", "llama"])  # mlx_lm makes llama's caches without a look at the size
def test_max_kv_size_holds_the_first_and_the_last_tokens(name):
    model = tiny(name)
    caches = mlx_rotor.make_prompt_cache(model, "turbo4", max_kv_size=516)
    assert all(isinstance(c, RotorCache) and c.window == 512 and c.sinks == 4 for c in caches)
    for c in caches:
        for _ in range(5):
            c.append(mx.ones((1, 2, 400, 64)), mx.ones((1, 2, 400, 64)))
    assert caches[0].offset == 2000 and caches[0].held < 516 + 256 + 400 + 160
    assert alone(model, prompts((20,))[0], 5, caches)


@pytest.mark.parametrize(
    "codecs", thinned([("turbo4", "turbo2"), ("trellis3", "trellis3")], [("trellis3", "trellis3")]), ids="-".join
)
def test_prefill_holds_no_more_than_stock_at_any_time(codecs):
    """Memory at its peak while 4096 tokens come in in chunks: six float32 caches against six float32 caches."""

    def peak(caches):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for i in range(8):
            outputs = []
            for c in caches:
                x = mx.random.normal((1, 2, 512, 64), key=mx.random.key(i))
                k, v = c.update_and_fetch(x, x)
                outputs.append(mx.fast.scaled_dot_product_attention(x[:, :, -1:], k, v, scale=0.1))
                del k, v, x
            mx.eval(outputs, [c.state for c in caches])
        return mx.get_peak_memory() - before

    theirs = peak([stock.KVCache() for _ in range(6)])
    mlx_rotor.host.attention.install()
    assert peak([RotorCache(*codecs) for _ in range(6)]) <= theirs / 2
