"""Jobs in formats that MLX does not have: what they store, how it is read, and what calibration adds to it."""

import hashlib
import json
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from quantizing import quantize
from test_job_killed import OPTIONS, die, files

import mlx_rotor
import small_checkpoint
from mlx_rotor.experts.layers import PackedLayer
from mlx_rotor.host.loading import load as load_model
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.quality.stored import parameters_of
from mlx_rotor.quant import calibrate, upload
from mlx_rotor.quant.check import check
from mlx_rotor.quant.plan import read_config
from mlx_rotor.quant.policy import Policy, load, parse
from mlx_rotor.quant.recipe import Recipe
from mlx_rotor.quant.safetensors_io import read_header

TIERS = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mxfp4-16")
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
TOKENS = mx.array([[1, 17, 300, 45, 1200, 7, 7, 90]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_checkpoint.write(tmp_path_factory.mktemp("formats") / "source")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """policy -> the folder a job made with it."""
    root, done = tmp_path_factory.mktemp("made"), {}

    def make(policy):
        if policy not in done:
            quantize(source, root / policy, load(policy), fit="fast")
            done[policy] = root / policy
        return done[policy]

    return make


def codes(words, bits, columns):
    """The numbers in a little-endian bit stream along each row."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(*words.shape[:-1], columns, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(axis=-1)


def decoded(stored, path, stated, columns):
    """A module's weights in float32, by the formats' definitions."""
    bits, group, mode = stated["bits"], stated["group_size"], stated["mode"]
    words = np.array(stored[f"{path}.weight"])
    code = codes(words, bits, columns).reshape(*words.shape[:-1], columns // group, group)
    beside = {
        kind: np.array(stored[f"{path}.{kind}"].astype(mx.float32))
        for kind in ("scales", "biases", "codebooks")
        if f"{path}.{kind}" in stored
    }
    if mode == "lloyd":
        books = beside["codebooks"].reshape(*code.shape[:-1], 2**bits)
        values = np.take_along_axis(books, code, axis=-1)
    else:
        levels = {"q8": code - np.float32(128), "iq4_nl": LEVELS[code & 15], "affine": code.astype(np.float32)}[mode]
        values = levels * beside["scales"][..., None]
        values = values + beside["biases"][..., None] if mode == "affine" else values
    return mx.array(values.reshape(*words.shape[:-1], columns).astype(np.float32))


def plain_model(folder):
    """mlx_lm's unquantized model with the weights that were stored."""
    config = read_config(folder)
    stored = mx.load(str(folder / "model.safetensors"))
    model, section = skeleton(config), config["quantization"]
    default = {key: section[key] for key in ("bits", "group_size", "mode")}
    weights = []
    for name, like in tree_flatten(model.parameters()):
        path = name.removesuffix(".weight")
        if stored[name].dtype == mx.uint32:
            weights.append((name, decoded(stored, path, section.get(path, default), like.shape[-1])))
        else:
            weights.append((name, stored[name].astype(mx.float32)))
    model.update(tree_unflatten(weights))
    return model


@pytest.mark.parametrize("policy", TIERS)
def test_a_tier_is_checked_loaded_and_computes_with_what_it_stored(made, policy):
    out = made(policy)
    assert [(f.severity, f.kind) for f in check(out)] == [("warning", "rotor-format")]
    assert mlx_rotor.__version__
    model, _ = mlx_lm.load(str(out))
    ours = {path: m for path, m in model.named_modules() if isinstance(m, PackedLayer)}
    section = read_config(out)["quantization"]
    named = {p: s for p, s in section.items() if isinstance(s, dict) and s["mode"] in ("lloyd", "iq4_nl", "q8")}
    assert ours.keys() == named.keys() and len(ours) > 10
    model.set_dtype(mx.float32)
    found, expected = model(TOKENS), plain_model(out)(TOKENS)
    assert mx.abs(found - expected).max().item() < 2e-4 * mx.abs(expected).max().item()


def test_parameters_are_read_one_by_one_as_they_were_stored(made):
    out = made("mq2-lloyd")
    _, found = parameters_of(out)
    model = dict(tree_flatten(plain_model(out).parameters()))
    assert set(found.names()) == model.keys()
    for name, expected in model.items():
        assert mx.allclose(found.whole(name), expected, rtol=1e-6, atol=1e-7), name
    stack = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj.weight"
    assert mx.allclose(found.part(stack, 2), model[stack][2], rtol=1e-6, atol=1e-7)


def test_the_model_file_is_listed_with_its_digest(made):
    out = made("mq2")
    facts = json.loads((out / "mlx_rotor.json").read_text())
    data = (out / "mlx_rotor_formats.py").read_bytes()
    assert facts["files"]["mlx_rotor_formats.py"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert json.loads((out / "config.json").read_text())["model_file"] == "mlx_rotor_formats.py"


READER = """
import sys

sys.modules["mlx_rotor"] = None  # as where it is not installed
import mlx.core as mx, mlx_lm, numpy as np

try:
    mlx_lm.load(sys.argv[1])
except ValueError as e:
    assert "trust_remote_code" in str(e)
else:
    raise SystemExit("loaded without trust")
model, _ = mlx_lm.load(sys.argv[1], trust_remote_code=True)
model.set_dtype(mx.float32)
np.save(sys.argv[2], np.array(model(mx.array(eval(sys.argv[3])))))
"""


def test_mlx_lm_alone_reads_it_with_trust(made, tmp_path):
    out = made("mq2")
    command = [sys.executable, "-c", READER, str(out), str(tmp_path / "logits.npy"), str(TOKENS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "logits.npy"), np.array(plain_model(out)(TOKENS))
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


def test_killed_and_resumed_the_files_are_the_same(source, made, tmp_path):
    whole = tmp_path / "whole"
    quantize(source, whole, load("mq2"), **OPTIONS)
    out = tmp_path / "out"
    assert die(source, out, 150, policy="mq2", workers=2)
    assert not (out / "config.json").exists()
    assert quantize(source, out, load("mq2"), resume=True, **OPTIONS).resumed > 0
    assert files(out) == files(whole)


SEEN = {"calibration": "bundled", "sequences": 2, "length": 64}


def guided(source, out, policy):
    recipe = Recipe(policy if isinstance(policy, Policy) else load(policy), **SEEN)
    return quantize(source, out, recipe)


def test_kv_scales_are_those_of_the_text_and_are_used(source, tmp_path):
    out = tmp_path / "out"
    guided(source, out, "mxfp4-16")
    found = json.loads((out / "kv_scheme.json").read_text())
    model, _ = load_model(source)
    largest = [[0.0, 0.0] for _ in range(2)]
    for row in calibrate.prepare(source, read_config(source), None, SEEN["sequences"], SEEN["length"]):
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array(row)[None], cache=cache))
        for pair, c in zip(largest, cache, strict=True):
            seen = [mx.abs(x[..., : c.offset, :]).max().item() for x in (c.keys, c.values)]
            pair[:] = [max(a, b) for a, b in zip(pair, seen, strict=True)]
    assert np.allclose(found["made"]["largest"], largest, rtol=1e-2)  # mlx_lm expands FP8 to bfloat16
    scales = [float(layer[side].removeprefix("fp8:")) for layer in found["layers"] for side in ("k", "v")]
    assert np.allclose(scales, 1.25 * np.array(largest).ravel() / 448, rtol=1e-2)
    facts = json.loads((out / "mlx_rotor.json").read_text())
    assert facts["files"]["kv_scheme.json"]["bytes"] == (out / "kv_scheme.json").stat().st_size
    assert {f.kind for f in check(out)} == {"rotor-format"}
    assert {"kv_scheme.json", "mlx_rotor_formats.py"} <= {path.name for path in upload.files(out)}
    loaded, _ = load_model(out)
    caches = mlx_rotor.make_prompt_cache(loaded, "fp8")
    assert [c.codecs for c in caches] == [(layer["k"], layer["v"]) for layer in found["layers"]]


def test_without_calibration_there_are_no_kv_scales(made):
    assert not (made("mxfp4-16") / "kv_scheme.json").exists()


def strengthened(source, folder, layer, channels, factor):
    """A copy whose experts in one layer read inputs of which the first few are larger."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        info = read_header(file).get(f"model.layers.{layer}.post_attention_layernorm.weight")
        if info is not None:
            values = mx.array(np.frombuffer(info.read(), np.uint16)).view(mx.bfloat16)
            values = mx.where(mx.arange(values.size) < channels, values * factor, values).astype(mx.bfloat16)
            with open(file, "r+b") as f:
                f.seek(info.start)
                f.write(np.array(values.view(mx.uint16)).tobytes())
            return folder
    raise AssertionError("no such norm")


# Without a fit that goes by the inputs itself, which leaves little to gain.
EVENED = """
awq = 0.5
[[rule]]
roles = ["expert.gate", "expert.up"]
mode = "lloyd"
bits = 2
fit = "fast"
[[rule]]
roles = ["router"]
mode = "q8"
[[rule]]
roles = ["*"]
mode = "q8"
"""


def test_what_experts_read_is_evened_out_where_the_policy_says_so(source, tmp_path):
    strong = strengthened(source, tmp_path / "strong", 1, 8, 32)
    guided(strong, tmp_path / "mq4", "mq4")
    guided(strong, tmp_path / "mq2", parse(EVENED, "mq2"))
    plain, awq = (
        json.loads((tmp_path / name / "mlx_rotor.json").read_text())["calibration"] for name in ("mq4", "mq2")
    )
    assert "folds" not in plain
    rows = {row["layer"]: row for row in awq["folds"]}
    assert 1 in rows and all(row["alpha"] == 0.5 and row["error_ratio"] < 0.99 for row in rows.values())
    stored, reference = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("mq2", "mq4"))
    for layer in range(2):
        norm, router = (
            f"model.layers.{layer}.post_attention_layernorm.weight",
            f"model.layers.{layer}.block_sparse_moe.gate",
        )
        powers = np.log2(np.array(stored[norm].astype(mx.float32) / reference[norm].astype(mx.float32)))
        assert np.array_equal(powers, np.round(powers)) and (np.abs(powers).max() > 0) == (layer in rows)
        before, after = (decoded(tensors, router, Q8, 128) for tensors in (reference, stored))
        most = mx.abs(before).max().item()  # the router reads what was divided, times the same
        assert mx.abs(after * mx.array(2.0**powers) - before).max().item() < 0.1 * most
        assert (mx.abs(after - before).max().item() > 0.3 * most) == (layer in rows)


Q8 = {"bits": 8, "group_size": 32, "mode": "q8"}
