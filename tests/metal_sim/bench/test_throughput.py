"""The throughput model: hand-computed cases, and the published ratios that its devices must have."""

from __future__ import annotations

import pytest

from metal_sim.bench.throughput import ASSUMED, CYCLES, DEVICES, MEASURED, Device, cycles, predict, predicted_seconds
from metal_sim.operations import KINDS
from mlx_rotor.errors import RotorError

ONE = Device("one core at 1 GHz, 128 GB/s", 1, 1.0, 128)  # 128 FMAs and 128 bytes a nanosecond


def test_arithmetic_adds_cycles():
    operations = {"fma": 1280, "shift": 256, "reduction": 128, "half": 10_000}
    assert cycles(operations) == {"fma": 1280, "shift": 1024, "reduction": 1856, "half": 0}
    assert predict(operations, 0, ONE).arithmetic == pytest.approx((10 + 8 + 14.5) * 1e-9)


def test_pipelines_overlap_at_best():
    # Three products and an integer product: 7 cycles apart, 4 together (5.2 measured).
    operations = {"float": 3 * 128, "multiply": 128}
    got = predict(operations, 0, ONE)
    assert (got.arithmetic, got.overlapped) == (pytest.approx(7e-9), pytest.approx(4e-9))
    # Ten products leave no slot empty: 10 and one to issue the integer product.
    assert predict({"float": 1280, "multiply": 128}, 0, ONE).overlapped == pytest.approx(11e-9)
    # Three integer products and a sum: 12 (12.0 measured).
    assert predict({"float": 128, "multiply": 3 * 128}, 0, ONE).overlapped == pytest.approx(12e-9)


def test_the_slower_of_arithmetic_and_memory():
    assert predicted_seconds({"fma": 128}, 1280, ONE) == pytest.approx(10e-9)
    assert predicted_seconds({"fma": 2560}, 1280, ONE) == pytest.approx(20e-9)
    assert predict({"fma": 128, "exp2": 256}, 640, ONE).at_best == pytest.approx(8e-9)


def test_a_device_twice_as_large_takes_half_the_time():
    two = Device("two", 2, 1.0, 256)
    operations = {"fma": 12_800, "convert": 640}
    assert predicted_seconds(operations, 0, two) == predicted_seconds(operations, 0, ONE) / 2
    assert predicted_seconds({}, 4096, two) == predicted_seconds({}, 4096, ONE) / 2


@pytest.mark.parametrize(("name", "ratio"), [("M1 Max", 13), ("M2 Pro", 17), ("M3 Ultra", 17), ("M4 Max", 15)])
def test_devices_have_the_published_balance(name, ratio):
    assert DEVICES[name].name == name
    assert DEVICES[name].fma_per_byte == pytest.approx(ratio, rel=0.03)


def test_m1_max_does_5_3_trillion_fmas_a_second():
    assert DEVICES["M1 Max"].fma_rate == pytest.approx(5.308e12, rel=1e-3)


def test_a_figure_is_measured_or_assumed_and_not_both():
    assert not set(MEASURED) & set(ASSUMED)


def test_every_kind_the_simulator_counts_has_a_figure():
    assert set(KINDS) <= set(CYCLES)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(RotorError, match=r"no throughput figure for operations of kind telepathy; known: \["):
        predict({"fma": 1, "telepathy": 2}, 0, ONE)
