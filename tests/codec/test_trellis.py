"""The trellis against its definition, one element at a time, and its search against all paths."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from samples import DIMS, gaussian

from mlx_rotor import codec
from mlx_rotor.codec import trellis
from mlx_rotor.codec.quantizer import TRELLIS
from mlx_rotor.codec.trellis import TrellisQuantizer

# Levels without a polynomial's constraint, positive halves: the same iteration under the trellis, at 128 dimensions.
FREE = {
    2: (0.1991, 0.6061, 1.0734, 1.8639),
    3: (0.1082, 0.3068, 0.5326, 0.7589, 1.0243, 1.3402, 1.7789, 2.4687),
    4: (
        0.0614, 0.1678, 0.2895, 0.4017, 0.5210, 0.6403, 0.7657, 0.8921,
        1.0360, 1.1827, 1.3550, 1.5417, 1.7672, 2.0563, 2.4399, 3.0207,
    ),
}  # fmt: skip


def subsets(path):
    """2 z1 + z0 of every element, from z1 = p[t] ^ p[t-1] ^ p[t-3], z0 = p[t-2] with zeros before the first."""
    at = lambda t: path[t] if t >= 0 else 0  # noqa: E731
    return [2 * (at(t) ^ at(t - 1) ^ at(t - 3)) + at(t - 2) for t in range(len(path))]


def nearest(levels, unit):
    """For each element of unit [V, d] and each subset: the squared distance of its nearest level, [V, d, 4]."""
    miss = (unit[..., None, None] - levels.reshape(-1, 4)) ** 2  # level 4 A + z is in subset z
    return miss.min(-2)


def viterbi(levels, unit):
    """The least squared error of any path, [V], in float64: the best of every state (p[t-1], p[t-2], p[t-3])."""
    cost = np.full((len(unit), 8), np.inf)
    cost[:, 0] = 0
    squares = nearest(levels, unit)
    for t in range(unit.shape[1]):
        after = np.full_like(cost, np.inf)
        for state, p in itertools.product(range(8), (0, 1)):
            p1, p2, p3 = state >> 2 & 1, state >> 1 & 1, state & 1
            z = 2 * (p ^ p1 ^ p3) + p2
            to = p << 2 | p1 << 1 | p2
            after[:, to] = np.minimum(after[:, to], cost[:, state] + squares[:, t, z])
        cost = after
    return cost.min(-1)


def error(unit, c):
    return ((np.array(unit, np.float64) - np.array(c, np.float64)) ** 2).sum(-1)


@pytest.mark.parametrize("dim", (64, 80, 256))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_codes_decode_as_defined(bits, dim):
    code = np.random.default_rng(bits).integers(0, 2**bits, (6, dim)).astype(np.uint8)
    got = np.array(TrellisQuantizer(bits, dim).levels(mx.array(code)))
    levels = TRELLIS[bits].levels()
    for row, vector in zip(got, code, strict=True):
        split = [divmod(int(c), 4) if bits == 3 else (c & 1, c >> 1) for c in vector]
        path = [p for p, _ in split]
        expected = [levels[4 * a + z] for (_, a), z in zip(split, subsets(path), strict=True)]
        assert row.tolist() == expected


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_no_path_is_better(bits):
    d = 9
    unit = np.random.default_rng(bits).standard_normal((12, d)).astype(np.float32)
    squares = nearest(TRELLIS[bits].levels().astype(np.float64), unit)
    paths = [subsets(path) for path in itertools.product((0, 1), repeat=d)]
    best = np.min([squares[:, range(d), z].sum(-1) for z in paths], axis=0)
    _, c = TrellisQuantizer(bits, d).search(mx.array(unit))
    assert error(unit, c) == pytest.approx(best, rel=1e-5)
    assert viterbi(TRELLIS[bits].levels().astype(np.float64), unit) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_search_finds_the_least_error_and_says_how(bits, dim):
    unit = gaussian(40, dim, seed=dim)
    quantizer = TrellisQuantizer(bits, dim)
    code, c = quantizer.search(unit)
    assert code.dtype == mx.uint8 and code.max().item() < 2**bits
    assert mx.array_equal(quantizer.levels(code), c)
    best = viterbi(TRELLIS[bits].levels().astype(np.float64), np.array(unit, np.float64))
    assert error(unit, c) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_polynomial_levels_cost_at_most_half_a_per_cent(bits):
    x = np.array(gaussian(1500, 128, seed=7), np.float64)
    x /= np.sqrt((x * x).mean(-1, keepdims=True))
    free = np.array([-level for level in FREE[bits]][::-1] + list(FREE[bits]))
    ours, best = (viterbi(levels, x).mean() for levels in (TRELLIS[bits].levels().astype(np.float64), free))
    assert ours <= best * 1.005


def test_many_vectors_are_searched_in_parts(monkeypatch):
    x = gaussian(70, 64)
    whole = codec.get("trellis3", 64).encode(x)
    monkeypatch.setattr(trellis, "VECTORS", 32)
    parts = codec.get("trellis3", 64).encode(x)
    assert mx.array_equal(whole.words, parts.words) and mx.array_equal(whole.scale, parts.scale)
    shaped = codec.get("trellis3", 64).encode(x.reshape(2, 5, 7, 64))
    assert mx.array_equal(shaped.words.reshape(70, -1), whole.words)
