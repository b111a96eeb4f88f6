"""Sensitivities: the prior, files, and what is refused."""

from __future__ import annotations

import json

import pytest

from mlx_rotor import bundled
from mlx_rotor.errors import RotorError
from mlx_rotor.quant import policy as policies
from mlx_rotor.quant.budget import sensitivity
from mlx_rotor.quant.budget.sensitivity import Sensitivities, fingerprint, prior, read, role_weight
from mlx_rotor.quant.fit import relative_error
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.policy import Spec

BUNDLED = json.loads((bundled.MODEL / "config.json").read_text())
EXPERT = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"
POLICY = policies.load("uniform-4bit")


@pytest.fixture
def plan():
    return make_plan(BUNDLED, POLICY)


@pytest.fixture
def measured(plan):
    costs = {e.module: {Spec(2, 128): 0.4, Spec(4, 64): 0.05 + n} for n, e in enumerate(plan.entries) if e.spec}
    return Sensitivities("some text", fingerprint(plan), "search", costs)


def test_experts_cost_their_error_and_the_head_as_much_as_all_contributions(plan):
    found = prior(plan, "search")
    assert found.cost(EXPERT, Spec(2, 64)) == relative_error(2, 64, "search")
    assert prior(plan, "fast").cost(EXPERT, Spec(2, 64)) == relative_error(2, 64, "fast")
    assert role_weight("head", plan) == 2 * 8 > role_weight("attn.q", plan) > role_weight("expert.up", plan) == 1
    assert found.cost("lm_head", Spec(4, 64)) == 16 * relative_error(4, 64, "search")
    assert found.source == "prior" and all(len(e.shape) > 1 for e in plan.entries if e.module in found.costs)


def test_tied_embeddings_are_the_head():
    tied = make_plan(BUNDLED | {"tie_word_embeddings": True}, POLICY)
    assert role_weight("embed", tied) == 16 and role_weight("embed", make_plan(BUNDLED, POLICY)) < 16


def test_a_fit_that_the_policy_forces_is_the_one_that_counts():
    policy = policies.parse(
        '[[rule]]\nroles = ["expert.*"]\nbits = 2\nfit = "fast"\n[[rule]]\nroles = ["*"]\nbits = 4\n', "x"
    )
    found = prior(make_plan(BUNDLED, policy), "search")
    assert found.cost(EXPERT, Spec(2, 64)) == relative_error(2, 64, "fast")
    assert found.cost("lm_head", Spec(2, 64)) == 16 * relative_error(2, 64, "search")


def test_what_was_not_measured_follows_from_the_nearest(measured):
    for spec, known, cost in (
        (Spec(2, 64), Spec(2, 128), 0.4),
        (Spec(5, 64), Spec(4, 64), measured.costs[EXPERT][Spec(4, 64)]),
    ):
        ratio = relative_error(spec.bits, spec.group_size, "search") / relative_error(
            known.bits, known.group_size, "search"
        )
        assert measured.cost(EXPERT, spec) == pytest.approx(cost * ratio)
    assert measured.cost(EXPERT, Spec(2, 128)) == 0.4
    with pytest.raises(RotorError, match=r"know nothing of model\.norm"):
        measured.cost("model.norm", Spec(2, 64))


def test_a_file_is_read_as_it_was_written(measured, plan, tmp_path):
    measured.write(tmp_path / "s.json")
    found = read(tmp_path / "s.json", plan)
    assert found == measured and found.digest == measured.digest
    assert Sensitivities("other", measured.model, "search", measured.costs).digest != measured.digest


def altered(path, change):
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(format="x"), "not a file of sensitivities"),
        (lambda t: t.update(version=2), "version 2, this release reads 1"),
        (lambda t: t.pop("fit"), "damaged"),
        (lambda t: t["costs"][EXPERT][0].__setitem__(3, -1), "damaged"),
        (lambda t: t["costs"][EXPERT][0].__setitem__(3, "NaN"), "damaged"),
        (lambda t: t["costs"][EXPERT][0].__setitem__(0, 7), "damaged"),
        (lambda t: t["costs"][EXPERT].append([2]), "damaged"),
        (lambda t: t["costs"].pop(EXPERT), "sha256 differs"),
        (lambda t: t["costs"][EXPERT][0].__setitem__(3, 0.41), "sha256 differs"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(measured, plan, tmp_path, change, said):
    path = tmp_path / "s.json"
    measured.write(path)
    altered(path, change)
    with pytest.raises(RotorError, match=said):
        read(path, plan)


def test_no_file_text_and_another_model_are_refused(measured, plan, tmp_path):
    path = tmp_path / "s.json"
    with pytest.raises(RotorError, match="not readable"):
        read(path, plan)
    path.write_text("[1")
    with pytest.raises(RotorError, match="not readable"):
        read(path, plan)
    path.write_text("[1]")
    with pytest.raises(RotorError, match="not a file"):
        read(path, plan)
    measured.write(path)
    other = make_plan(BUNDLED | {"intermediate_size": 128}, POLICY)
    with pytest.raises(RotorError, match=r"some text.*other dimensions"):
        read(path, other)
    assert sensitivity.fingerprint(plan) != sensitivity.fingerprint(other)
