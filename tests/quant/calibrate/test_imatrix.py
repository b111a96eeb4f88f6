"""llama.cpp's importance matrices, from files its own package writes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quant import policy
from mlx_rotor.quant.calibrate.imatrix import NAMES, Imatrix
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.selectors import ROLES

CONFIG = {
    "model_type": "minimax_m2",
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rotary_dim": 32,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
    "rms_norm_eps": 1e-6,
    "vocab_size": 192,
}
KINDS = {"attn_q": 128, "attn_output": 128, "ffn_gate_exps": 128, "ffn_up_exps": 128, "ffn_down_exps": 64}


def tensors():
    """As llama-imatrix names and shapes them: expert 1 of layer 0 saw nothing; layer 1 has no attention at all."""
    rng, out = np.random.default_rng(5), {}
    for layer in range(2):
        for kind, inputs in KINDS.items():
            if layer == 1 and kind.startswith("attn"):
                continue
            counts = np.array([[7.0], [0.0], [3.0]] if kind.endswith("exps") else [[10.0]], np.float32)
            values = rng.uniform(0.1, 2, (len(counts), inputs)).astype(np.float32) * counts
            out[f"blk.{layer}.{kind}.weight.in_sum2"] = values
            out[f"blk.{layer}.{kind}.weight.counts"] = counts
    out["output.weight.in_sum2"] = rng.uniform(0, 2, (1, 128)).astype(np.float32)
    out["output.weight.counts"] = np.array([[4.0]], np.float32)
    return out


def write(path, values):
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def plan():
    return make_plan(CONFIG, policy.load("uniform-4bit"))


def entry(plan, role, layer=None):
    return next(e for e in plan.entries if e.role == role and e.layer == layer)


def test_each_expert_has_its_mean_squares(tmp_path, plan):
    found = tensors()
    guide = Imatrix(write(tmp_path / "im.gguf", found), plan, None)
    for role, kind in (("expert.gate", "ffn_gate_exps"), ("expert.down", "ffn_down_exps")):
        for layer in range(2):
            sums = found[f"blk.{layer}.{kind}.weight.in_sum2"]
            for expert, count in ((0, 7), (2, 3)):
                got = guide.importance(entry(plan, role, layer), expert)
                np.testing.assert_allclose(got, sums[expert] / count, rtol=1e-6)
    np.testing.assert_allclose(guide.importance(entry(plan, "head")), found["output.weight.in_sum2"][0] / 4, rtol=1e-6)
    assert guide.hessian(entry(plan, "head")) is None


def test_an_expert_that_saw_nothing_gets_the_layers_mean_or_none(tmp_path, plan):
    found = tensors()
    guide = Imatrix(write(tmp_path / "im.gguf", found), plan, None)
    got = guide.importance(entry(plan, "expert.up", 0), 1)
    np.testing.assert_allclose(got, found["blk.0.ffn_up_exps.weight.in_sum2"].sum(0) / 10, rtol=1e-6)
    assert guide.importance(entry(plan, "expert.down", 0), 1) is None


def test_keys_take_what_queries_take_and_what_is_missing_is_named(tmp_path, plan):
    found = tensors()
    guide = Imatrix(write(tmp_path / "im.gguf", found), plan, None)
    for role in ("attn.k", "attn.v"):
        np.testing.assert_allclose(
            guide.importance(entry(plan, role, 0)), found["blk.0.attn_q.weight.in_sum2"][0] / 10, rtol=1e-6
        )
    assert guide.importance(entry(plan, "attn.o", 1)) is None
    assert set(guide.missing) == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"}


def test_the_digest_is_the_files(tmp_path, plan):
    a, b = (Imatrix(write(tmp_path / f"{i}.gguf", tensors()), plan, None) for i in range(2))
    other = tensors()
    other["output.weight.counts"] *= 2
    assert a.digest == b.digest != Imatrix(write(tmp_path / "c.gguf", other), plan, None).digest


def changed(**changes):
    out = tensors()
    for name, value in changes.items():
        key = next(k for k in out if k.replace(".", "_") == name)
        if value is None:
            del out[key]
        else:
            out[key] = value
    return out


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed(blk_0_attn_q_weight_in_sum2=np.ones((1, 64), np.float32)), "1 x 64 inputs.*made for another model"),
        (changed(blk_1_ffn_down_exps_weight_counts=None), "has no counts"),
        (changed(blk_1_ffn_down_exps_weight_counts=np.ones((2, 1), np.float32)), "not one for each of its 3"),
        (changed(output_weight_in_sum2=np.full((1, 128), np.nan, np.float32)), "not finite"),
        ({"token_embd.weight": np.ones((4, 4), np.float32)}, "no imatrix"),
        (
            {"v.in_sum2": np.ones((1, 4), np.float32), "v.counts": np.ones((1, 1), np.float32)},
            "no weight of this model",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, plan, values, said):
    with pytest.raises(RotorError, match=said):
        Imatrix(write(tmp_path / "im.gguf", values), plan, None)


def test_files_that_are_none_are_refused(tmp_path, plan):
    old, cut = tmp_path / "imatrix.dat", tmp_path / "cut.gguf"
    old.write_bytes(b"\x05\x00\x00\x00" * 40)
    cut.write_bytes(write(tmp_path / "im.gguf", tensors()).read_bytes()[:700])
    for path, said in ((old, "llama-imatrix --in-file"), (cut, "not readable"), (tmp_path / "none.gguf", "No such")):
        with pytest.raises(RotorError, match=said):
            Imatrix(path, plan, None)


def test_every_role_named_is_one():
    assert set(NAMES) <= set(ROLES)
