"""Vectors to encode, and how far off a decoded one is."""

import mlx.core as mx
import numpy as np

DIMS = (64, 80, 96, 112, 128, 192, 256)


def gaussian(n, dim, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def relative_error(x, y):
    x, y = np.array(x, np.float64), np.array(y, np.float64)
    return ((x - y) ** 2).sum() / (x**2).sum()
