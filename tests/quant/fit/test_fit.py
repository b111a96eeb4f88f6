import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.fit import rows
from mlx_rotor.quant.fit import FITS, decode, fit, pack, squared_error
from mlx_rotor.quant.policy import BITS, FIXED, GROUP_SIZES, Spec


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a little-endian bit stream, bit by bit."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*words.shape[:-1], -1, bits).astype(np.int64)
    return (codes << np.arange(bits)).sum(-1)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_what_mlx_reads(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 256)).astype(np.uint32)
    words = pack(mx.array(codes), bits)
    assert words.dtype == mx.uint32 and words.shape == (3, 5, 256 * bits // 32)
    np.testing.assert_array_equal(unpack(np.array(words), bits), codes)
    ones, zeros = mx.ones((3, 5, 4)), mx.zeros((3, 5, 4))
    np.testing.assert_array_equal(np.array(mx.dequantize(words, ones, zeros, group_size=64, bits=bits)), codes)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_is_scale_times_code_plus_bias(bits, group_size):
    spec = Spec(bits, group_size)
    w = mx.random.normal((2, 24, 256), key=mx.random.key(bits))
    found = fit(w, spec)
    codes, scales, biases = found.parts
    assert scales.dtype == biases.dtype == mx.bfloat16
    assert codes.shape == (2, 24, 256 * bits // 32) and scales.shape == (2, 24, 256 // group_size)
    scale, bias = (np.repeat(np.array(a.astype(mx.float32)), group_size, -1) for a in (scales, biases))
    stored = scale * unpack(np.array(codes), bits).astype(np.float32) + bias
    np.testing.assert_allclose(np.array(decode(found, spec)), stored, rtol=0, atol=1e-6)
    error, norm = squared_error(w, found, spec)
    assert error == pytest.approx(float(((stored - np.array(w)) ** 2).sum()), rel=1e-3)
    assert norm == pytest.approx(float((np.array(w) ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_the_codes_are_the_nearest_for_the_rounded_scale(bits):
    spec = Spec(bits, 64)
    w = mx.random.normal((64, 128), key=mx.random.key(1)) + 0.5
    found = fit(w, spec)
    grid = np.arange(2**bits, dtype=np.float32)
    scale, bias = (np.array(a.astype(mx.float32)).reshape(-1, 1, 1) for a in found.parts[1:])
    distance = np.abs(scale * grid + bias - np.array(w).reshape(-1, 64, 1)).min(-1)
    stored = np.abs(np.array(decode(found, spec) - w)).reshape(-1, 64)
    np.testing.assert_allclose(stored, distance, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "group_size", "plain", "target"),
    [(2, 64, 0.155, 0.103), (2, 128, 0.180, 0.111), (3, 128, 0.043, 0.033), (4, 64, 0.0083, 0.0069)],
)
def test_gaussian_weights_lose_much_less_than_with_mx_quantize(bits, group_size, plain, target):
    spec = Spec(bits, group_size)
    w = mx.random.normal((512, 512), key=mx.random.key(3))
    nmse = {m: np.divide(*squared_error(w, fit(w, spec, m), spec)) for m in FITS}
    assert nmse["fast"] == pytest.approx(plain, rel=0.02)
    assert nmse["best"] < nmse["search"] < target


def test_fast_is_mx_quantize():
    w = mx.random.normal((32, 128), key=mx.random.key(4))
    found = fit(w, Spec(3, 64), "fast")
    for mine, theirs in zip(found.parts, mx.quantize(w.astype(mx.bfloat16), 64, 3), strict=True):
        assert mine.dtype == theirs.dtype and mx.array_equal(mine, theirs)


@pytest.mark.parametrize("bits", BITS)
def test_groups_without_spread_are_stored_as_they_are(bits):
    spec = Spec(bits, 32)
    w = mx.repeat(mx.array([0.0, 1.0, -0.75, 1e-6]).astype(mx.bfloat16).astype(mx.float32)[:, None], 64, axis=1)
    np.testing.assert_allclose(np.array(decode(fit(w, spec), spec)), np.array(w), rtol=1e-6)


def test_two_valued_groups_are_stored_exactly():
    rng = np.random.default_rng(5)
    w = mx.array(rng.choice(np.array([-0.5, 0.25], np.float32), (16, 64)))
    np.testing.assert_array_equal(np.array(decode(fit(w, Spec(2, 64)), Spec(2, 64))), np.array(w))


@pytest.mark.parametrize("method", FITS)
def test_the_result_does_not_depend_on_the_chunk(monkeypatch, method):
    w = mx.random.normal((50, 128), key=mx.random.key(6))
    whole = fit(w, Spec(3, 64), method)
    monkeypatch.setattr(rows, "CPU_WEIGHTS", 1000)
    monkeypatch.setattr(rows, "GPU_WEIGHTS", 1000)
    pieces = fit(w, Spec(3, 64), method)
    for a, b in zip(whole.parts, pieces.parts, strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("method", FITS)
def test_work_is_bounded_by_the_chunk(monkeypatch, method):
    monkeypatch.setattr(rows, "CPU_WEIGHTS", 1 << 12)
    monkeypatch.setattr(rows, "GPU_WEIGHTS", 1 << 12)
    w, importance = mx.random.normal((4096, 128), key=mx.random.key(7)), mx.ones((128,))
    mx.eval(w, importance)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fit(w, Spec(2, 64), method, importance)
    packed = w.size * 2 // 8 + w.size // 64 * 4
    assert mx.get_peak_memory() - before < 3 * packed + 24 * 4 * (1 << 12) < w.nbytes / 1.5


@pytest.mark.parametrize("mode", FIXED)
def test_other_modes_are_mx_quantize(mode):
    spec = Spec(*FIXED[mode], mode)
    w = mx.random.normal((3, 8, 128), key=mx.random.key(8))
    found = fit(w, spec, "best", importance=mx.ones((128,)))
    weight, scales = mx.quantize(w.astype(mx.bfloat16), spec.group_size, spec.bits, mode=mode)
    assert all(mx.array_equal(a, b) for a, b in zip(found.parts, (weight, scales), strict=True))
    decoded = mx.dequantize(weight, scales, None, spec.group_size, spec.bits, mode=mode).astype(mx.float32)
    assert squared_error(w, found, spec)[0] == pytest.approx(mx.square(decoded - w).sum().item(), rel=1e-3)


def test_bad_calls_say_what_is_wrong():
    with pytest.raises(RotorError, match="group_size 64 does not divide 96"):
        fit(mx.zeros((4, 96)), Spec(4, 64))
    with pytest.raises(RotorError, match="mxfp4: groups of 32 do not divide 48"):
        fit(mx.zeros((4, 48)), Spec(4, 32, "mxfp4"))
    with pytest.raises(RotorError, match="nvfp4 holds 2688 at most, a weight is 3000"):
        fit(mx.full((4, 64), -3000.0), Spec(4, 16, "nvfp4"))
    with pytest.raises(RotorError, match="unknown fit 'slow'; fits: fast, search, best"):
        fit(mx.zeros((4, 64)), Spec(4, 64), "slow")
