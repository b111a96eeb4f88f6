"""Checks of kernels: the real ones in the simulator pass, broken ones are reported, whatever is broken about them."""

import mlx.core as mx
import pytest

import metal_sim
from mlx_rotor import RotorError, codec
from mlx_rotor.diagnose import attention_check, checking
from mlx_rotor.diagnose.attention_check import AttentionCheck, Size, run
from mlx_rotor.kernels import check_results, metal
from mlx_rotor.kernels.packing import encode_reference

SMALL = Size(encoded=40, packed=70, recent=9, prefill=9)
DIM = 64
simulated = pytest.mark.skipif(not metal_sim.SUPPORTED, reason=metal_sim.UNSUPPORTED)


@pytest.fixture(autouse=True)
def backend(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path))
    check_results.forget()
    yield
    metal.use_maker(None)
    check_results.forget()


def making(spoil, only=""):
    """Kernels of the simulator; `spoil` gets the outputs of those with `only` in their names and returns others."""

    def maker(name, **text):
        kernel = metal_sim.Kernel(name=name, **text)
        return lambda **launch: spoil(kernel(**launch)) if only in name else kernel(**launch)

    metal.use_maker(maker)


def references(made, spoil):
    """Kernels that encode as the reference does, then spoil."""
    metal.use_maker(lambda **text: lambda *, inputs, **launch: spoil(*encode_reference(made, inputs[0])))


def flipped(tiles, words):
    """The lowest bit of the first `words` words."""
    flat = tiles.reshape(-1)
    return (flat ^ (mx.arange(flat.size) < words).astype(mx.uint32)).reshape(tiles.shape)


@simulated
@pytest.mark.parametrize(
    ("kind", "k", "v", "dim", "dtype"),
    [
        ("encode", "turbo4", "turbo4", DIM, mx.float16),
        ("encode", "trellis3", "trellis3", 80, mx.bfloat16),
        ("decode, 1 row", "turbo4", "turbo2", DIM, mx.float16),
        ("decode, 8 rows", "rotor3", "rotor3", DIM, mx.float32),
        ("prefill", "turbo4", "turbo2", DIM, mx.bfloat16),
        ("rotate", "turbo3", "turbo3", 96, mx.float16),
        ("rotate", "rotor4", "rotor4", 80, mx.float32),
        ("dequantize", "iso3", "iso3", 80, mx.float32),
        ("rotate", "isofull2", "isofull2", 80, mx.float32),
        ("encode", "fp8", "fp8", 80, mx.float16),
        ("decode, 1 row", "fp8", "fp8", DIM, mx.float16),
        ("prefill", "fp8", "fp8", DIM, mx.float16),
        ("dequantize", "fp8", "fp8", 96, mx.float32),
        ("encode, centred", "turbo3", "turbo3", 80, mx.float16),
        ("dequantize, centred", "iso3", "iso3", 80, mx.bfloat16),
        ("decode, segments", "turbo4", "trellis3", DIM, mx.float32),
        ("prefill, segments", "rotor3", "rotor3", 80, mx.float16),
        ("decode, segments", "fp8", "fp8", DIM, mx.float16),
    ],
)
def test_the_kernels_pass(kind, k, v, dim, dtype):
    metal.use_maker(metal_sim.Kernel)
    outcome = run(AttentionCheck(kind, k, v, dim, dtype), SMALL)
    assert outcome.passed, outcome.note
    assert outcome.note == "" and outcome.error < outcome.tolerance / 2
    if kind.startswith("encode"):
        assert outcome.error == 0


@simulated
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda outs: [outs[0] * 1.01], ""),
        (lambda outs: [mx.concatenate([outs[0][..., :-1], outs[0][..., -1:] + 0.1], axis=-1)], ""),
        (lambda outs: [mx.full(outs[0].shape, mx.nan)], "NaN or infinity"),
        (lambda outs: [outs[0][..., 1:]], "float32 (1, 2, 1, 63) instead of"),
        (lambda outs: [outs[0].astype(mx.float16)], "float16 (1, 2, 1, 64) instead of"),
    ],
)
def test_a_broken_attention_fails(spoil, says):
    making(spoil, only="merge")
    outcome = run(AttentionCheck("decode, 1 row", "turbo4", "turbo4", DIM, mx.float32), SMALL)
    assert not outcome.passed and says in outcome.note
    assert outcome.error is None or outcome.error > outcome.tolerance


