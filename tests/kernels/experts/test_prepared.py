"""Launches that are planned once: what a second call does again, and what makes a plan void."""

import copy
import gc
import weakref
from dataclasses import replace

import mlx.core as mx
import pytest

from expert_cases import normal, weights
from mlx_rotor.errors import RotorError
from mlx_rotor.experts.formats import affine
from mlx_rotor.kernels import check_results, metal
from mlx_rotor.kernels.check_results import Failure
from mlx_rotor.kernels.experts import MAX_ROWS, down, few_rows, gate_up, matmul

NAME = ("affine", 4, 32)
CHOSEN = mx.array([[5, 1, 3]], mx.uint32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path))
    check_results.forget()
    yield
    check_results.forget()


@pytest.fixture
def launched():
    """Inputs of every launch of kernels that only make zeros."""
    found = []
    metal.use_maker(maker(found))
    yield found
    metal.use_maker(None)


def maker(found):
    def make(**text):
        def launch(*, inputs, output_shapes, output_dtypes, **_):
            found.append(dict(zip(text["input_names"], inputs, strict=True)))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    return make


@pytest.fixture
def layer():
    return [weights(NAME, (7, 8), 64, seed=seed) for seed in (1, 2)] + [weights(NAME, (7, 64), 96)]


CALLS = {
    "gate_up": ("_gate_up_planned", lambda w, x: gate_up(x, w[0], w[1], CHOSEN, "swiglu")),
    "down": ("_down_planned", lambda w, x: down(mx.tile(x[:, None, :32], (1, 3, 3)), w[2], CHOSEN)),
    "matmul": ("_matvec_planned", lambda w, x: matmul(x, w[3])),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_is_planned_once_for_a_shape_and_a_dtype(name, layer, launched, monkeypatch):
    layer.append(weights(NAME, (8,), 64))
    function, call = CALLS[name]
    planned, plan = [], getattr(few_rows, function)
    monkeypatch.setattr(few_rows, function, lambda *how: planned.append(how) or plan(*how))
    for _ in range(3):
        call(layer, normal(1, 64))
    assert len(planned) == 1 and len(launched) == 3
    assert call(layer, normal(1, 64).astype(mx.bfloat16)).dtype == mx.bfloat16
    assert len(planned) == 2
    metal.use_maker(maker(anew := []))
    call(layer, normal(1, 64))
    assert len(planned) == 3 and len(anew) == 1 and len(launched) == 4


@pytest.mark.parametrize("name", CALLS)
def test_check_results_are_obeyed_after_planning(name, layer, launched):
    layer.append(weights(NAME, (8,), 64))
    _, call = CALLS[name]
    call(layer, normal(1, 64))
    failure = Failure(f"check of {name}", name, ("affine4:32",), "float32")
    check_results.record([failure.check], [failure])
    with pytest.raises(RotorError, match=failure.check):
        call(layer, normal(1, 64))
    with check_results.ignored():
        call(layer, normal(1, 64))
    with pytest.raises(RotorError, match=failure.check):
        call(layer, normal(1, 64))
    call(layer, normal(1, 64).astype(mx.float16))
    check_results.record([failure.check], [])
    call(layer, normal(1, 64))
    assert len(launched) == 4


def test_an_operation_that_failed_in_another_format_runs(layer, launched):
    check_results.record(["x"], [Failure("x", "gate_up", (check_results.format_id(affine.Affine(2, 64)),), "float32")])
    CALLS["gate_up"][1](layer, normal(1, 64))
    assert len(launched) == 1


def test_other_weights_are_read_and_the_old_ones_let_go(layer, launched):
    gate, up, _ = layer
    for tokens in (1, 2):
        gate_up(normal(tokens, 64), gate, up, mx.repeat(CHOSEN, tokens, axis=0), "swiglu")
    other, old = weights(NAME, (7, 8), 64, seed=5), weakref.ref(up)
    gate_up(normal(1, 64), gate, other, CHOSEN, "swiglu")
    assert launched[-1]["up_codes"] is other.parts[0] and launched[0]["up_codes"] is up.parts[0]
    launched.clear()
    del up, layer[1]
    gc.collect()
    assert old() is None


def test_copies_of_weights_plan_their_own(layer, launched):
    gate, up, _ = layer
    gate_up(normal(1, 64), gate, up, CHOSEN, "swiglu")
    assert len(gate.launches) == 1
    for other in (copy.deepcopy(gate), copy.copy(gate.launches), replace(gate, bias=None)):
        assert len(getattr(other, "launches", other)) == 0


@pytest.mark.parametrize("lead", [(1,), (1, 1), (2, 3), (MAX_ROWS,), ()])
def test_tokens_may_have_any_dimensions(lead, layer, launched):
    indices = mx.broadcast_to(CHOSEN[0], (*lead, 3))
    hidden = gate_up(normal(*lead, 64), *layer[:2], indices, "swiglu")
    assert hidden.shape == (*lead, 3, 8)
    h, shares = normal(*lead, 3, 96), mx.ones((*lead, 3))
    assert down(h, layer[2], indices).shape == (*lead, 3, 64)
    assert (
        down(h, layer[2], indices, shares).shape == down(h, layer[2], indices, shares[..., None]).shape == (*lead, 64)
    )
    assert matmul(normal(*lead, 64), weights(NAME, (8,), 64)).shape == (*lead, 8)
