"""Reading and checking a source checkpoint."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.quant import source
from mlx_rotor.quant.inventory import Layout
from mlx_rotor.quant.plan import Entry, make_plan, read_config
from mlx_rotor.quant.policy import load
from mlx_rotor.quant.source import Checkpoint, companions, is_repository, locate

Q0 = "model.layers.0.self_attn.q_proj.weight"


def opened(folder):
    config = read_config(folder)
    found = Checkpoint.open(folder, config)
    found.verify(make_plan(config, load("uniform-8bit"), found.dtypes))
    return found


@pytest.mark.parametrize("fp8", [True, False])
def test_weights_are_read_as_float32_whole_and_by_rows(checkpoint, truth, fp8):
    folder, tensors = checkpoint(fp8=fp8, router="F32")
    found = opened(folder)
    for name, (_, values) in tensors.items():
        if not name.endswith("_scale_inv"):
            np.testing.assert_array_equal(np.array(found.rows(name)), truth(tensors, name), err_msg=name)
            assert found.tensors[name].nbytes == values.nbytes
    down = "model.layers.1.block_sparse_moe.experts.2.w2.weight"  # 192 rows: one and a half blocks
    np.testing.assert_array_equal(np.array(found.rows(down, 128, 192)), truth(tensors, down)[128:])


def test_the_bundled_model_is_read(truth):
    found = opened(MODEL)
    from safetensors import safe_open

    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert found.tensors[name].dtype == "F8_E4M3"
    with safe_open(found.tensors[name].path, "mlx") as file:
        scale = np.array(file.get_tensor(f"{name}_scale_inv"))
    raw = np.frombuffer(found.tensors[name].read(), np.uint8).reshape(found.tensors[name].shape)
    tensors = {name: ("F8_E4M3", raw), f"{name}_scale_inv": ("F32", scale)}
    np.testing.assert_array_equal(np.array(found.rows(name)), truth(tensors, name))


def test_float16_is_read(checkpoint):
    halves = np.linspace(-2, 2, 192).astype(np.float16)
    folder, _ = checkpoint(alter=lambda t: t.update({"model.norm.weight": ("F16", halves)}))
    np.testing.assert_array_equal(np.array(opened(folder).rows("model.norm.weight")), halves.astype(np.float32))


def test_a_folder_without_an_index_is_read(checkpoint):
    folder, tensors = checkpoint(shards=1)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    assert opened(folder).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t: t.update({"model.layers.2.x": t["model.norm.weight"]}), "unknown tensor: model.layers.2.x; not a"),
        (lambda t: t.update({f"x{i}": t["model.norm.weight"] for i in range(5)}), "x0, x1, x2 and 2 more"),
        (lambda t: t.pop("model.norm.weight"), "missing tensor: model.norm.weight"),
        (
            lambda t: t.pop("model.layers.0.block_sparse_moe.experts.0.w1.weight"),
            r"missing tensor: model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight; not",
        ),
        (lambda t: t.pop(f"{Q0}_scale_inv"), f"missing tensor: {Q0}_scale_inv"),
        (lambda t: t.update({Q0: (t[Q0][0], t[Q0][1][:-1])}), rf"{Q0} has shape \[127, 192\], config.json implies"),
        (
            lambda t: t.update({Q0: ("I8", t[Q0][1]), f"{Q0}_scale_inv": t[f"{Q0}_scale_inv"]}),
            "unknown tensor: .*scale",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("U16", t["model.norm.weight"][1])}),
            "model.norm.weight has dtype U16, which can't be quantized from",
        ),
        (
            lambda t: t.update({f"{Q0}_scale_inv": ("F32", np.ones((2, 2), np.float32))}),
            rf"{Q0}_scale_inv has shape \[2, 2\], config.json implies \[1, 2\]",
        ),
    ],
)
def test_tensors_that_differ_from_the_plan_are_an_error(checkpoint, alter, message):
    folder, _ = checkpoint(alter=alter)
    with pytest.raises(RotorError, match=message):
        opened(folder)


def test_a_missing_shard_is_named(checkpoint):
    folder, _ = checkpoint(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RotorError, match=r"missing shard: model-00002-of-00003\.safetensors; download it again"):
        opened(folder)


def test_a_tensor_in_two_shards_or_in_the_wrong_one_is_an_error(checkpoint):
    folder, _ = checkpoint(shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(f'"{Q0}": "{first.name}"', f'"{Q0}": "{second.name}"'))
    with pytest.raises(RotorError, match=f"missing tensor: {Q0} in the shard that model.safetensors.index.json names"):
        opened(folder)
    index.write_text(text)
    second.write_bytes(first.read_bytes())
    with pytest.raises(RotorError, match=r"is in both model-00001-of-00002\.safetensors and model-00002"):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a safetensors index"), ("{}", "not a safetensors index"), ("[]", "not a safetensors")],
)
def test_a_broken_index_is_an_error(checkpoint, text, message):
    folder, _ = checkpoint()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(RotorError, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, "already quantized for MLX"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'; only FP8"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size must be two"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, "weight_block_size must be two"),
    ],
)
def test_a_source_quantized_otherwise_is_refused(checkpoint, change, message):
    folder, _ = checkpoint()
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(RotorError, match=message):
        Checkpoint.open(folder, config)


def test_values_that_are_not_finite_name_their_tensor(checkpoint):
    name = "model.embed_tokens.weight"

    def alter(tensors):
        tensors[name][1][5, 7] = 0x7F80  # infinity in bf16

    folder, _ = checkpoint(alter=alter)
    found = opened(folder)
    with pytest.raises(RotorError, match=f"{name}: holds NaN or infinite values"):
        found.rows(name)
    found.rows(name, 6)


def test_companions_are_what_a_reader_needs(tmp_path):
    wanted = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja", "generation_config.json"]
    for name in [*wanted, "config.json", "model.safetensors.index.json", "training.json", "tokenizer.safetensors"]:
        (tmp_path / name).write_text("x")
    assert [p.name for p in companions(tmp_path)] == sorted(wanted)


def test_a_repository_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert is_repository("org/name") and is_repository("MiniMaxAI/MiniMax-M2.7")
    assert not any(map(is_repository, ["org/local", "./org/name", "/org/name", "org", "org/name/x", "../org"]))


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/no/where", "a/b/c"])
def test_a_folder_that_is_not_there_is_an_error(model):
    with pytest.raises(RotorError, match=f"no folder {model}; --model takes a checkpoint folder or"):
        locate(model)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(RotorError, match="is a file"):
        locate(tmp_path / "x")


def test_a_repository_is_fetched_config_first(checkpoint, monkeypatch):
    import huggingface_hub

    folder, _ = checkpoint()
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    def config(repo, name):
        asked.append((repo, name))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("org/name", config_only=True) == folder
    assert asked == [("org/name", "config.json")]
    assert locate("org/name") == folder
    assert asked[1][0] == "org/name" and {"*.safetensors", "config.json", "tokenizer*", source.INDEX} <= set(
        asked[1][1]
    )


def test_offline_is_one_clear_error(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("Please check your connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RotorError, match=r"no folder org/name, and .*fetched: Please check your connection$"):
        locate("org/name", config_only=True)


def test_an_expert_of_a_tensor_that_experts_share_is_named(tmp_path):
    stack = mx.ones((3, 64, 64)).astype(mx.bfloat16)
    stack[1, 5, 7] = float("nan")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"experts.up": stack})
    found = Checkpoint.open(tmp_path, {})
    entry = Entry(
        "up", "expert.up", 0, (3, 64, 64), None, ("experts.up",) * 3, (), layout=Layout((3, 64, 64), 64), stacked=True
    )
    assert found.read(entry, 0).shape == (64, 64)
    with pytest.raises(RotorError, match=r"experts\.up, expert 1: holds NaN"):
        found.read(entry, 1)
