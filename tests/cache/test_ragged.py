"""A batch of unequal rows against single caches: whatever joins, leaves and is padded, each row attends as if alone."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rotor import RotorError
from mlx_rotor.cache import RotorCache
from mlx_rotor.cache.ragged import RaggedBatch
from mlx_rotor.cache.view import paired

H, G, D = 2, 2, 16
sdpa = mx.fast.scaled_dot_product_attention


def new_cache(window=None, sinks=2):
    return RotorCache("raw32", "raw32", sinks, 8, 4, window=window)


class Sequence:
    """A row's tokens at random, and the single cache it is compared with."""

    def __init__(self, seed, *window):
        self.rng, self.alone = np.random.default_rng(seed), new_cache(*window)

    def draw(self, n):
        return tuple(self.rng.standard_normal((1, h, n, D)).astype(np.float32) for h in (G * H, H, H))

    def attend(self, q, k, v):
        n = k.shape[2]
        mask = self.alone.make_mask(n)
        return paired(*self.alone.update_and_fetch(mx.array(k), mx.array(v))).attend(mx.array(q), 0.3, mask)


def step(batch, rows, lengths, padded):
    """One update of all rows, the first `lengths` of `padded` tokens of each their own."""
    drawn = [row.draw(n) for row, n in zip(rows, lengths, strict=True)]
    pad = [np.ones((1, h, padded, D), np.float32) * 7 for h in (G * H, H, H)]
    q, k, v = (
        mx.array(
            np.concatenate(
                [np.concatenate([d[i], pad[i][:, :, : padded - n]], 2) for d, n in zip(drawn, lengths, strict=True)]
            )
        )
        for i in range(3)
    )
    before = [row.alone.offset for row in rows]
    assert batch.offset.tolist() == before
    mask = batch.make_mask(padded)
    views = batch.update_and_fetch(k, v)
    fused = paired(*views).attend(q, 0.3, mask)
    array = mask if mask is None or isinstance(mask, str) else mx.array(mask)
    expanded = sdpa(q, mx.array(views[0]), mx.array(views[1]), scale=0.3, mask=array)
    plain = paired(*views).attend(q, 0.3, array)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        if n:
            want = row.attend(*drawn[i])
            for got in (fused, expanded, plain):
                assert mx.abs(got[i : i + 1, :, :n] - want).max() < 3e-6


def prompt(batch, rows, lengths, chunk):
    """A right-padded prompt in chunks, as mlx_lm's generator feeds it."""
    longest = max(lengths)
    ragged = min(lengths) < longest
    if ragged:
        batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    left = list(lengths)
    for at in range(0, longest, chunk):
        size = min(chunk, longest - at)
        step(batch, rows, [min(n, size) for n in left], size)
        left = [max(0, n - size) for n in left]
    if ragged:
        batch.finalize()


JOINS = st.lists(st.lists(st.integers(0, 70), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=25)
@given(JOINS, st.integers(3, 40), st.integers(1, 6), st.data(), st.sampled_from([(), (12, 0), (30, 2)]))
def test_rows_that_join_and_leave_attend_as_if_alone(joins, chunk, steps, data, window):
    batch, rows, seed = None, [], 0
    for lengths in joins:
        lengths[0] = lengths[0] or 1
        new = [Sequence(seed + i, *window) for i in range(len(lengths))]
        seed += len(new)
        joining = RotorCache.merge([new_cache(*window) for _ in new])
        prompt(joining, new, lengths, chunk)
        batch = joining if batch is None else (batch.extend(joining), batch)[1]
        rows = rows + new
        for _ in range(steps):
            step(batch, rows, [1] * len(rows), 1)
        keep = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True).map(sorted))
        batch = copy.deepcopy(batch)
        batch.filter(keep)
        rows = [rows[i] for i in keep]
    more = [5 + 9 * i for i in range(len(rows))]
    prompt(batch, rows, more, chunk)
    for i, row in enumerate(rows):
        own = batch.extract(i)
        assert own.offset == row.alone.offset
        for got, want in zip(own.keys_and_values(), row.alone.keys_and_values(), strict=True):
            assert mx.abs(got - want).max() < 2e-6


@pytest.mark.parametrize("window", [(60, 0), (96, 4)])
def test_rows_drop_what_no_query_sees_each_at_its_own_time(window):
    rows = [Sequence(i, *window) for i in range(3)]
    batch = RotorCache.merge([new_cache(*window) for _ in rows])
    prompt(batch, rows, [700, 5, 330], 200)
    for _ in range(40):
        step(batch, rows, [1] * 3, 1)
    assert [row.dropped for row in batch.rows] == [row.alone.dropped for row in rows] == [512, 0, 256]
    assert not batch.is_trimmable() and batch.offset.tolist() == [740, 45, 370]
    prompt(batch, rows, [3, 290, 1], 150)
    assert batch.offset.tolist() == [743, 335, 371]


def test_what_is_extracted_and_merged_is_independent():
    cache, row = new_cache(), Sequence(0, None)
    _, k, v = row.draw(40)
    cache.update_and_fetch(mx.array(k), mx.array(v))
    batch = cache.merge([cache, new_cache()])
    taken = batch.extract(0)
    batch.update_and_fetch(mx.ones((2, H, 3, D)), mx.ones((2, H, 3, D)))
    assert [c.offset for c in (cache, taken, *batch.rows)] == [40, 40, 43, 3]
    assert mx.array_equal(taken.keys_and_values()[0], cache.keys_and_values()[0])
    assert batch.trim(5) == 3 and batch.offset.tolist() == [40, 0]
    assert batch.size() == 40 and not batch.empty() and batch.is_trimmable()


def test_a_batch_holds_the_bytes_of_its_rows_and_no_padding():
    batch = RotorCache.merge([new_cache(), new_cache()])
    batch.prepare(lengths=[60, 1], right_padding=[0, 59])
    batch.update_and_fetch(mx.ones((2, H, 60, D)), mx.ones((2, H, 60, D)))
    batch.finalize()
    assert [row.held for row in batch.rows] == [60, 1]
    assert batch.nbytes == sum(row.nbytes for row in batch.rows)
    assert batch.rows[1].nbytes == 2 * H * D * 4 * 1  # one sink


def test_what_a_batch_can_not_take_is_an_error():
    batch = RaggedBatch([new_cache()])
    with pytest.raises(RotorError, match="left padding"):
        batch.prepare(left_padding=[3])
    with pytest.raises(RotorError, match="1 rows was given 2"):
        batch.update_and_fetch(mx.ones((2, H, 1, D)), mx.ones((2, H, 1, D)))
