import json
from pathlib import Path

import pytest

import zoo_configs
from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.quant.plan import make_plan, read_config
from mlx_rotor.quant.policy import Spec, load, parse

H, Q, KV, INTER, EXPERTS, LAYERS, VOCAB = 3072, 48 * 128, 8 * 128, 1536, 256, 62, 200064
M27 = json.loads((Path(__file__).parents[2] / "examples" / "minimax_m27" / "config.json").read_text())
M27 |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
SMALL = M27 | {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 5, "num_local_experts": 4, "vocab_size": 64}


def packed(weights: int, bits: int, group: int = 64) -> int:
    """Bytes of codes and of a bf16 scale and bias a group."""
    assert weights * bits % 8 == weights % group == 0
    return weights * bits // 8 + weights // group * 4


def test_config_i_on_the_published_dimensions_is_exact():
    plan = make_plan(M27, load("config-i"))
    stack, attention = EXPERTS * INTER * H, 2 * Q * H + 2 * KV * H
    by_role = {
        "middle gate/up": 58 * 2 * packed(stack, 2),
        "middle down": 58 * packed(stack, 3),
        "edge experts": 4 * 3 * packed(stack, 8),
        "middle attention": 58 * packed(attention, 4),
        "edge attention": 4 * packed(attention, 8),
        "embeddings and head": 2 * packed(VOCAB * H, 8),
        "router": LAYERS * EXPERTS * H * 2,
        "router bias": LAYERS * EXPERTS * 4,
        "norms": (LAYERS * (2 * H + Q + KV) + H) * 2,
    }
    assert plan.nbytes == sum(by_role.values()) == 92_871_229_440
    assert plan.parameters == 228_689_764_864
    assert plan.total() == "92.871 GB = 86.49 GiB, 3.2488 bits a weight"
    assert [f"{by_role[k] / 1e9:.2f}" for k in ("middle gate/up", "middle down", "edge experts")] == [
        "43.79",
        "30.65",
        "15.40",
    ]
    assert {e.role: e for e in plan.entries}["expert.down"].shape == (EXPERTS, H, INTER)


@pytest.mark.parametrize(
    ("bits", "gb"), [(2, "71.549"), (3, "100.129"), (4, "128.709"), (5, "157.289"), (6, "185.869"), (8, "243.029")]
)
def test_uniform_policies_are_exact(bits, gb):
    plan = make_plan(M27, load(f"uniform-{bits}bit"))
    kept = LAYERS * (EXPERTS * H * 2 + EXPERTS * 4 + (2 * H + Q + KV) * 2) + H * 2
    linears = LAYERS * (3 * EXPERTS * INTER * H + 2 * Q * H + 2 * KV * H) + 2 * VOCAB * H
    assert plan.nbytes == packed(linears, bits) + kept
    assert f"{plan.nbytes / 1e9:.3f}" == gb


@pytest.mark.parametrize(("name", "total"), [("jang-k", "85.944 GB = 80.04 GiB, 3.0065 bits a weight")])
def test_other_published_policies_are_exact(name, total):
    assert make_plan(M27, load(name)).total() == total


def test_rows_add_up_and_name_their_layers():
    plan = make_plan(M27, load("config-i"))
    rows = plan.rows()
    assert sum(row.nbytes for row in rows) == plan.nbytes
    assert sum(row.parameters for row in rows) == plan.parameters
    gate = [(row.layers, row.count, row.spec.bits) for row in rows if row.role == "expert.gate"]
    assert gate == [("0-1, 60-61", 4, 8), ("2-59", 58, 2)]
    roles = [row.role for row in rows]
    assert roles == sorted(roles, key=roles.index), "rows of a role stand together"
    assert [(r.count, r.spec) for r in rows if r.role == "router"] == [(62, None)]