@simulated
@pytest.mark.parametrize("turn", [0, 1])
def test_a_broken_rotation_fails_in_either_direction(turn):
    calls = []

    def spoil(outs):
        calls.append(outs)
        return [outs[0] * (1.1 if len(calls) == turn + 1 else 1)]

    making(spoil, only="rotate")
    outcome = run(AttentionCheck("rotate", "turbo3", "turbo3", DIM, mx.float32), SMALL)
    assert not outcome.passed and outcome.error == pytest.approx(0.1, rel=1e-3) and len(calls) == 2


@pytest.mark.parametrize(
    ("spoil", "passed", "says"),
    [
        (lambda tiles, scale: [tiles, scale], True, ""),
        (lambda tiles, scale: [flipped(tiles, 1), scale], True, "not bit-identical: 1 of 9000 words"),
        (lambda tiles, scale: [flipped(tiles, 12), scale], False, "not bit-identical: 12 of 9000 words"),
        (lambda tiles, scale: [tiles ^ mx.array(1 << 31, mx.uint32), scale], False, "not bit-identical: 8000 of 9000"),
        (lambda tiles, scale: [tiles, scale * 1.2], False, "; distortion +"),
        (lambda tiles, scale: [tiles, mx.zeros_like(scale)], False, "; distortion +"),
        (lambda tiles, scale: [tiles, scale * mx.nan], False, "; distortion +nan"),
        (lambda tiles, scale: [tiles, mx.view(mx.view(scale, mx.uint16) + 1, mx.float16)], True, "scales rounded"),
        (lambda tiles, scale: [tiles[..., :-32], scale], False, ""),
    ],
)
def test_words_that_differ_pass_where_they_are_few_and_cost_nothing(spoil, passed, says):
    made = codec.get("turbo4", DIM)
    references(made, spoil)
    outcome = run(AttentionCheck("encode", "turbo4", "turbo4", DIM, mx.float32), Size(encoded=500))
    assert outcome.passed == passed, outcome.note
    assert says in outcome.note and bool(outcome.note) == (says != "" or not passed)


def test_a_kernel_that_does_not_compile_fails_with_the_compilers_words():
    def maker(**text):
        raise RuntimeError("Unable to build metal library\nerror: no such type\n")

    metal.use_maker(maker)
    for kind in attention_check.KINDS:
        outcome = run(AttentionCheck(kind, "turbo4", "turbo4", DIM, mx.float16), SMALL)
        assert not outcome.passed and outcome.error is None
        assert outcome.note == "RuntimeError: Unable to build metal library error: no such type"


def test_outcomes_become_results_that_name_the_check():
    references(codec.get("turbo4", DIM), lambda tiles, scale: [tiles, scale * 2])
    bad = run(AttentionCheck("encode", "turbo4", "turbo4", DIM, mx.float32), SMALL)
    checking.record([bad])
    with pytest.raises(RotorError, match="encode: turbo4, 64 x float32"):
        check_results.refuse("encode", mx.float32, codec.get("turbo4", DIM))
    assert not run(bad.check, SMALL).passed, "a refused kernel is checked again"
    references(codec.get("turbo4", DIM), lambda tiles, scale: [tiles, scale])
    checking.record([run(bad.check, SMALL)])
    check_results.refuse("encode", mx.float32, codec.get("turbo4", DIM))
    assert bad.to_dict()["check"] == bad.check.name and bad.to_dict()["passed"] is False


def test_a_reference_is_not_compared_with_itself(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    with pytest.raises(RotorError, match="this is reference"):
        run(AttentionCheck("encode", "turbo4", "turbo4", DIM, mx.float32), SMALL)


def test_the_plan_covers_the_registry():
    every, quick = attention_check.every(), attention_check.quick()
    assert len({check.name for check in every}) == len(every)
    assert set(quick) < set(every) and len(quick) < len(every) / 4
    names = [name for name in codec.names() if codec.get(name, 128).kernel is not None]
    for kind in attention_check.KINDS:
        able = {n for n in names if kind not in attention_check.CENTRED or codec.get(n, 128).scaled}
        alike = {(c.k, c.dim, c.dtype) for c in every if c.kind == kind and c.k == c.v}
        assert alike == {(n, d, t) for n in able for d in attention_check.DIMS for t in checking.DTYPES}
        assert {c.k for c in quick if c.kind == kind} == able and {c.dim for c in quick} == set(attention_check.DIMS)
        assert {c.dtype for c in quick if c.kind == kind} == set(checking.DTYPES)
    assert {(c.k, c.v) for c in every if c.k != c.v} == set(attention_check.MIXED)
    assert {c.kind for c in every if c.k != c.v} == set(attention_check.OF_PAIRS)
