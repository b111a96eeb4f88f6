"""The checker against what readers do: stock mlx_lm itself, and a model of mlx-swift-lm's rules."""

import json
import shutil

import mlx.core as mx
import pytest
from quantizing import quantize
from readers import MINIMAX, mixed, stock, stock_reads, swift_reads, write_source

from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import parameters, skeleton
from mlx_rotor.quant import policy
from mlx_rotor.quant.check import check, facts, status, text
from mlx_rotor.quant.check.section import ERROR, OLDER, SWIFT

QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "norm_topk_prob": True,
}
LLAMA = {k: QWEN[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")} | {
    "model_type": "llama",
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def sources(root):
    return {
        "minimax": write_source(root / "minimax"),
        "qwen": write_source(root / "qwen", QWEN, "qwen3_moe"),
        "llama": write_source(root / "llama", LLAMA, "llama"),
    }


@pytest.fixture(scope="module")
def made(sources, root):
    """Quantized by mlx_lm itself: 2-bit experts' down projections are the overrides, 4 bits the default."""
    return stock(sources["minimax"], root / "made", q_bits=4, q_group_size=64, quant_predicate=mixed)


@pytest.mark.parametrize("name", ["minimax", "qwen", "llama"])
@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 4, "q_group_size": 64},
        {"q_bits": 2, "q_group_size": 32},
        {"q_mode": "mxfp4"},
        {"q_mode": "nvfp4"},
        {"q_mode": "mxfp8"},
        {"q_bits": 6, "q_group_size": 64, "quant_predicate": mixed},
        {"q_group_size": 64, "quant_predicate": "mixed_3_6"},
    ],
    ids=lambda o: "-".join(str(getattr(v, "__name__", v)) for v in o.values()),
)
def test_what_mlx_lm_makes_passes(name, options, sources, tmp_path):
    out = stock(sources[name], tmp_path / "out", **options)
    found = check(out)
    assert stock_reads(out) is None
    assert not [f for f in found if f.severity == ERROR], text(out, found)
    low = {f.kind for f in found} - {"no-generation-config"}
    assert low <= ({"router-bits"} if name != "llama" else set()) | {"mixed-dtypes", "bias-dtype"}, text(out, found)
    if options.get("quant_predicate") == "mixed_3_6" and name == "minimax":
        assert "router-bits" in low


def test_mlx_lms_mixed_recipes_without_a_group_size_do_not_decode_in_swift(sources, tmp_path):
    """It writes `"group_size": null` then."""
    out = stock(sources["llama"], tmp_path / "out", quant_predicate="mixed_3_6")
    assert stock_reads(out) is None and "None" in swift_reads(out, parameters(skeleton(LLAMA)))
    assert [f.readers for f in check(out) if f.kind == "incomplete-override"] == [(SWIFT,)]


def test_sources_and_our_own_output_pass(sources, tmp_path):
    for folder in sources.values():
        assert check(folder) == [] and stock_reads(folder) is None
    out = tmp_path / "out"
    quantize(MODEL, out, policy.load("config-i"))
    assert check(out) == [], text(out, check(out))
    assert text(out, []).endswith("nothing wrong")


def test_a_source_checkpoint_is_told_apart(tmp_path):
    found = check(MODEL)  # FP8, experts one by one
    assert [f.kind for f in found] == ["source-naming"] and status(found) == 0
    assert "FP8" in found[0].what and stock_reads(MODEL) is None


def test_bf16_experts_one_by_one_are_source_naming_too(sources, tmp_path):
    folder = tmp_path / "parts"
    shutil.copytree(sources["minimax"], folder)
    weights = mx.load(str(folder / "model.safetensors"))
    for name in [n for n in weights if "switch_mlp" in n]:
        letter = {"gate": "w1", "down": "w2", "up": "w3"}[name.split(".")[-2].removesuffix("_proj")]
        for expert, matrix in enumerate(weights.pop(name)):
            weights[f"{name.split('.switch_mlp')[0]}.experts.{expert}.{letter}.weight"] = matrix
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert stock_reads(folder) is None
    assert [(f.kind, len(f.where)) for f in check(folder)] == [("source-naming", 2 * 3 * 4)]


