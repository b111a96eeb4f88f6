"""The cache against what went in: a lossless codec must give every token back, however it arrived."""

import copy
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

from grids import thinned
from mlx_rotor import RotorError, codec
from mlx_rotor.cache import RotorCache
from mlx_rotor.cache.view import KVView, paired
from mlx_rotor.host.attachment import register

B, H, D = 2, 3, 64


def tokens(n, seed=0, d=D):
    rng = np.random.default_rng(seed)
    return tuple(mx.array(rng.standard_normal((B, H, n, d)).astype(np.float32)) for _ in range(2))


def feed(cache, k, v, chunks):
    at, views = 0, None
    for n in chunks:
        views = cache.update_and_fetch(k[:, :, at : at + n], v[:, :, at : at + n])
        at += n
    return views


def same(a, b):
    """Equal but for the rounding of taking a mean off and putting it back."""
    return a.shape == b.shape and mx.abs(a - b).max() <= 2e-6


CHUNKS = [
    [300],
    [1] * 90,
    [3, 1, 100, 1, 1, 60, 5, 5, 200],
    [2, 1, 1, 1, 32, 8, 1, 31, 33],
    [64, 1, 64, 1, 64],
    [4],
    [5],
]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("sinks", "ring", "block"), [(4, 128, 32), (4, 16, 4), (0, 0, 1), (0, 8, 2), (7, 0, 1)])
def test_every_token_comes_back(chunks, sinks, ring, block):
    total = sum(chunks)
    k, v = tokens(total)
    cache = RotorCache("raw32", "raw32", sinks, ring, block)
    got_k, got_v = feed(cache, k, v, chunks)
    assert cache.offset == total == cache.size()
    assert same(got_k, k) and same(got_v, v)
    again_k, again_v = cache.keys_and_values()
    assert same(again_k, k) and same(again_v, v)
    assert cache.ring_length <= ring + block
    assert cache.body.length >= total - sinks - ring - block
    assert cache.body.length % block == 0


def test_exact_parts_are_bit_exact_and_the_body_is_the_codecs():
    k, v = tokens(400, d=128)
    cache = RotorCache("turbo4", "turbo2", centre=False)
    feed(cache, k, v, [400])
    got_k, got_v = cache.keys_and_values()
    for got, x, name in ((got_k, k, "turbo4"), (got_v, v, "turbo2")):
        c = codec.get(name, 128)
        assert mx.array_equal(got[:, :, :4], x[:, :, :4])
        assert mx.array_equal(got[:, :, 260:], x[:, :, 260:])  # at least 128, the body being whole blocks of 32
        assert mx.allclose(got[:, :, 4:260], c.decode(c.encode(x[:, :, 4:260])), atol=1e-5)


def test_a_chunk_sees_itself_exact():
    k, v = tokens(400, d=128)
    got_k, _ = RotorCache("turbo2", "turbo2").update_and_fetch(k, v)
    assert mx.array_equal(got_k, k)


