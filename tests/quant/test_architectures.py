"""Every architecture's names, held against mlx_lm: what it loads of a checkpoint is what we read of it."""

import importlib
import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING, load_model

import zoo_configs
from mlx_rotor import models
from mlx_rotor.errors import RotorError
from mlx_rotor.models import minimax_m2
from mlx_rotor.models.architecture import pattern
from mlx_rotor.quant.inventory import inventory
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.policy import load, parse
from mlx_rotor.quant.selectors import ROLES
from mlx_rotor.quant.source import Checkpoint

KEEP = parse('[[rule]]\nroles = ["*"]\nkeep = true', "keep")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def tiny(model_type, **changes):
    """A tiny config.json of an architecture, dimensions of the zoo."""
    return zoo_configs.config(MODEL_REMAPPING.get(model_type, model_type)) | {"model_type": model_type} | changes


def source_shapes(plan):
    """Tensor name -> shape of the checkpoint that the plan expects."""
    found = {}
    for entry in plan.entries:
        for name in entry.sources:
            shape = entry.layout.shape if entry.layout else entry.source_shape
            assert found.setdefault(name, shape) == shape, name
    return found


def write(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def drawn(shapes):
    mx.random.seed(5)
    return {name: mx.random.normal(shape) for name, shape in shapes.items()}


def opened(folder, config):
    checkpoint = Checkpoint.open(folder, config)
    plan = make_plan(config, KEEP, checkpoint.dtypes)
    checkpoint.verify(plan)
    return checkpoint, plan


def whole(checkpoint, entry):
    parts = [checkpoint.read(entry, part) for part in range(entry.parts)]
    return mx.stack(parts) if entry.stacked else parts[0]


def hold_against_mlx_lm(folder, config, rounded=False):
    """Every parameter that mlx_lm has after its own sanitize and a strict load is the one that we read."""
    stock = dict(tree_flatten(load_model(folder)[0].parameters()))
    checkpoint, plan = opened(folder, config)
    assert sorted(o.name for e in plan.entries for o in e.outputs) == sorted(stock)
    for entry in plan.entries:
        ours, theirs = whole(checkpoint, entry), stock[entry.outputs[0].name]
        assert ours.dtype == mx.float32 and ours.shape == entry.shape == theirs.shape
        if rounded:  # mlx_lm has what it made of FP8 in bf16
            ours = ours.astype(mx.bfloat16)
        assert mx.array_equal(ours, theirs), entry.module


@pytest.mark.parametrize("model_type", sorted(set(models.supported()) - {"gpt_oss"}))
def test_a_checkpoint_is_the_model_that_mlx_lm_makes_of_it(tmp_path, model_type):
    config = tiny(model_type)
    write(tmp_path, config, drawn(source_shapes(make_plan(config, KEEP))))
    hold_against_mlx_lm(tmp_path, config)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "qwen3_next", "mistral4", "minimax"])
def test_so_is_one_that_mlx_lm_has_converted(tmp_path, model_type):
    config = tiny(model_type)
    write(tmp_path, config, drawn({p.name: p.shape for p in inventory(config, {}).parameters}))
    hold_against_mlx_lm(tmp_path, config)


