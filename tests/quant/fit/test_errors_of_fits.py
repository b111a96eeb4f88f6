"""What the formats say of their fits' errors on normal weights is what is measured."""

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.experts import formats
from mlx_rotor.quant.fit import FITS, FIXED_ERRORS, measure, relative_error
from mlx_rotor.quant.spec import BITS, FIXED, GROUP_SIZES, Spec


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (2, 128), (3, 64), (4, 128), (6, 32), (8, 64)])
def test_the_table_is_what_is_measured(bits, group_size, fit):
    # Other weights than the table's.
    measured = measure(Spec(bits, group_size), fit, rows=256, seed=1)
    assert relative_error(bits, group_size, fit) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("mode", FIXED)
def test_so_is_that_of_the_other_modes(mode):
    bits, size = FIXED[mode]
    measured = measure(Spec(bits, size, mode), "search", rows=256, seed=1)
    assert relative_error(bits, size, mode=mode) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "spec", [Spec(2, 256, "lloyd"), Spec(4, 64, "lloyd"), Spec(4, 16, "iq4_nl"), Spec(8, 32, "q8")]
)
def test_and_of_those_that_mlx_does_not_have(spec, fit):
    measured = measure(spec, fit, rows=128, seed=1)
    assert relative_error(spec.bits, spec.group_size, fit, spec.mode) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("mode", formats.ours())
def test_errors_fall_with_effort_and_with_smaller_groups(mode):
    errors = formats.kind(mode).errors
    for (bits, size), found in errors.items():
        assert found[0] > found[1] >= found[2] > 0
        if larger := errors.get((bits, 2 * size)):
            assert all(a < b for a, b in zip(found, larger, strict=True))


def test_errors_of_mlxs_own_fall_with_bits_smaller_groups_and_effort():
    errors = formats.kind("affine").errors
    assert set(errors) == {(b, g) for b in BITS for g in GROUP_SIZES} and set(FIXED_ERRORS) == set(FIXED)
    for (bits, size), found in errors.items():
        assert found[0] > found[1] > found[2] > 0
        if size < 128:
            assert all(a < b for a, b in zip(found, errors[bits, 2 * size], strict=True))
        if bits < 8:
            assert all(a > 3 * b for a, b in zip(found, errors[BITS[BITS.index(bits) + 1], size], strict=True))


def test_unknown_formats_and_fits_are_errors():
    with pytest.raises(RotorError, match="bits = 7"):
        relative_error(7, 64)
    with pytest.raises(RotorError, match="unknown fit 'slow'"):
        relative_error(4, 64, "slow")