def test_nbytes_is_every_byte_to_the_byte():
    k, v = tokens(1000, d=128)
    cache = RotorCache("turbo4", "turbo2")
    assert cache.nbytes == 0
    feed(cache, k, v, [1000])
    body = (1000 - 4 - 128) // 32 * 32
    held = body + body // 8
    room = -(-held // 256) * 256
    ring = -(-(1000 - 4 - body) // 32) * 32
    per_token = B * H * 128 * (codec.get("turbo4", 128).bits + codec.get("turbo2", 128).bits) / 8
    exact = B * H * 128 * 4 * 2 * (4 + ring)
    means = B * H * 128 * 2 * (-(-body // 256) + 1)
    assert cache.nbytes == exact + room * per_token + means
    assert cache.elements == 2 * B * H * 128 * 1000


def test_no_exact_copy_of_the_body_outlives_prefill():
    k, v = (mx.contiguous(x) for x in tokens(4000, d=128))
    mx.eval(k, v)
    cache = RotorCache("turbo4", "turbo2")
    before = mx.get_active_memory()
    mx.eval(cache.update_and_fetch(k, v), cache.state)
    del k, v
    mx.clear_cache()
    assert mx.get_active_memory() - before <= cache.nbytes


def test_views_that_a_model_evaluates_are_not_kept():
    k, v = tokens(4001, d=128)
    cache = RotorCache("turbo4", "turbo2")
    feed(cache, k[:, :, :4000], v[:, :, :4000], [4000])
    mx.eval(cache.state)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.eval(cache.update_and_fetch(k[:, :, 4000:], v[:, :, 4000:]), cache.state)
    mx.clear_cache()
    assert mx.get_active_memory() - before < k.nbytes / 10


def test_views_are_the_same_from_step_to_step_where_attention_takes_them():
    k, v = tokens(400, d=64)
    cache, q = RotorCache("turbo4", "turbo2"), mx.ones((B, H, 1, 64))
    runs = []
    for n in (300, 1, 1, 1):
        view, _ = feed(cache, k, v, [n])
        mx.eval(view.rotor.attend(q, 0.1))
        runs.append(view.rotor.segments)
    assert len(runs[3]) == 3 and all(a is b for a, b in zip(runs[2][:2], runs[3][:2], strict=True))


@pytest.mark.parametrize("n", [1, 30, 140, 250, 299, 300, 999])
def test_trim_forgets_the_last(n):
    k, v = tokens(400)
    cache = RotorCache("raw32", "raw32", 4, 64, 16)
    feed(cache, k[:, :, :300], v[:, :, :300], [250] + [1] * 50)
    assert cache.is_trimmable() and cache.trim(n) == min(n, 300)
    keep = 300 - min(n, 300)
    assert cache.offset == keep
    more = (k[:, :, 300:], v[:, :, 300:])
    got_k, got_v = feed(cache, *more, [60, 1, 39])
    assert same(got_k, mx.concatenate([k[:, :, :keep], more[0]], 2))
    assert same(got_v, mx.concatenate([v[:, :, :keep], more[1]], 2))


def test_deepcopy_is_independent():
    k, v = tokens(300)
    cache = RotorCache("raw32", "raw32", 4, 64, 16)
    feed(cache, k[:, :, :200], v[:, :, :200], [200])
    other = copy.deepcopy(cache)
    feed(cache, k[:, :, 200:], v[:, :, 200:], [1] * 100)
    assert other.offset == 200
    assert same(other.keys_and_values()[0], k[:, :, :200])
    assert same(cache.keys_and_values()[0], k)


def test_saves_and_loads_as_mlx_lm_does(tmp_path):
    register()
    k, v = tokens(300, d=128)
    full, empty = RotorCache("turbo4", "turbo3", 2, 32, 8), RotorCache("turbo4", "turbo3")
    feed(full, k, v, [250] + [1] * 50)
    stock.save_prompt_cache(str(tmp_path / "p.safetensors"), [full, empty], {"model": "m"})
    loaded, metadata = stock.load_prompt_cache(str(tmp_path / "p.safetensors"), return_metadata=True)
    assert metadata == {"model": "m"} and loaded[1].offset == 0 and loaded[0].offset == 300
    assert loaded[0].nbytes == full.nbytes
    more = tokens(1, 5, 128)
    for a, b in zip(loaded[0].update_and_fetch(*more), full.update_and_fetch(*more), strict=True):
        assert mx.array_equal(a, b)


def test_prefill_keeps_the_body_in_whole_tiles():
    k, v = tokens(600)
    cache = RotorCache("raw32", "raw32")
    for n, ring in ((200, 132), (100, 136), (1, 137), (299, 148)):
        feed(cache, k[:, :, cache.offset :], v[:, :, cache.offset :], [n])
        assert (cache.body.length % 32, cache.ring_length) == (0, ring)
    cache.trim(200)
    assert cache.body.length % 32 and cache.ring_length == 0
    feed(cache, k[:, :, 400:], v[:, :, 400:], [200])
    assert cache.body.length % 32 == 0
    assert same(cache.keys_and_values()[0], k)


def test_runs_on_another_thread():
    k, v = tokens(300, d=128)
    cache, error = RotorCache("turbo3", "turbo3"), []

    def work():
        try:
            mx.eval(feed(cache, k, v, [250] + [1] * 50), cache.state)
        except Exception as e:
            error.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not error and cache.offset == 300


def test_masks_are_the_stock_caches():
    ours, theirs = RotorCache("raw32", "raw32"), stock.KVCache()
    k, v = tokens(20)
    for n in (1, 5):
        for arguments in ({}, {"return_array": True}, {"window_size": 7}):
            a = ours.make_mask(n, **{"return_array": False, "window_size": None} | arguments)
            b = theirs.make_mask(n, **{"return_array": False, "window_size": None} | arguments)
            assert type(a) is type(b) and (a == b if not isinstance(a, mx.array) else mx.array_equal(a, b))
        ours.update_and_fetch(k, v)
        theirs.update_and_fetch(k, v)


def test_keys_can_be_set_to_themselves_behind_a_dependency():
    cache = RotorCache("raw32", "raw32")
    k, v = tokens(10)
    cache.update_and_fetch(k, v)
    cache.keys = mx.depends(cache.keys, mx.ones(1))
    assert same(cache.keys_and_values()[0], k)
    with pytest.raises(RotorError, match="ring"):
        cache.keys = mx.zeros((1,))


def test_views_pair_only_with_their_own_other_half():
    cache = RotorCache("raw32", "raw32")
    k, v = cache.update_and_fetch(*tokens(10))
    assert type(k) is KVView and paired(k, v) is k.rotor
    assert paired(v, k) is None and paired(k, k) is None and paired(k, k + 0) is None
    other_k, _ = RotorCache("raw32", "raw32").update_and_fetch(*tokens(10))
    assert paired(other_k, v) is None


def test_mlx_lm_hooks_it_must_not_have():
    cache = RotorCache("turbo4", "turbo4")
    # `bits` would route attention to mlx_lm's affine path, `to_quantized` would convert it, `__len__` make it falsy.
    assert not any(hasattr(cache, name) for name in ("bits", "to_quantized", "__len__", "__bool__"))


@pytest.mark.parametrize("window", [40, 330])
@pytest.mark.parametrize("n", thinned([1, 5, 300], [5]))
def test_a_window_shows_what_mlx_lms_rotating_cache_shows(window, n):
    """Steps of one token, and chunks: scores of all the model sees, by fused attention and by arrays."""
    k, v = tokens(1300)
    ours, theirs = RotorCache("raw32", "raw32", 0, 16, 8, window=window), stock.RotatingKVCache(window)
    q = mx.array(np.random.default_rng(2).standard_normal((B, 2 * H, 1300, D)).astype(np.float32))
    sdpa = mx.fast.scaled_dot_product_attention
    at = 0
    for size in [2 * window, 20, *[n] * (550 // n if n > 1 else 300)]:
        part = k[:, :, at : at + size], v[:, :, at : at + size], q[:, :, at : at + size]
        at += size
        mask, stock_mask = ours.make_mask(size), theirs.make_mask(size)
        view_k, view_v = ours.update_and_fetch(*part[:2])
        want = sdpa(part[2], *theirs.update_and_fetch(*part[:2]), scale=0.1, mask=stock_mask)
        handle = paired(view_k, view_v)
        assert mx.abs(handle.attend(part[2], 0.1, mask) - want).max() < 3e-6
        assert mx.abs(sdpa(part[2], mx.array(view_k), mx.array(view_v), scale=0.1, mask=mask) - want).max() < 3e-6
    assert ours.offset == theirs.offset == at
    assert ours.held <= window + 16 + 8 + max(256 + 256, window // 4 + 256) + n


def test_a_window_with_kept_sinks_shows_them_and_the_last():
    k, v = tokens(900)
    cache = RotorCache("raw32", "raw32", 4, 16, 8, window=96)
    feed(cache, k[:, :, :850], v[:, :, :850], [500] + [1] * 350)
    q = mx.ones((B, H, 1, D))
    mask = cache.make_mask(1)
    handle = paired(*cache.update_and_fetch(k[:, :, 850:851], v[:, :, 850:851]))
    seen = [mx.concatenate([x[:, :, :4], x[:, :, 851 - 96 : 851]], axis=2) for x in (k, v)]
    want = mx.fast.scaled_dot_product_attention(q, *seen, scale=0.1)
    assert mx.abs(handle.attend(q, 0.1, mask) - want).max() < 3e-6
    assert cache.offset == 851 and cache.held < 851 and not cache.is_trimmable()


def test_a_copy_adds_the_ring_and_less_than_a_segment():
    k, v = tokens(4000, d=128)
    cache = RotorCache("turbo4", "turbo3")
    feed(cache, k, v, [4000])
    mx.eval(cache.state)
    mx.clear_cache()
    ring = B * H * 2 * 160 * 128 * 4
    segment = B * H * 2 * 512 * 128 // 2
    before = mx.get_active_memory()
    other = copy.deepcopy(cache)
    mx.eval(feed(other, *tokens(64, 3, 128), [1] * 64)[0].rotor.attend(mx.ones((B, H, 1, 128)), 1.0), other.state)
    mx.clear_cache()
    assert mx.get_active_memory() - before <= ring + segment < cache.nbytes / 2
    assert same(cache.keys_and_values()[0][:, :, 3990:], k[:, :, 3990:])


def test_decoding_after_a_load_is_bit_identical(tmp_path):
    register()
    k, v = tokens(700, d=128)
    cache = RotorCache("trellis3", "turbo3", 4, 32, 8)
    feed(cache, k, v, [600])
    cache = copy.deepcopy(cache)
    feed(cache, k[:, :, 600:], v[:, :, 600:], [1] * 40)
    stock.save_prompt_cache(str(tmp_path / "p.safetensors"), [cache])
    (loaded,) = stock.load_prompt_cache(str(tmp_path / "p.safetensors"))
    assert [s.length for s in loaded.body.segments] == [s.length for s in cache.body.segments]
    q = mx.ones((B, H, 1, 128))
    for at in range(640, 700):
        more = k[:, :, at : at + 1], v[:, :, at : at + 1]
        a, b = (paired(*c.update_and_fetch(*more)).attend(q, 0.1) for c in (cache, loaded))
        assert mx.array_equal(a, b)
