"""A recipe: policy, budget, fit and calibration as one value that makes plans."""

import json
from dataclasses import replace

import pytest
from quantizing import quantize

from mlx_rotor import bundled
from mlx_rotor.errors import RotorError
from mlx_rotor.quant import Policy, Recipe, dry_run
from mlx_rotor.quant import policy as policies
from mlx_rotor.quant.budget import TooSmall, sensitivity
from mlx_rotor.quant.plan import make_plan, read_config
from mlx_rotor.quant.shards import file_bytes
from mlx_rotor.quant.source import open_folder
from mlx_rotor.quant.spec import BUNDLED, Budget

CONFIG = read_config(bundled.MODEL)
SHARD = 4_000_000_000
BUDGETED = policies.parse(
    '[budget]\nbits_per_weight = 5.0\n[floors]\n"head" = 6\n[[rule]]\nroles = ["router*", "norm"]\nkeep = true\n'
    '[[rule]]\nroles = ["*"]\nbits = 4\ngroup_size = [128, 64]\n',
    "budgeted",
)


def size(plan):
    return file_bytes(plan, SHARD)


def test_a_policy_with_a_budget_is_solved_wherever_it_is_given(tmp_path):
    """Its rules alone, 4 bits everywhere, would be another size."""
    start, target = make_plan(CONFIG, BUDGETED), int(5.0 * make_plan(CONFIG, BUDGETED).parameters / 8)
    assert not 0.98 * target < size(start) <= target
    plans = {
        "resolved": Recipe(BUDGETED).resolve(open_folder(bundled.MODEL)),
        "dry run": dry_run(bundled.MODEL, Recipe(BUDGETED))[0],
        "recipe": Recipe(BUDGETED).plan(CONFIG),
        "job": quantize(bundled.MODEL, tmp_path / "out", BUDGETED, fit="fast").plan,
    }
    for name, plan in plans.items():
        assert 0.98 * target < size(plan) <= target, name
        assert plan.solved.nbytes == target and plan.solved.sensitivities == "prior"
    made = json.loads((tmp_path / "out" / "mlx_rotor.json").read_text())
    prior = sensitivity.prior(start, "fast")
    assert made["budget"] == {"bytes": target, "sensitivities": {"source": "prior", "sha256": prior.digest}}
    assert Recipe(replace(BUDGETED, budget=None)).plan(CONFIG).solved is None


def test_a_budget_that_nothing_meets_is_refused_with_the_least_size():
    with pytest.raises(TooSmall, match=r"policy rotor-86 needs 4\.307 MB") as found:
        quantize(bundled.MODEL, "/nowhere", policies.load("rotor-86"))
    assert found.value.least == 4_306_792


def test_a_budget_goes_before_the_policys_own():
    recipe = Recipe(BUDGETED, budget=Budget(bits_per_weight=6.0))
    assert recipe.target.bits_per_weight == 6.0 and size(recipe.plan(CONFIG)) > size(Recipe(BUDGETED).plan(CONFIG))


def test_sensitivities_choose_other_bits(tmp_path):
    plan = make_plan(CONFIG, BUDGETED)
    prior, file = sensitivity.prior(plan, "search"), tmp_path / "s.json"
    module = "model.layers.4.self_attn.q_proj"
    costs = {**prior.costs, module: {spec: 1e6 * cost for spec, cost in prior.costs[module].items()}}
    replace(prior, source="mine", costs=costs).write(file)
    found = Recipe(BUDGETED, sensitivities=file).plan(CONFIG)
    bits = {entry.module: entry.spec.bits for entry in found.entries if entry.spec}
    assert bits[module] == 8 and found.solved.sensitivities == "mine" and size(found) <= found.solved.nbytes


def test_what_guides_a_fit():
    assert Recipe(BUDGETED).guide() is None and not Recipe(BUDGETED).guided
    assert Recipe(BUDGETED, calibration=BUNDLED).guided and Recipe(BUDGETED, calibration=BUNDLED).guide() is not None
    measured_only = Recipe(BUDGETED, fit="fast", calibration=BUNDLED, sensitivities="s.json")
    assert measured_only.guide() is None, "the text is for the sensitivities alone"


PLAIN: Policy = policies.load("uniform-4bit")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"calibration": "a", "imatrix": "b"}, "give one of them"),
        ({"calibration": "a", "fit": "fast"}, "by the weights alone"),
        ({"sequences": 3}, "give --calibration"),
        ({"length": 3}, "give --calibration"),
        ({"scale_folding": ("sideways",)}, "there is norms, downs"),
        ({"scale_folding": ("norms",)}, "give --calibration or --imatrix"),
        ({"scale_folding": ("norms",), "fit": "fast"}, "use --fit search or best"),
        ({"rescale": True}, "give --calibration"),
        ({"sensitivities": "s.json"}, "choose bits for a size"),
    ],
)
def test_parts_that_contradict_each_other(changes, says):
    with pytest.raises(RotorError, match=says):
        Recipe(PLAIN, **changes)


def test_files_are_looked_at_before_any_work(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for recipe, says in (
        (Recipe(PLAIN, calibration=str(tmp_path / "empty.txt")), "holds no text"),
        (Recipe(PLAIN, calibration=str(tmp_path / "none.txt")), "not readable"),
        (Recipe(PLAIN, imatrix=tmp_path / "none.gguf"), "no such file"),
        (Recipe(BUDGETED, sensitivities=tmp_path / "none.json"), "with --calibration it is measured"),
        (Recipe(BUDGETED, calibration=BUNDLED, sensitivities=tmp_path), "can't be written"),
    ):
        with pytest.raises(RotorError, match=says):
            recipe.check_files()
    there = Recipe(BUDGETED, calibration=BUNDLED, sensitivities=tmp_path / "new.json")
    there.check_files()
    with pytest.raises(RotorError, match="--dry-run doesn't measure"):
        there.check_files(measuring=False)