def test_outputs_have_mlx_shapes():
    entries = {e.module: e for e in make_plan(M27, load("config-i")).entries}
    gate = entries["model.layers.2.block_sparse_moe.switch_mlp.gate_proj"]
    assert [(o.name.rsplit(".", 1)[1], o.dtype, o.shape) for o in gate.outputs] == [
        ("weight", "U32", (256, 1536, 192)),
        ("scales", "BF16", (256, 1536, 48)),
        ("biases", "BF16", (256, 1536, 48)),
    ]
    assert gate.sources[17] == "model.layers.2.block_sparse_moe.experts.17.w1.weight"
    assert entries["model.layers.2.block_sparse_moe.switch_mlp.up_proj"].sources[0].endswith("experts.0.w3.weight")
    assert entries["model.layers.2.block_sparse_moe.switch_mlp.down_proj"].sources[0].endswith("experts.0.w2.weight")
    bias = entries["model.layers.0.block_sparse_moe.e_score_correction_bias"]
    assert [(o.name, o.dtype, o.shape) for o in bias.outputs] == [(bias.module, "F32", (256,))]


def test_entries_run_through_the_layers_in_order():
    layers = [e.layer for e in make_plan(M27, load("config-i")).entries]
    inner = [n for n in layers if n is not None]
    assert inner == sorted(inner) and layers[0] is None and layers[-2:] == [None, None]


def test_plan_needs_the_real_tensors_that_the_bundled_model_has():
    plan = make_plan(read_config(MODEL), load("config-i"))
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())["weight_map"]
    sources = {name for entry in plan.entries for name in entry.sources}
    assert sources == {name for name in index if not name.endswith("_scale_inv")}


def test_kept_tensors_are_bf16_but_for_the_router_and_its_bias():
    names = {
        "model.layers.0.block_sparse_moe.gate.weight": "F32",
        "model.layers.1.block_sparse_moe.gate.weight": "F8_E4M3",
        "model.norm.weight": "F32",
    }
    dtypes = {e.module: e.outputs[0].dtype for e in make_plan(M27, load("config-i"), names).entries if not e.spec}
    assert dtypes["model.layers.0.block_sparse_moe.gate"] == "F32"
    assert dtypes["model.layers.1.block_sparse_moe.gate"] == dtypes["model.norm"] == "BF16"
    assert dtypes["model.layers.1.block_sparse_moe.e_score_correction_bias"] == "F32"


def test_config_dtype_stands_in_for_headers():
    policy = load("config-i")
    sizes = {d: make_plan(M27 | {"torch_dtype": d}, policy).nbytes for d in ("bfloat16", "float32")}
    assert sizes["float32"] - sizes["bfloat16"] == LAYERS * EXPERTS * H * 2
    assert sizes["bfloat16"] == make_plan(M27, policy).nbytes


def test_tied_embeddings_have_no_head():
    plan = make_plan(M27 | {"tie_word_embeddings": True}, load("config-i"))
    assert all(e.role != "head" for e in plan.entries)


def test_a_group_size_that_does_not_divide_names_the_tensor_and_what_fits():
    assert make_plan(SMALL | {"intermediate_size": 96}, _with(32)).nbytes
    with pytest.raises(
        RotorError,
        match=r"policy p, rule 1: .*down_proj\.weight: group_size 64 does not divide its 96 .*; would fit: 32",
    ):
        make_plan(SMALL | {"intermediate_size": 96}, _with(64))
    with pytest.raises(RotorError, match="would fit: none of MLX's"):
        make_plan(SMALL | {"intermediate_size": 80}, _with(64))


def _with(group_size):
    rules = f'[[rule]]\nroles = ["expert.down"]\nbits = 4\ngroup_size = {group_size}\n'
    return parse(rules + '[[rule]]\nroles = ["*"]\nkeep = true', "p")


def test_roles_that_no_rule_covers_are_all_listed():
    with pytest.raises(
        RotorError, match=r"policy p: no rule covers role 'attn\.q' \(model\.layers\.0\..* and 2 more\)"
    ) as e:
        make_plan(SMALL, parse('[[rule]]\nroles = ["e*", "head", "attn.k", "attn.v"]\nkeep = true', "p"))
    assert "role 'attn.o'" in str(e.value) and "norm" not in str(e.value) and "router" not in str(e.value)


