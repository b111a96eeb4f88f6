"""Checks of expert kernels: the real ones in the simulator pass, broken ones are reported, all formats are covered."""

import mlx.core as mx
import pytest

import metal_sim
from mlx_rotor import RotorError
from mlx_rotor.diagnose import expert_check
from mlx_rotor.diagnose.expert_check import KINDS, ROUTINGS, ExpertCheck, Size, run
from mlx_rotor.experts import formats
from mlx_rotor.kernels import metal

SMALL = Size(rows=32, columns=128, experts=3, chosen=2, tiled=12)
LLOYD, AFFINE = ("lloyd", 3, 64), ("affine", 3, 64)
pytestmark = pytest.mark.skipif(not metal_sim.SUPPORTED, reason=metal_sim.UNSUPPORTED)


@pytest.fixture(autouse=True)
def backend(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path))
    yield
    metal.use_maker(None)


def making(spoil, only=""):
    """Kernels of the simulator; `spoil` gets the outputs of those with `only` in their names and returns others."""

    def maker(name, **text):
        kernel = metal_sim.Kernel(name=name, **text)
        return lambda **launch: spoil(kernel(**launch)) if only in name else kernel(**launch)

    metal.use_maker(maker)


@pytest.mark.parametrize("kind", [*KINDS, *(f"route, {model}" for model in ROUTINGS)])
def test_the_kernels_pass(kind):
    metal.use_maker(metal_sim.Kernel)
    check = ExpertCheck(kind, None if kind.startswith("route") else LLOYD, mx.bfloat16)
    outcome = run(check, SMALL)
    assert outcome.passed, outcome.note
    assert outcome.error < outcome.tolerance / 2
    assert outcome.to_dict()["check"] == check.name and outcome.failure().operation == check.operation


@pytest.mark.parametrize(
    ("kind", "spoil", "says"),
    [
        ("down, 1 row", lambda outs: [outs[0] * 1.1], ""),
        ("down, 1 row", lambda outs: [mx.full(outs[0].shape, mx.nan, outs[0].dtype)], "NaN or infinity"),
        ("gate_up, 1 row", lambda outs: [outs[0][..., 1:]], "(1, 2, 31) instead of"),
        ("matmul, 1 row", lambda outs: [outs[0].astype(mx.float32)], "instead of"),
        ("gather, many rows", lambda outs: [outs[0][::-1]], ""),
        ("route, mixtral", lambda outs: [outs[0][:, ::-1], outs[1]], "18 of 18 experts are not the stock model's"),
        ("route, mixtral", lambda outs: [outs[0], outs[1] * 1.1], ""),
        ("route, minimax", lambda outs: [outs[0], outs[1] * (1 + 2e-7)], "rounded otherwise"),
    ],
)
def test_what_is_wrong_is_seen(kind, spoil, says):
    making(spoil)
    check = ExpertCheck(kind, None if kind.startswith("route") else AFFINE, mx.float16)
    if kind == "route, minimax":
        check = ExpertCheck(kind, None, mx.float32)
    outcome = run(check, SMALL)
    assert says in outcome.note and outcome.passed == ("rounded" in says), outcome


def test_a_kernel_that_does_not_compile_fails_with_the_compilers_words():
    def maker(**text):
        raise RuntimeError("Unable to build metal library\nerror: no such type\n")

    metal.use_maker(maker)
    for kind in KINDS:
        outcome = run(ExpertCheck(kind, AFFINE, mx.float16), SMALL)
        assert not outcome.passed and outcome.note.endswith("metal library error: no such type")


def test_a_reference_is_not_compared_with_itself(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    with pytest.raises(RotorError, match="this is reference"):
        run(ExpertCheck("down, 1 row", AFFINE, mx.float16), SMALL)


def test_the_plan_covers_every_format():
    every, quick = expert_check.every(), expert_check.quick()
    assert len({check.name for check in every}) == len(every)
    assert set(quick) < set(every) and len(quick) < len(every) / 4
    specs = {(m, b, g) for m in formats.modes() for b in formats.known(m)[0] for g in formats.known(m)[1]}
    for kind in KINDS:
        assert {check.spec for check in every if check.kind == kind} == specs
        assert {check.spec[0] for check in quick if check.kind == kind} == set(formats.modes())
    assert {check.spec[:2] for check in quick if check.spec} == {spec[:2] for spec in specs}
    assert {check.kind for check in quick if check.spec is None} == {f"route, {model}" for model in ROUTINGS}
    assert {check.dtype for check in quick} == {mx.float32, mx.float16, mx.bfloat16}
