"""Polynomial levels against Lloyd–Max, solved here from its definition and checked with published tables."""

from functools import cache

import numpy as np
import pytest

from mlx_rotor.codec.quantizer import SCALAR, TRELLIS, cuts

# Positive halves, in units of the coordinates' root mean square: N(0, 1) (Max 1960), and the density of a coordinate
# of a random vector of 128 dimensions.
GAUSSIAN = {
    2: (0.45278, 1.51042),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.94234, 1.256231, 1.618046, 2.069017, 2.73259),
}
SPHERE_128 = {
    2: (0.45245, 1.50519),
    3: (0.24442, 0.75333, 1.3366, 2.13147),
    4: (0.12787, 0.38638, 0.65362, 0.9371, 1.24777, 1.60434, 2.04593, 2.68886),
}
DISTORTION = {2: 0.11600, 3: 0.03397, 4: 0.00931}  # of the levels for 128 dimensions

X = np.linspace(-8, 8, 40_001)
NORMAL = np.exp(-X * X / 2)
SPHERE = np.maximum(1 - X * X / 128, 0) ** (125 / 2)
DENSITIES = {"normal": NORMAL, "sphere": SPHERE}


@cache
def lloyd_max(bits, density):
    """Levels that are their cells' means, cells bounded half-way between levels."""
    weight = DENSITIES[density]
    mass, moment = (
        np.concatenate([[0], np.cumsum((y[1:] + y[:-1]) / 2)]) for y in (weight, weight * X)
    )  # up to each X
    levels = np.linspace(-3, 3, 2**bits)
    for _ in range(1500):
        bounds = [-8, *(levels[1:] + levels[:-1]) / 2, 8]
        levels = np.diff(np.interp(bounds, X, moment)) / np.diff(np.interp(bounds, X, mass))
    return levels


def distortion(levels, density):
    """Relative squared error of the nearest level after the best scale: 1 - E[x c]² / (E[c²] E[x²])."""
    weight, c = DENSITIES[density], levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, X)]
    return 1 - (weight @ (X * c)) ** 2 / ((weight @ (c * c)) * (weight @ (X * X)))


@pytest.mark.parametrize(("density", "published"), [("normal", GAUSSIAN), ("sphere", SPHERE_128)])
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_solver_here_finds_the_published_tables(bits, density, published):
    levels = lloyd_max(bits, density)
    assert levels[2 ** (bits - 1) :] == pytest.approx(published[bits], abs=2e-4)
    if density == "sphere":
        assert distortion(levels, density) == pytest.approx(DISTORTION[bits], rel=2e-3)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_polynomials_cost_at_most_half_a_per_cent(bits, density):
    best = distortion(lloyd_max(bits, density), density)
    ours = distortion(SCALAR[bits].levels().astype(np.float64), density)
    assert best * (1 - 1e-4) <= ours <= best * 1.005


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("curves", [SCALAR, TRELLIS], ids=["scalar", "trellis"])
def test_levels_are_odd_ascending_half_precision_polynomials(curves, bits):
    curve = curves[bits]
    levels = curve.levels()
    assert len(levels) == curve.count == 2 ** (bits + (curves is TRELLIS))
    assert levels.dtype == np.float32 and np.array_equal(levels, levels.astype(np.float16))
    assert np.array_equal(levels, -levels[::-1]) and (np.diff(levels) > 0).all()
    u = np.arange(curve.count) - (curve.count - 1) / 2
    assert levels == pytest.approx(u * (curve.a + curve.b * u**2 + curve.c * u**4), rel=6e-4)


@pytest.mark.parametrize("step", (1, 4))
def test_cuts_are_half_way(step):
    for curve in (*SCALAR.values(), *TRELLIS.values()):
        levels = curve.levels().astype(np.float64)
        assert list(cuts(curve, step)) == [(a + b) / 2 for a, b in zip(levels, levels[step:], strict=False)]
