"""Experts whose intermediate values overflow float16 are named; rescaling them is exact."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from given import Given

from mlx_rotor import bundled
from mlx_rotor.errors import RotorError
from mlx_rotor.quant import policy as policies
from mlx_rotor.quant.calibrate.moments import Moments
from mlx_rotor.quant.folding.proof import check
from mlx_rotor.quant.folding.scales import FLOAT16, Oversized, down_foldings, oversized, rescaling
from mlx_rotor.quant.folding.search import ScaleFolding
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.source import Checkpoint

BUNDLED = json.loads((bundled.MODEL / "config.json").read_text())
KEPT = policies.parse('[[rule]]\nroles = ["attn.o"]\nkeep = true\n[[rule]]\nroles = ["*"]\nbits = 2\n', "kept")
TOKENS = np.random.default_rng(3).integers(0, 200, (2, 12))


@pytest.fixture(scope="module")
def plan():
    return make_plan(BUNDLED, KEPT)


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open(bundled.MODEL, BUNDLED)


class Peaking:
    """Statistics of experts' intermediate values."""

    def __init__(self, peaks):
        self.peaks = peaks

    def importance(self, entry, part=0):
        return None

    def hessian(self, entry, part=0):
        return None

    def inputs(self, entry):
        return entry.module

    def peak(self, entry, part):
        return self.peaks.get(part)


def test_experts_above_float16_are_found_and_rescaled_exactly(plan, checkpoint, tmp_path):
    peaks = {1: 65504.0, 3: 65505.0, 7: 1e6}
    entries = [e for e in plan.entries if e.layer == 0]
    (fold,) = down_foldings(entries, "minimax_m2")
    found = oversized(fold, Peaking(peaks))
    assert [(o.expert, o.peak) for o in found] == [(3, 65505.0), (7, 1e6)]
    for o in found:
        assert np.log2(o.factor) % 1 == 0 and o.peak / o.factor <= FLOAT16 / 4 < 2 * o.peak / o.factor
    assert rescaling(fold, found).keys() == {3, 7}

    guide = ScaleFolding(Given(checkpoint, Peaking(peaks)), plan, "minimax_m2", "fast", tmp_path, rescale=True)
    weights, _ = guide.layer(0, entries)
    ratio = np.array(weights.read(fold.up, 7)) / np.array(checkpoint.read(fold.up, 7))
    np.testing.assert_array_equal(ratio[np.isfinite(ratio)], np.float32(1 / found[1].factor))
    assert mx.array_equal(weights.read(fold.down, 7), checkpoint.read(fold.down, 7) * found[1].factor)
    assert check(BUNDLED, plan, checkpoint, guide.found[0].scales, TOKENS, layers=[0]) == 0
    rows = [row for row in guide.describe()["folds"] if "expert" in row]
    assert [(r["layer"], r["expert"], r["rescaled_by"]) for r in rows] == [(0, 3, 8.0), (0, 7, 64.0)]


def test_without_being_asked_they_are_only_named(plan, checkpoint, tmp_path):
    guide = ScaleFolding(Given(checkpoint, Peaking({7: 1e6})), plan, "minimax_m2", "fast", tmp_path)
    guide.layer(0, [])
    assert guide.found[0].large == (Oversized("model.layers.0.block_sparse_moe.switch_mlp.down_proj", 7, 1e6),)
    assert guide.found[0].scales == {} and guide.describe()["folds"][0]["rescaled_by"] == 1


def test_statistics_without_peaks_can_find_none(plan, checkpoint, tmp_path):
    class Squares:
        importance = hessian = lambda *_: None

    guide = ScaleFolding(Given(checkpoint, Squares()), plan, "minimax_m2", "fast", tmp_path, rescale=True)
    with pytest.raises(RotorError, match="--calibration"):
        guide.layer(0, [])


def test_moments_keep_the_largest_input():
    moments = Moments(products=False)
    assert moments.peak == 0
    moments.add(mx.array([[1.0, -7.0], [2.0, 3.0]]))
    moments.add(mx.array([[4.0, 5.0]]))
    assert moments.peak == 7
