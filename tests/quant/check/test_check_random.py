"""Checkpoints broken at random: the checker's verdict is stock mlx_lm's own, and that of mlx-swift-lm's rules."""

import json
import random
import shutil

import mlx.core as mx
import pytest
from readers import MINIMAX, mixed, stock, stock_reads, swift_reads, write_source

from mlx_rotor.host.skeleton import parameters, skeleton
from mlx_rotor.quant.check import check, text
from mlx_rotor.quant.check.section import ERROR, PYTHON, SWIFT

SHAPES = parameters(skeleton(MINIMAX))
PARTS = ("weight", "scales", "biases")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("random")
    stock(write_source(root / "source"), root / "made", q_group_size=64, quant_predicate=mixed)
    weights = mx.load(str(root / "made" / "model.safetensors"))
    mx.eval(weights)
    return root / "made", weights


def spec(r):
    mode = r.choice(["affine", "affine", "mxfp4", "mxfp8", "nvfp4"])
    return {"group_size": r.choice([16, 32, 64, 128]), "bits": r.choice([2, 3, 4, 5, 6, 8]), "mode": mode}


def replaced(r, weights, module, section):
    """A module packed in another way, with or without config.json knowing."""
    found = spec(r)
    try:
        parts = mx.quantize(mx.random.normal(SHAPES[f"{module}.weight"]), *list(found.values())[:2], mode=found["mode"])
    except ValueError:  # no such format
        return
    for part in PARTS:
        weights.pop(f"{module}.{part}", None)
    weights |= {f"{module}.{part}": array for part, array in zip(PARTS, parts, strict=False)}
    if r.random() < 0.5:
        section[module] = found


def unpacked(r, weights, module, section):
    for part in PARTS:
        weights.pop(f"{module}.{part}", None)
    weights[f"{module}.weight"] = mx.zeros(SHAPES[f"{module}.weight"])


def resized(r, weights, module, section):
    name = r.choice(sorted(weights))
    shape = tuple(r.choice([1, 2, size, 2 * size]) for size in weights[name].shape)
    weights[name] = mx.zeros(shape, weights[name].dtype)


MUTATIONS = (
    lambda r, w, m, q: q.update({m: spec(r)}),
    lambda r, w, m, q: q.pop(m, None),
    lambda r, w, m, q: q.update({m: r.choice([True, False])}),
    lambda r, w, m, q: q.update(spec(r)),
    lambda r, w, m, q: q.update({m: {k: v for k, v in spec(r).items() if r.random() < 0.6}}),
    lambda r, w, m, q: q.update({r.choice(["model.norm", "model.none"]): r.choice([spec(r), False, True, 1, None])}),
    lambda r, w, m, q: w.pop(r.choice(sorted(w))),
    lambda r, w, m, q: w.update({f"{m}.other": mx.zeros(3)}),
    replaced,
    unpacked,
    resized,
)


def test_the_verdict_is_the_readers(made, tmp_path):
    folder, original = made
    modules = sorted(name.removesuffix(".scales") for name in original if name.endswith(".scales"))
    read = 0
    for seed in range(80):
        r, weights = random.Random(seed), dict(original)
        mx.random.seed(seed)
        out = tmp_path / str(seed)
        shutil.copytree(folder, out)
        config = json.loads((out / "config.json").read_text())
        for _ in range(r.choice([1, 1, 2, 3])):
            r.choice(MUTATIONS)(r, weights, r.choice(modules), config["quantization"])
        (out / "config.json").write_text(json.dumps(config))
        (out / "model.safetensors").unlink()
        mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})

        found = [f for f in check(out) if f.severity == ERROR]
        stock, swift = stock_reads(out), swift_reads(out, SHAPES)
        assert any(PYTHON in f.readers for f in found) == (stock is not None), (seed, stock, text(out, found))
        assert any(SWIFT in f.readers for f in found) == (swift is not None), (seed, swift, text(out, found))
        read += stock is None
        shutil.rmtree(out)
    assert 10 < read < 70  # both verdicts occur