def test_a_tensor_that_mlx_lm_drops_is_pointed_out(sources, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(sources["qwen"], folder)
    mx.save_safetensors(str(folder / "model-head.safetensors"), {"lm_head.weight": mx.zeros((2048, 128))})
    assert stock_reads(folder) is None
    assert [f.kind for f in check(folder)] == ["no-index", "unused-tensor"]


@pytest.mark.parametrize(
    ("stated", "kind", "severity"),
    [
        ({"quant_method": "awq", "bits": 4}, "foreign-format", "warning"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "foreign-format", "error"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "foreign-format", "error"),
        ({"bits": 4, "group_size": 64}, "only-quantization-config", "error"),
    ],
)
def test_foreign_quantization_is_named(stated, kind, severity, sources, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(sources["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    assert [(f.kind, f.severity) for f in check(folder)] == [(kind, severity)]
    if severity == "error":
        assert stock_reads(folder) is not None


def test_mxfp4_as_other_tools_say_it_passes_in_mlx_lm(sources, tmp_path):
    folder = stock(sources["llama"], tmp_path / "out", q_mode="mxfp4")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert stock_reads(folder) is None
    assert {(f.kind, f.severity) for f in check(folder)} == {("foreign-format", "warning")}


DOWN = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
GATE = "model.layers.1.block_sparse_moe.gate"


def test_each_finding_says_where_and_what_to_do(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made, folder)
    config = json.loads((folder / "config.json").read_text())
    for section in (config["quantization"], config["quantization_config"]):
        for module in [key for key in section if "." in key]:
            del section[module]
    (folder / "config.json").write_text(json.dumps(config))
    found = [f for f in check(folder) if f.kind == "missing-override"]
    down = next(f for f in found if DOWN in f.where)
    assert down.readers == (OLDER, SWIFT) and len(down.where) == 2 and '"bits": 3' in down.fix
    assert DOWN in str(down) and down.fix in text(folder, found)
    said = json.loads(json.dumps(facts(folder, found)))
    assert said["errors"] == len(found) and said["findings"][0]["kind"] == "missing-override"
    assert status(found) == 1 and status([]) == 0


def test_a_low_bit_router_is_found(made, sources, tmp_path):
    out = stock(sources["minimax"], tmp_path / "out", q_bits=2, quant_predicate="mixed_2_6")
    found = next(f for f in check(out) if f.kind == "router-bits")
    assert GATE in found.where and "2 bits" in found.what
    assert "router-bits" not in {f.kind for f in check(made)}


def test_swift_needs_a_tokenizer_json_where_python_takes_others(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made, folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert [(f.kind, f.readers) for f in check(folder)] == [("no-tokenizer-json", (SWIFT,))]
    assert "tokenizer.json" in swift_reads(folder, parameters(skeleton(MINIMAX)))


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(RotorError, match="no such folder"):
        check(tmp_path / "none")


def test_a_big_model_is_checked_without_its_memory(tmp_path):
    """MiniMax-M2's true dimensions, 229 GB of zeros that take no disk, in seconds."""
    big = MINIMAX | {"hidden_size": 3072, "intermediate_size": 1536, "num_local_experts": 256, "num_hidden_layers": 62}
    big |= {"num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 200064}
    shapes = parameters(skeleton(big))
    assert sum(mx.prod(mx.array(s)).item() for s in shapes.values()) > 2e11
    (tmp_path / "config.json").write_text(json.dumps(big))
    table, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    assert {f.kind for f in check(tmp_path)} == {"no-tokenizer", "no-tokenizer-config", "bias-dtype"}
    assert mx.get_peak_memory() < 2**30
