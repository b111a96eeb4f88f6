"""Segments: copies share memory, there are few of them, and no order of appends, cuts and copies changes a token."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rotor.cache.body import MANY, SPAN, Body


def vectors(n, d=32, seed=0):
    x = np.random.default_rng([seed, n]).standard_normal((1, 2, n, d)).astype(np.float32)
    return mx.array(x)


def grow(body, x, n):
    part = x[:, :, body.length : body.length + n]
    body.append(part, -part, x[:, :, body.length :], -x[:, :, body.length :])


def values(body):
    """(K, V) of all tokens, rotated back."""
    segments = body.first(body.length)
    assert sum(segment.length for segment in segments) == body.length
    return [
        mx.concatenate(
            [s.codec.unrotate(s.rotated(0, n)) for s, n in ((getattr(g, kv), g.length) for g in segments)], 2
        )
        for kv in "kv"
    ]


def check(body, x, tolerance=1e-6):
    assert sum(segment.length for segment in body.segments) == body.length
    assert all(not s.open and s.length % SPAN == 0 for s in body.segments[:-1])
    assert sum(not s.open for s in body.segments) <= MANY + 1
    if body.length:
        k, v = values(body)
        want = x[:, :, : body.length]
        assert mx.abs(k - want).max() <= tolerance and mx.abs(v + want).max() <= tolerance


STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "trim", "copy", "both", "drop"]), st.integers(1, 700)), min_size=1, max_size=14
)


@settings(max_examples=60)
@given(STEPS, st.booleans())
def test_any_order_of_appends_trims_and_copies(steps, centre):
    x = vectors(10_000)
    body = Body("raw32", "raw32", centre, [])
    start, others = 0, []
    for what, n in steps:
        if what == "append":
            grow(body, x[:, :, start:], n)
        elif what == "trim":
            body.trim(min(n, body.length))
        elif what == "drop":
            n = min(n, body.length) // SPAN * SPAN
            body.drop(n)
            start += n
        elif what == "copy":
            body = body.copy()
        else:
            others.append((start, body.length, body.copy()))
    check(body, x[:, :, start:])
    for at, length, other in others:
        assert other.length == length
        check(other, x[:, :, at:])
        grow(other, x[:, :, at:], 40)
        check(other, x[:, :, at:])
    check(body, x[:, :, start:])


def test_a_copy_adds_less_than_a_span():
    x = vectors(3000, 64)
    body = Body("turbo4", "turbo4", True, [])
    grow(body, x, 2900)
    mx.eval(body.arrays)
    other = body.copy()
    before = mx.get_active_memory()
    grow(other, x, 32)
    mx.eval(other.arrays)
    room_of_a_span = 2 * 2 * SPAN * (64 * 4 // 8 + 2)
    assert other.length == 2932 and len(other.segments) == 2
    assert mx.get_active_memory() - before <= 2 * room_of_a_span + 8192


def test_copies_without_end_leave_few_segments():
    x = vectors(12_000)
    body = Body("raw32", "raw32", True, [])
    for _ in range(30):
        grow(body, x, 350)
        body = body.copy()
        assert len(body.segments) <= MANY + 1
        assert all(s.v.mean is body.segments[0].v.mean for s in body.segments)  # attention reads one
    check(body, x)


@pytest.mark.parametrize("centre", [False, True])
def test_a_dropped_front_frees_its_memory(centre):
    x = vectors(4000)
    body = Body("raw32", "raw32", centre, [])
    grow(body, x, 4000)
    body.drop(3 * SPAN)
    body.drop(9 * SPAN)
    check(body, x[:, :, 12 * SPAN :])
    assert sum(a.nbytes for a in body.arrays) < 1.2 * 928 * 2 * 2 * (32 * 4 + 2) + 4096