def test_experts_one_by_one_are_found_where_a_layer_in_one_tensor_is_usual(tmp_path):
    config = tiny("mistral4")
    shapes = source_shapes(make_plan(config, KEEP))
    for name in [name for name in shapes if ".experts." in name]:
        experts, rows, columns = shapes.pop(name)
        names = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
        at = name.rsplit(".", 1)[0]
        for expert in range(experts):
            shapes |= {f"{at}.{expert}.{n}.weight": (rows // len(names), columns) for n in names}
    write(tmp_path, config, drawn(shapes))
    hold_against_mlx_lm(tmp_path, config)


def test_a_name_that_some_checkpoints_have_instead_is_found(tmp_path):
    config = tiny("exaone_moe")
    shapes = source_shapes(make_plan(config, KEEP))
    tensors = {name.replace("mlp.gate.e_score", "mlp.e_score"): a for name, a in drawn(shapes).items()}
    assert tensors.keys() != shapes.keys()
    write(tmp_path, config, tensors)
    hold_against_mlx_lm(tmp_path, config)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("minimax", {"hidden_size": 192}),
        ("deepseek_v3", {"hidden_size": 192, "qk_nope_head_dim": 48, "v_head_dim": 80}),
        ("deepseek_v32", {}),
        ("glm_moe_dsa", {}),
        ("mimo_v2_flash", {}),
    ],
)
def test_fp8_blocks_are_the_model_that_mlx_lm_makes_of_them(tmp_path, model_type, changes):
    config = tiny(model_type, **changes)
    tensors = drawn(source_shapes(make_plan(config, KEEP)))
    tensors = {name: array.astype(mx.bfloat16) for name, array in tensors.items()}
    for name, array in list(tensors.items()):
        if "_proj" in name or ".experts." in name:
            tensors[name] = mx.to_fp8(array)
            blocks = [-(-n // 128) for n in array.shape]
            tensors[f"{name}_scale_inv"] = mx.random.uniform(0.5, 2.0, blocks)
    write(tmp_path, config, tensors)
    as_fp8(tmp_path / "model.safetensors")
    hold_against_mlx_lm(tmp_path, config | {"quantization_config": FP8}, rounded=True)


def as_fp8(path):
    """MLX writes FP8 codes as the uint8 that it holds them in: says in the header what they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    for info in header.values():
        info["dtype"] = info["dtype"].replace("U8", "F8_E4M3")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_gpt_oss_is_read_as_its_publisher_describes_it(tmp_path):
    """gate_up_proj [experts, hidden, 2 * inter] has gate and up in turn; weights are applied as x @ w, not w @ x."""
    config = tiny("gpt_oss")
    tensors = drawn(source_shapes(make_plan(config, KEEP)))
    write(tmp_path, config, tensors)
    checkpoint, plan = opened(tmp_path, config)
    read = {entry.outputs[0].name: np.array(whole(checkpoint, entry)) for entry in plan.entries}
    assert read.keys() == {p.name for p in inventory(config, {}).parameters}
    x = np.random.default_rng(0).normal(size=config["hidden_size"]).astype(np.float32)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts."
        for expert in range(config["num_local_experts"]):
            both = (
                x @ np.array(tensors[f"{at}gate_up_proj"][expert]) + np.array(tensors[f"{at}gate_up_proj_bias"])[expert]
            )
            for name, expected in (("gate_proj", both[::2]), ("up_proj", both[1::2])):
                ours = read[f"{at}{name}.weight"][expert] @ x + read[f"{at}{name}.bias"][expert]
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
        down = np.array(tensors[f"{at}down_proj"]).swapaxes(1, 2)
        np.testing.assert_array_equal(read[f"{at}down_proj.weight"], down)
        np.testing.assert_array_equal(read[f"{at}down_proj.bias"], np.array(tensors[f"{at}down_proj_bias"]))


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "mistral4", "qwen3_next", "minimax"])
def test_rows_of_a_part_are_those_of_the_whole_part(tmp_path, model_type):
    config = tiny(model_type)
    write(tmp_path, config, drawn(source_shapes(make_plan(config, KEEP))))
    checkpoint, plan = opened(tmp_path, config)
    for entry in plan.entries:
        part, rows = entry.parts - 1, entry.source_shape[0]
        full = checkpoint.read(entry, part)
        for start, stop in ((0, 1), (rows // 3, rows), (rows // 2, rows // 2 + 1)):
            piece = checkpoint.read(entry, part, start, stop)
            assert piece.shape == full[start:stop].shape and mx.array_equal(piece, full[start:stop]), entry.module


def test_a_head_that_only_some_checkpoints_have_is_read_where_there_is_one(tmp_path):
    config = tiny("gemma3_text")
    assert not any(e.role == "head" for e in make_plan(config, KEEP).entries)
    write(tmp_path, config, drawn(source_shapes(make_plan(config, KEEP)) | {"lm_head.weight": (64, 64)}))
    assert any(e.role == "head" for e in opened(tmp_path, config)[1].entries)
    hold_against_mlx_lm(tmp_path, config)


PUBLISHED = {  # by their cards: what config.json says and the number of weights
    "Llama-3.1-8B": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128, "layer_types": None},
        8_030_261_248,
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8},
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"vocab_size": 151936},
        30_532_122_624,
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
        | {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1}
        | {"first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
        | {"qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "n_group": 8, "topk_group": 4},
        671_026_419_200,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_weights(name):
    model_type, dimensions, weights = PUBLISHED[name]
    assert make_plan(tiny(model_type, **dimensions), load("uniform-4bit")).parameters == weights


@pytest.mark.parametrize(
    ("model_type", "name", "gone"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("qwen3", "lm_head.weight", True),
        ("deepseek_v3", "model.layers.3.eh_proj.weight", True),
        ("deepseek_v3", "model.layers.4.eh_proj.weight", False),
        ("deepseek_v3", "model.layers.2.eh_proj.weight", False),
        ("llama", "model.layers.3.self_attn.q_proj.weight", False),
        ("mimo", "model.mtp_layers.0.input_proj.weight", True),
        ("qwen3_next", "mtp.fc.weight", True),
        ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.e_score_correction_bias", True),
        ("llama", "model.vision_tower.x.weight", False),
    ],
)
def test_what_mlx_lm_makes_no_use_of_is_left_out_and_nothing_else_is(tmp_path, model_type, name, gone):
    config = tiny(model_type, tie_word_embeddings=name == "lm_head.weight")
    write(tmp_path, config, drawn(source_shapes(make_plan(config, KEEP)) | {name: (4, 4)}))
    if gone:
        _, plan = opened(tmp_path, config)
        assert name not in source_shapes(plan)
    else:
        with pytest.raises(RotorError, match=f"unknown tensor: {name}; not a checkpoint of this architecture"):
            opened(tmp_path, config)


def test_a_parameter_without_a_role_is_an_error_that_lists_it(monkeypatch):
    monkeypatch.setitem(models._registry(), "starcoder2", minimax_m2.ARCHITECTURE)
    with pytest.raises(RotorError, match=r"starcoder2': no role is known for .*c_fc\.weight, .* and \d+ more"):
        make_plan(tiny("starcoder2"), KEEP)


@pytest.mark.parametrize("names", [[], ["model.layers.0.mlp.experts.gate_up_proj_blocks"]])
def test_mxfp4_sources_are_refused_as_already_quantized(names):
    config = tiny("gpt_oss") | ({} if names else {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(RotorError, match=r"already quantized .to MXFP4.*start from a bfloat16 copy"):
        make_plan(config, KEEP, dict.fromkeys(names, "U8"))


def test_every_family_has_types_that_mlx_lm_knows_and_roles_that_exist():
    assert {"minimax_m2", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2"} <= set(
        models.supported()
    )
    assert {"deepseek_v3", "deepseek_v32", "glm", "glm4", "glm4_moe", "glm4_moe_lite"} <= set(models.supported())
    assert {"mixtral", "gpt_oss", "llama", "mistral", "olmoe"} <= set(models.supported())
    for model_type in models.supported():
        assert importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
        for tensor in models.lookup({"model_type": model_type}).tensors:
            role = ROLES[tensor.role]
            assert ("{layer}" in tensor.name) == role.layered or tensor.role in ("norm", "bias")


def test_both_names_of_minimax_are_one_architecture():
    assert models.lookup({"model_type": "minimax"}) is models.lookup({"model_type": "minimax_m2"})


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, {"model_type": None}, {"model_type": ["minimax"]}])
def test_an_unsupported_model_lists_the_supported_ones(config):
    with pytest.raises(RotorError, match=r"unsupported model_type .*; supported: .*minimax, minimax_m2"):
        models.lookup(config)


def test_a_config_that_mlx_lm_cannot_use_is_an_error_that_names_what_is_missing():
    config = tiny("minimax")
    del config["num_local_experts"]
    with pytest.raises(RotorError, match=r"can't make a minimax of it: .*num_local_experts"):
        make_plan(config, KEEP)


def test_placeholders_of_names():
    assert (
        re.fullmatch(pattern("model.layers.{layer}.*norm.weight"), "model.layers.12.input_layernorm.weight")["layer"]
        == "12"
    )
    assert not re.fullmatch(pattern("model.layers.{layer}.*norm.weight"), "model.layers.1.self_attn.q_norm.weight")
    assert re.fullmatch(pattern("mtp.**"), "mtp.a.b")