def test_the_router_is_quantized_when_asked_for():
    asked = parse('[[rule]]\nroles = ["router"]\nbits = 8\n[[rule]]\nroles = ["*"]\nbits = 4', "p")
    gates = [e for e in make_plan(SMALL, asked).entries if e.role == "router"]
    assert len(gates) == 5 and all(e.spec == Spec(8, 64) and len(e.outputs) == 3 for e in gates)
    deepseek = zoo_configs.config("deepseek_v3") | {"qk_nope_head_dim": 64, "kv_lora_rank": 64, "v_head_dim": 64}
    with pytest.raises(RotorError, match=r"mlp\.gate\.weight: mlx_lm has no quantized form of it"):
        make_plan(deepseek | {"intermediate_size": 64, "moe_intermediate_size": 64, "q_lora_rank": 64}, asked)


def test_a_policys_fit_is_the_entrys():
    plan = make_plan(
        SMALL, parse('[[rule]]\nroles = ["expert.*"]\nbits = 2\nfit = "best"\n[[rule]]\nroles = ["*"]\nbits = 4', "p")
    )
    assert {e.fit for e in plan.entries if e.role.startswith("expert")} == {"best"}
    assert {e.fit for e in plan.entries if not e.role.startswith("expert")} == {""}


def test_with_specs_changes_what_it_names_and_its_bytes():
    plan = make_plan(SMALL, load("uniform-4bit"))
    q, down = (next(e for e in plan.entries if e.role == role) for role in ("attn.q", "expert.down"))
    changed = plan.with_specs({q.module: None, down.module: Spec(3, 32)})
    by_module = {e.module: e for e in changed.entries}
    assert [o.dtype for o in by_module[q.module].outputs] == ["BF16"] and by_module[q.module].nbytes == 2 * q.parameters
    assert by_module[down.module].nbytes == packed(down.parameters, 3, 32)
    assert changed.nbytes - plan.nbytes == 2 * q.parameters - q.nbytes + packed(down.parameters, 3, 32) - down.nbytes
    assert [e for e in changed.entries if e.module not in (q.module, down.module)] == [
        e for e in plan.entries if e.module not in (q.module, down.module)
    ]
    assert changed.with_specs({q.module: q.spec, down.module: down.spec}) == plan


@pytest.mark.parametrize(
    ("module", "spec", "message"),
    [
        ("model.layers.9.x", Spec(4), r"the model has no model\.layers\.9\.x"),
        ("model.norm", Spec(4), "role 'norm' is not quantized"),
        ("model.layers.0.block_sparse_moe.gate", Spec(8), "role 'router' is not quantized"),
        ("model.layers.0.self_attn.q_proj", Spec(3), r"3 bits are below the policy's floor of 4 for attn\.q"),
        ("model.layers.0.block_sparse_moe.switch_mlp.down_proj", Spec(4, 64), "group_size 64 does not divide its 96"),
    ],
)
def test_with_specs_refuses_what_a_policy_would(module, spec, message):
    text = 'group_size = 32\n[floors]\n"attn.*" = 4\n[[rule]]\nroles = ["*"]\nbits = 4'
    plan = make_plan(SMALL | {"intermediate_size": 96}, parse(text, "p"))
    with pytest.raises(RotorError, match=message):
        plan.with_specs({module: spec})


def test_options_are_the_affine_specs_that_fit_and_keep_the_floor():
    text = 'group_size = 32\n[floors]\n"attn.*" = 5\n[[rule]]\nroles = ["embed"]\nkeep = true\n'
    text += '[[rule]]\nroles = ["*"]\nbits = 4'
    plan = make_plan(SMALL | {"intermediate_size": 96}, parse(text, "p"))
    found = {e.role: plan.options(e) for e in plan.entries}
    assert found["embed"] == found["norm"] == found["router"] == ()
    assert set(found["attn.q"]) == {Spec(b, g) for b in (5, 6, 8) for g in (32, 64, 128)}
    assert found["expert.down"] == tuple(Spec(b, 32) for b in (2, 3, 4, 5, 6, 8))
    for entry in plan.entries:
        sizes = [plan.with_specs({entry.module: spec}).nbytes for spec in plan.options(entry)]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(("text", "message"), [("{", "not readable as JSON"), ("[]", "expected a JSON object")])
def test_a_broken_config_is_an_error(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RotorError, match=message):
        read_config(tmp_path)
