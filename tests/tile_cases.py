"""Random packed weights, and products with them in tiles against the references."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kernel_cases import TOLERANCE, distance, normal, running
from mlx_rotor.experts import formats
from mlx_rotor.kernels.experts import reference, tiles
from mlx_rotor.kernels.spec import PackedWeight

EVERY = [
    *(("affine", bits, group) for bits, group in ((1, 64), (2, 64), (3, 128), (4, 32), (5, 64), (6, 32), (8, 64))),
    *(("lloyd", bits, group) for bits, group in ((2, 256), (3, 64), (4, 128))),
    ("iq4_nl", 4, 16),
    ("iq4_nl", 4, 32),
    ("q8", 8, 32),
]
RAGGED = (1, 40, 0, 3, 0, 24)  # rows of each expert


def packed(name, *lead, columns, dtype=mx.float16, bias=False, seed=0) -> PackedWeight:
    """Weights [*lead, columns] of random bits, `name` being a format's mode, bits and group size."""
    rng, made = np.random.default_rng([seed, columns]), formats.get(*name)
    words, *beside = made.tensors(lead, columns)
    parts = [mx.array(rng.integers(0, 2**32, words.shape, dtype=np.uint32))]
    parts += [(0.1 * normal(rng, *tensor.shape)).astype(dtype) for tensor in beside]
    return PackedWeight(made, tuple(parts), columns, normal(rng, *lead).astype(dtype) if bias else None)


def rows_of(count, columns, dtype=mx.float32, seed=1) -> mx.array:
    return normal(np.random.default_rng([seed, count]), count, columns).astype(dtype)


def experts_of(counts) -> mx.array:
    """Ascending: each expert as often as `counts` says."""
    return mx.array(np.repeat(np.arange(len(counts)), counts).astype(np.uint32))


def dense_off(x, w, block=None) -> float:
    """How far the product is from its reference; `block`: rows that a threadgroup takes, None: the launch's choice."""
    got = tiles.matmul_tiled(x, w) if block is None else tiles._launch(x, w, {}, len(x), block)
    assert got.dtype == x.dtype
    with mx.stream(mx.cpu):
        return distance(got, reference.matmul(x.astype(mx.float32), w))


def sorted_off(x, w, indices, block=None) -> float:
    got = (
        tiles.gather_tiled(x, w, indices) if block is None else tiles._launch(x, w, {"indices": indices}, len(x), block)
    )
    assert got.dtype == x.dtype
    with mx.stream(mx.cpu):
        return distance(got, reference.gather(x.astype(mx.float32), w, indices))


def agree(off, x, *args, options=None, **how) -> None:
    with running(options) as simulator:
        assert off(x, *args, **how) <= TOLERANCE[x.dtype]
    assert simulator.objections == []
