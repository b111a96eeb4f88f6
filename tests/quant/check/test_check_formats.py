"""Checkpoints in formats that MLX does not have, whole and broken: what is found is what loading them trips over."""

import contextlib
import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from quantizing import quantize

import mlx_rotor
import small_checkpoint
from mlx_rotor.experts import standalone
from mlx_rotor.quant.check import check, status, text
from mlx_rotor.quant.check.section import ERROR, ROTOR, SWIFT, TRUSTING
from mlx_rotor.quant.policy import load, parse

STACK = "model.layers.0.block_sparse_moe.switch_mlp"
GATE, DOWN, Q = f"{STACK}.gate_proj", f"{STACK}.down_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    small_checkpoint.write(root / "source")
    for policy in ("mq2-lloyd", "mxfp4-16"):
        quantize(root / "source", root / policy, load(policy), fit="fast")
    return root


def loads(folder):
    """Whether mlx_lm reads it, with mlx_rotor imported, and runs it on a few tokens."""
    assert mlx_rotor.__version__
    try:
        with contextlib.redirect_stdout(None):
            model, _ = mlx_lm.load(str(folder))
            mx.eval(model(mx.array([[1, 2, 3]])))
    except Exception:
        return False
    return True


def test_a_whole_one_is_told_from_one_for_every_reader(made):
    for policy, modes in (("mq2-lloyd", "lloyd, q8"), ("mxfp4-16", "iq4_nl")):
        (found,) = check(made / policy)
        assert (found.severity, found.kind) == ("warning", "rotor-format") and SWIFT in found.readers
        assert modes in found.what and TRUSTING.split()[1] in found.what and status([found]) == 0
        assert "0 errors, 1 warnings" in text(made / policy, [found]) and loads(made / policy)


def config(change):
    def edit(folder):
        path = folder / "config.json"
        whole = json.loads(path.read_text())
        change(whole["quantization"], whole)
        whole["quantization_config"] = whole["quantization"]
        path.write_text(json.dumps(whole))

    return edit


def tensors(change):
    def edit(folder):
        path = folder / "model.safetensors"
        weights = mx.load(str(path))
        mx.eval(weights)
        change(weights)
        path.unlink()
        mx.save_safetensors(str(path), weights, {"format": "mlx"})
        (folder / "model.safetensors.index.json").unlink()

    return edit


def cut(weights):
    weights[f"{GATE}.codebooks"] = weights[f"{GATE}.codebooks"][..., :-1]


def to_float32(weights):
    weights[f"{Q}.scales"] = weights[f"{Q}.scales"].astype(mx.float32)


def to_scales(weights):
    weights[f"{GATE}.scales"] = weights.pop(f"{GATE}.codebooks")


TRAPS = {
    "missing-tensor": tensors(lambda weights: weights.pop(f"{GATE}.codebooks")),
    "wrong-shape": tensors(cut),
    "extra-tensor": tensors(to_scales),
    "other group": config(lambda section, _: section[GATE].update(group_size=64)),
    "other bits": config(lambda section, _: section[GATE].update(bits=3)),
    "other format": config(lambda section, _: section[GATE].update(bits=8, group_size=32, mode="q8")),
    "MLX's mode": config(lambda section, _: section[GATE].update(mode="affine", group_size=128)),
    "no such group": config(lambda section, _: section[GATE].update(group_size=32)),
    "no such bits": config(lambda section, _: section[GATE].update(bits=7)),
    "no override": config(lambda section, _: section.pop(GATE)),
    "bits that are no number": config(lambda section, _: section[GATE].update(bits="2")),
    "bits that are a list": config(lambda section, _: section[GATE].update(bits=[2])),
    "a mode that is a list": config(lambda section, _: section[GATE].update(mode=["lloyd"])),
    "not quantized": config(lambda section, _: section.update({GATE: False})),
    "packed as affine": config(lambda section, _: section.update({DOWN: section[GATE]})),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_does_not_load_is_an_error(made, tmp_path, name):
    folder = tmp_path / "broken"
    shutil.copytree(made / "mq2-lloyd", folder)
    TRAPS[name](folder)
    errors = [f for f in check(folder) if f.severity == ERROR]
    module = DOWN if name == "packed as affine" else GATE
    assert errors and all(module in place for f in errors for place in f.where), errors
    if name in {f.kind for f in errors} or "-" not in name:
        assert not loads(folder)
    else:
        raise AssertionError(errors)


def test_another_dtype_is_an_error_though_it_loads(made, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(made / "mq2-lloyd", folder)
    tensors(to_float32)(folder)
    (error,) = [f for f in check(folder) if f.severity == ERROR]
    assert (error.kind, error.where, ROTOR in error.readers) == ("wrong-dtype", (f"{Q}.scales",), True)
    assert "float32, not float16" in error.what


def without(key):
    return config(lambda _, whole: whole.pop(key))


@pytest.mark.parametrize(
    ("break_it", "kind", "said"),
    [
        (lambda folder: (folder / standalone.NAME).unlink(), "missing-model-file", "is missing"),
        (without("model_file"), "no-model-file", "model_file is None"),
        (without(standalone.VERSION_KEY), "no-model-file", f"{standalone.VERSION_KEY} is None"),
        (config(lambda _, whole: whole.update({standalone.VERSION_KEY: 99})), "no-model-file", "is 99"),
    ],
)
def test_the_model_file_is_the_one_that_was_written(made, tmp_path, break_it, kind, said):
    folder = tmp_path / "broken"
    shutil.copytree(made / "mxfp4-16", folder)
    break_it(folder)
    (error,) = [f for f in check(folder) if f.severity == ERROR]
    assert error.kind == kind and said in error.what and TRUSTING in error.readers and SWIFT not in error.readers


def test_another_model_file_may_be_that_of_another_version(made, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(made / "mxfp4-16", folder)
    (folder / standalone.NAME).write_text("import os\n")
    warning = next(f for f in check(folder) if f.kind == "other-model-file")
    assert warning.severity != ERROR and "runs it" in warning.what and warning.readers == (TRUSTING,)


def test_a_model_file_of_others_is_still_foreign_code(made, tmp_path):
    folder = tmp_path / "other"
    quantize(made / "source", folder, load("uniform-4bit"), fit="fast")
    config(lambda _, whole: whole.update(model_file=standalone.NAME))(folder)
    assert [f.kind for f in check(folder) if f.severity == ERROR] == ["custom-code"]


def test_a_router_of_few_bits_is_warned_of(made, tmp_path):
    rules = '[[rule]]\nroles = ["router"]\nmode = "lloyd"\nbits = 2\n[[rule]]\nroles = ["*"]\nmode = "q8"'
    quantize(made / "source", tmp_path / "out", parse(rules, "p"), fit="fast")
    assert [f.kind for f in check(tmp_path / "out")] == ["rotor-format", "router-bits"]
