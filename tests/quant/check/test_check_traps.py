"""Each trap that breaks a reader, planted: it is found, and the verdict is what the readers themselves make of it."""

import json
import shutil

import mlx.core as mx
import pytest
from readers import mixed, stock, stock_reads, swift_reads, write_source

from mlx_rotor.host.skeleton import parameters, skeleton
from mlx_rotor.quant.check import check, text
from mlx_rotor.quant.check.section import ERROR, PYTHON, SWIFT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Quantized by mlx_lm itself."""
    root = tmp_path_factory.mktemp("traps")
    return stock(write_source(root / "source"), root / "made", q_bits=4, q_group_size=64, quant_predicate=mixed)


def edit(config=None, tensors=None, files=None):
    """A change of a folder: `config(section, whole)`, `tensors(weights)`, `files(folder)`, in place."""

    def change(folder):
        if config:
            path = folder / "config.json"
            whole = json.loads(path.read_text())
            config(whole["quantization"], whole)
            path.write_text(json.dumps(whole))
        if tensors:
            path = folder / "model.safetensors"
            weights = mx.load(str(path))
            mx.eval(weights)
            tensors(weights)
            path.unlink()
            mx.save_safetensors(str(path), weights, {"format": "mlx"})
            (folder / "model.safetensors.index.json").unlink()
        if files:
            files(folder)

    return change


DOWN = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
W1 = "model.layers.0.block_sparse_moe.experts"
GATE = "model.layers.1.block_sparse_moe.gate"
O3 = {"group_size": 32, "bits": 3, "mode": "affine"}


def cast(dtype, ending):
    def change(weights):
        weights |= {k: v.astype(dtype) for k, v in weights.items() if k.endswith(ending) and v.dtype == mx.float32}

    return change


def unpack(weights):
    weights[f"{Q}.weight"] = mx.zeros((128, 128))
    del weights[f"{Q}.scales"], weights[f"{Q}.biases"]


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def sidecar(folder):
    (folder / "kv").mkdir()
    mx.save_safetensors(str(folder / "kv" / "scales.safetensors"), {"k": mx.zeros(2)})


def in_two(folder):
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    mx.eval(weights)
    path.unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:])):
        mx.save_safetensors(str(folder / f"model-0000{i + 1}-of-00002.safetensors"), {n: weights[n] for n in part})
    return names


def index_of(change):
    def alter(folder):
        path = folder / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return alter


def unsorted(folder):
    names = in_two(folder)
    table = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def half(folder):
    names = in_two(folder)
    where = {n: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model-00002-of-00002.safetensors").unlink()


TRAPS = {
    "missing-override": edit(lambda q, c: q.pop(DOWN)),
    "missing-override all": edit(lambda q, c: [q.pop(k) for k in list(q) if "." in k]),
    "missing-override wrong default": edit(lambda q, c: q.update(bits=8)),
    "wrong-override bits": edit(lambda q, c: q.update({DOWN: O3 | {"bits": 2}})),
    "wrong-override group": edit(lambda q, c: q.update({DOWN: O3 | {"group_size": 64}})),
    "wrong-override mode": edit(lambda q, c: q.update({Q: {"group_size": 32, "bits": 4, "mode": "mxfp4"}})),
    "wrong-override default": edit(lambda q, c: q.update({DOWN: True})),
    "wrong-override foreign": edit(lambda q, c: q.update({DOWN: O3 | {"fit": "search"}})),
    "wrong-override group does not divide": edit(lambda q, c: q.update({DOWN: O3 | {"group_size": 256}})),
    "override-false": edit(lambda q, c: q.update({DOWN: False})),
    "incomplete-override group": edit(lambda q, c: q.update({Q: {"bits": 4}})),
    "incomplete-override bits": edit(lambda q, c: q[DOWN].pop("bits")),
    "unknown-mode": edit(lambda q, c: q.update({Q: {"group_size": 64, "bits": 4, "mode": "iq4"}})),
    "foreign-key text": edit(lambda q, c: q.update(policy="config-i")),
    "foreign-key number": edit(lambda q, c: q.update(version=2)),
    "foreign-key null": edit(lambda q, c: q.update({Q: None})),
    "override-unknown": edit(lambda q, c: q.update({"model.layers.9.mlp": O3})),
    "override-unquantized": edit(lambda q, c: q.update({Q: O3}), unpack),
    "override-unquantized norm": edit(lambda q, c: q.update({"model.norm": O3})),
    "no-quantization": edit(lambda q, c: [c.pop("quantization"), c.pop("quantization_config")]),
    "only-quantization-config": edit(lambda q, c: c.pop("quantization")),
    "no-default": edit(lambda q, c: q.pop("group_size")),
    "stale-quantization-config": edit(lambda q, c: c.update(quantization_config={"quant_method": "fp8"})),
    "extra-tensor": edit(tensors=lambda w: w.update({"model.layers.0.kv_scale": mx.zeros(1)})),
    "missing-tensor": edit(tensors=lambda w: w.pop("model.norm.weight")),
    "missing-tensor biases": edit(tensors=lambda w: w.pop("lm_head.biases")),
    "wrong-shape": edit(tensors=lambda w: w.update({"model.norm.weight": mx.zeros(64)})),
    "wrong-shape config": edit(lambda q, c: c.update(vocab_size=2000)),
    "wrong-dtype": edit(tensors=lambda w: w.update({"lm_head.weight": w["lm_head.weight"].astype(mx.int32)})),
    "wrong-dtype fp8": edit(tensors=lambda w: w.update({"model.norm.weight": mx.zeros(128, mx.uint8)})),
    "mixed-dtypes": edit(tensors=cast(mx.float16, "scales")),
    "bias-dtype": edit(tensors=cast(mx.bfloat16, "e_score_correction_bias")),
    "sidecar": edit(files=sidecar),
    "damaged-file": edit(files=truncate),
    "no-index": edit(files=lambda f: [in_two(f), (f / "model.safetensors.index.json").unlink()]),
    "index-wrong-shard": edit(files=unsorted),
    "missing-shard": edit(files=half),
    "index-total-size": edit(files=index_of(lambda t: t["metadata"].update(total_size=5))),
    "index-missing-tensor": edit(files=index_of(lambda t: t["weight_map"].update(x="model.safetensors"))),
    "index-unnamed-tensor": edit(files=index_of(lambda t: t["weight_map"].pop("model.norm.weight"))),
    "bad-index": edit(files=lambda f: (f / "model.safetensors.index.json").write_text("[]")),
    "no-tokenizer": edit(files=lambda f: (f / "tokenizer.json").unlink()),
    "no-tokenizer-config": edit(files=lambda f: (f / "tokenizer_config.json").unlink()),
    "no-chat-template": edit(files=lambda f: (f / "chat_template.jinja").unlink()),
    "no-config": edit(files=lambda f: (f / "config.json").unlink()),
    "no-model-type": edit(lambda q, c: c.pop("model_type")),
    "custom-code": edit(lambda q, c: c.update(model_file="model.py")),
    "duplicate-tensor": edit(files=lambda f: shutil.copy(f / "model.safetensors", f / "model-old.safetensors")),
    "unreadable-module": edit(tensors=lambda w: w.update({f"{Q}.scales": mx.zeros((128, 5))})),
    "sanitize-fails": edit(tensors=lambda w: w.update({f"{W1}.0.w1.weight": mx.zeros((128, 128))})),
    "no-weights": edit(files=lambda f: (f / "model.safetensors").rename(f / "weights.safetensors")),
    "bad-json": edit(files=lambda f: (f / "config.json").write_text("{")),
    "bad-json tokenizer": edit(files=lambda f: (f / "tokenizer.json").write_text("{")),
    "unknown-model": edit(lambda q, c: c.update(model_type="nothing")),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_planted_trap_is_found_and_is_what_readers_make_of_it(trap, made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made, folder)
    clean = {f.kind for f in check(folder)}
    TRAPS[trap](folder)
    found = check(folder)
    new = {f.kind: f for f in found if f.kind not in clean}
    assert trap.split()[0] in new, text(folder, found)
    # The verdict is the readers' own. A half-removed folder can't be asked by the model of Swift's.
    assert any(f.severity == ERROR and PYTHON in f.readers for f in found) == (stock_reads(folder) is not None), (
        text(folder, found),
        stock_reads(folder),
    )
    if trap not in (
        "no-config",
        "bad-json",
        "bad-json tokenizer",
        "no-weights",
        "unknown-model",
        "no-model-type",
        "custom-code",
    ):
        said = swift_reads(folder, parameters(skeleton(json.loads((folder / "config.json").read_text()))))
        # Swift goes by shapes: dtypes are for the one that multiplies.
        wrong = any(f.severity == ERROR and SWIFT in f.readers and f.kind != "wrong-dtype" for f in found)
        assert wrong == (said is not None), (text(folder, found), said)
