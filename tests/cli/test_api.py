"""What the package offers as functions: each is there, documented, and does what its command does."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_rotor
from mlx_rotor import RotorError
from mlx_rotor.quality.sample import TINY

PACKAGE = Path(mlx_rotor.__file__).parent
M27 = PACKAGE.parent / "examples" / "minimax_m27"
FUNCTIONS = ("attach", "attach_experts", "detach", "detach_experts", "evaluate", "load", "make_prompt_cache")
FUNCTIONS += ("patch_server", "plan", "quantize", "verify")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_name_is_listed_and_documented():
    assert set(FUNCTIONS) <= set(mlx_rotor.__all__) <= set(dir(mlx_rotor))
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(mlx_rotor, name)) and inspect.getdoc(getattr(mlx_rotor, name)), name
    for name in ("attach", "evaluate", "load", "plan", "quantize"):
        text = inspect.getdoc(getattr(mlx_rotor, name))
        assert all(part in text for part in ("Args:", "Raises:", "Example:")), name


def test_a_command_never_takes_its_functions_name():
    python(
        "import importlib, inspect, mlx_rotor\n"
        "importlib.import_module('mlx_rotor.quantize')\n"  # the command first
        "assert 'quantize' not in vars(mlx_rotor) and inspect.isfunction(mlx_rotor.quantize)\n"
        "from mlx_rotor import evaluate\n"  # the function first
        "importlib.import_module('mlx_rotor.evaluate').main\n"
        "assert inspect.isfunction(evaluate) and mlx_rotor.evaluate is evaluate\n"
    )


def test_commands_that_are_no_functions_stay_modules():
    assert importlib.import_module("mlx_rotor.doctor") is mlx_rotor.doctor


def test_importing_loads_neither_mlx_lm_nor_numpy_of_the_commands():
    code = "import sys, mlx_rotor; dir(mlx_rotor); print([m for m in ('mlx_lm', 'transformers') if m in sys.modules])"
    assert python(code) == "[]"


def test_a_plan(small):
    assert mlx_rotor.plan(M27).nbytes == 92_871_229_440
    assert (
        mlx_rotor.plan(small, target_size="600KB").nbytes
        < 600_000
        == mlx_rotor.plan(small, target_size=600_000).solved.nbytes
    )
    assert mlx_rotor.plan(small, memory="16GB", context=4096, kv="turbo4v2").policy.name == "rotor"
    with pytest.raises(RotorError, match="each set the size"):
        mlx_rotor.plan(M27, target_size="86GB", target_bpw=3.25)
    with pytest.raises(RotorError, match="unknown policy 'nope'"):
        mlx_rotor.plan(M27, "nope")


def test_quantize_writes_what_the_plan_says(small, tmp_path):
    result = mlx_rotor.quantize(small, tmp_path / "out", "uniform-4bit", fit="fast")
    assert result.files == ("model.safetensors",) and result.plan.nbytes == mlx_rotor.plan(small, "uniform-4bit").nbytes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 4
    with pytest.raises(RotorError, match="holds a checkpoint already"):
        mlx_rotor.quantize(small, tmp_path / "out", "uniform-4bit", fit="fast")


def test_evaluate_measures_what_is_asked(small):
    size = TINY.with_(windows=1, window=192, needles=0, chats=0)
    report = mlx_rotor.evaluate([str(small)], ["exact", "turbo2"], size=size)
    assert [row.kv for row in report.rows] == ["exact", "turbo2"] and "turbo2" in report.markdown()
    assert report.rows[0].is_reference and report.rows[1].divergence.mean.value > 0


def test_load_and_attach(small):
    model, tokenizer = mlx_rotor.load(small)
    assert mlx_rotor.attach(model, "turbo4") is model and tokenizer.encode("x")
    assert {type(c).__name__ for c in model.make_cache()} == {"RotorCache"}
    mlx_rotor.detach(model)
    assert not hasattr(model, "make_cache")


@pytest.mark.parametrize("function", [mlx_rotor.attach, mlx_rotor.attach_experts, mlx_rotor.make_prompt_cache])
def test_what_is_no_model_is_refused_in_a_sentence(function):
    with pytest.raises(RotorError, match="returns it is needed, not NoneType"):
        function(None)
