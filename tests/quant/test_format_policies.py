"""Policies with formats that MLX does not have: their sizes, their tensors, and what config.json says of them."""

import json
from pathlib import Path

import pytest

import zoo_configs
from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.experts import formats
from mlx_rotor.quant.budget import report
from mlx_rotor.quant.folding.scales import feeding
from mlx_rotor.quant.job import manifest
from mlx_rotor.quant.plan import make_plan, read_config
from mlx_rotor.quant.policy import Spec, load, parse
from mlx_rotor.quant.recipe import Recipe
from mlx_rotor.quant.safetensors_io import ITEMSIZE, header_bytes

H, Q, KV, INTER, EXPERTS, LAYERS, VOCAB = 3072, 48 * 128, 8 * 128, 1536, 256, 62, 200064
M27 = json.loads((Path(__file__).parents[2] / "examples" / "minimax_m27" / "config.json").read_text())
STACK = EXPERTS * INTER * H
ATTENTION = 2 * Q * H + 2 * KV * H
# hipfire's blocks: bytes of 256 weights.
MQ4, MQ3L, MQ2L, Q8 = 136, 112, 72, 34 * 8
TIERS = {
    "mq4": (MQ4, MQ4, 123.62),
    "mq3-lloyd": (MQ3L, MQ4, 109.58),
    "mq3": (MQ3L, MQ3L, 102.56),
    "mq2-lloyd": (MQ2L, MQ4, 86.18),
    "mq2": (MQ2L, MQ3L, 79.15),
}
KEPT = LAYERS * (EXPERTS * 4 + (2 * H + Q + KV) * 2) + H * 2  # routing bias and norms


@pytest.mark.parametrize("name", TIERS)
def test_hipfires_tiers_have_its_sizes(name):
    gate_up, down, published = TIERS[name]
    everywhere = LAYERS * (ATTENTION + EXPERTS * H) + 2 * VOCAB * H
    expected = (LAYERS * STACK * (2 * gate_up + down) + everywhere * Q8) // 256 + KEPT
    plan = make_plan(M27, load(name))
    assert plan.nbytes == expected and round(plan.nbytes / 1e9, 2) == published
    assert plan.parameters == 228_689_764_864


def test_mxfp4_16_has_its_size():
    linears = LAYERS * (3 * STACK + ATTENTION)
    plan = make_plan(M27, load("mxfp4-16"))
    assert plan.nbytes == linears * 5 // 8 + (LAYERS * EXPERTS * H + 2 * VOCAB * H) * 2 + KEPT
    assert round(plan.nbytes / 1e9, 1) == 144.7
    assert {e.spec for e in plan.entries if e.role.startswith(("expert", "attn"))} == {Spec(4, 16, "iq4_nl")}
    assert all(e.spec is None for e in plan.entries if e.role in ("router", "norm", "embed", "head"))


def test_files_have_the_size_that_the_header_and_the_plan_say():
    plan = make_plan(M27, load("mq2"))
    outputs = [o for e in plan.entries for o in e.outputs]
    length = int.from_bytes(header_bytes(outputs)[:8], "little")
    table = json.loads(header_bytes(outputs)[8 : 8 + length])
    assert max(t["data_offsets"][1] for k, t in table.items() if k != "__metadata__") == plan.nbytes
    assert {o.dtype for o in outputs} == {"U32", "F16", "BF16", "F32"} and ITEMSIZE["F16"] == 2


def tensors(plan, role):
    entry = next(e for e in plan.entries if e.role == role)
    return [(o.name.removeprefix(f"{entry.module}."), o.dtype, o.shape) for o in entry.outputs]


def test_tensors_are_named_and_shaped_as_the_layers_take_them():
    plan = make_plan(M27, load("mq2"))
    assert tensors(plan, "expert.gate") == [
        ("weight", "U32", (EXPERTS, INTER, H * 2 // 32)),
        ("codebooks", "F16", (EXPERTS, INTER, H // 256 * 4)),
    ]
    assert tensors(plan, "expert.down") == [
        ("weight", "U32", (EXPERTS, H, INTER * 3 // 32)),
        ("codebooks", "F16", (EXPERTS, H, INTER // 256 * 8)),
    ]
    assert tensors(plan, "router") == [("weight", "U32", (EXPERTS, H // 4)), ("scales", "F16", (EXPERTS, H // 32))]
    other = make_plan(M27, load("mxfp4-16"))
    assert tensors(other, "attn.k") == [("weight", "U32", (KV, H // 8)), ("scales", "F16", (KV, H // 16))]


def test_groups_fall_back_where_rows_are_short():
    plan = make_plan(read_config(MODEL), load("mq3"))  # experts' intermediate values: 64
    found = {e.role: e.spec for e in plan.entries}
    assert found["expert.gate"] == Spec(3, 256, "lloyd") and found["expert.down"] == Spec(3, 64, "lloyd")
    unsaid = parse('[[rule]]\nroles = ["attn.q"]\nmode = "lloyd"\nbits = 3', "p")
    rule = unsaid.rules[0]
    assert [unsaid.spec(rule, "attn.q", k).group_size for k in (768, 384, 192)] == [256, 128, 64]
    with pytest.raises(RotorError, match=r"does not divide its 96 input dimensions; would fit: none of lloyd's"):
        unsaid.spec(rule, "attn.q", 96)
    # 48 weights are three groups of 16, and no whole number of words that kernels read.
    sixteen = parse('[[rule]]\nroles = ["attn.q"]\nmode = "iq4_nl"', "p")
    assert sixteen.spec(sixteen.rules[0], "attn.q", 96) == Spec(4, 16, "iq4_nl")
    with pytest.raises(RotorError, match="48 input dimensions"):
        sixteen.spec(sixteen.rules[0], "attn.q", 48)


RULE = '[[rule]]\nroles = ["attn.q"]\n'


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        (RULE + 'mode = "lloyd"\nbits = 2\ngroup_size = [128, 64]', [(2, 128), (2, 64)]),
        ("group_size = 32\n" + RULE + 'mode = "lloyd"\nbits = 4', [(4, 256), (4, 128), (4, 64)]),
        ('mode = "lloyd"\ngroup_size = 64\n' + RULE + "bits = 4", [(4, 64)]),
        (RULE + 'mode = "q8"', [(8, 32)]),
        ('mode = "iq4_nl"\n' + RULE, [(4, 16), (4, 32)]),
    ],
)
def test_rules_of_our_formats(text, specs):
    found = parse(text, "p").rules[0].specs
    assert [(s.bits, s.group_size) for s in found] == specs and {s.mode for s in found} <= set(formats.ours())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RULE + 'mode = "lloyd"', "rule 1: mode lloyd needs bits = N"),
        (RULE + 'mode = "lloyd"\nbits = 5', "bits = 5 is not supported; bits can be 2, 3, 4"),
        (RULE + 'mode = "lloyd"\nbits = 3\ngroup_size = 32', "group_size = 32 is not supported; .* 256, 128, 64"),
        (RULE + 'mode = "q8"\nbits = 4', "bits = 4 is not supported; bits can be 8"),
        (RULE + 'mode = "iq4_nl"\ngroup_size = 64', "group_size = 64 is not supported; .* 16, 32"),
        (RULE + 'mode = "q8"\ngroup_size = []', "an empty list fits nothing"),
        ("awq = 2\n" + RULE + "bits = 4", "awq = 2: must be a number from 0"),
        ("awq = true\n" + RULE + "bits = 4", "awq = True"),
        ('kv = "fp8"\n' + RULE + "bits = 4", "kv must be a table of one codec"),
        ('[kv]\ncodec = "turbo3"\n' + RULE + "bits = 4", "codec = 'turbo3' is not supported; codec can be fp8"),
        (RULE + "bits = 4\nwhere_possible = 1", "where_possible = 1: must be true or false"),
        (RULE + "keep = true\nwhere_possible = true", "keep = true takes no where_possible"),
    ],
)
def test_what_is_not_understood_is_an_error(text, message):
    with pytest.raises(RotorError, match=f"policy p.*{message}"):
        parse(text, "p")


def test_a_floor_is_not_met_by_other_bits_of_the_format():
    policy = parse(f'[floors]\n"attn.*" = 4\n{RULE}mode = "lloyd"\nbits = 3', "p")
    with pytest.raises(RotorError, match=r"mode lloyd has 3 bits, the policy's floor for attn\.q is 4"):
        policy.spec(policy.rules[0], "attn.q", 256)


WIDE = {"qk_nope_head_dim": 64, "kv_lora_rank": 64, "v_head_dim": 64, "intermediate_size": 64, "q_lora_rank": 64}
LATENT = zoo_configs.config("deepseek_v3") | WIDE | {"moe_intermediate_size": 64, "hidden_size": 64}


def test_a_router_that_has_no_quantized_form_is_kept_where_the_rule_says_so():
    assert [p.role for p in make_plan(LATENT, load("mq4")).entries if p.role == "router" and p.spec] == []
    strict = parse('[[rule]]\nroles = ["router"]\nmode = "q8"\n[[rule]]\nroles = ["*"]\nmode = "q8"', "p")
    with pytest.raises(RotorError, match=r"mlp\.gate\.weight: mlx_lm has no quantized form of it"):
        make_plan(LATENT, strict)


BROAD = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "olmoe", "llama"])
def test_every_tier_plans_other_architectures(kind):
    config = zoo_configs.config(kind) | BROAD
    for name, down in (*((name, bits) for name, (_, bits, _) in TIERS.items()), ("mxfp4-16", 0)):
        by_role = {e.role: e.spec for e in make_plan(config, load(name)).entries}
        assert by_role["attn.q"] == (Spec(8, 32, "q8") if down else Spec(4, 16, "iq4_nl"))
        if "expert.down" in by_role:
            expected = {MQ4: Spec(4, 64), MQ3L: Spec(3, 64, "lloyd"), 0: Spec(4, 16, "iq4_nl")}
            assert by_role["expert.down"] == expected[down]
        if "mlp.down" in by_role:
            assert by_role["mlp.down"] == (Spec(4, 64) if down else Spec(4, 16, "iq4_nl"))


def test_what_a_layer_is_there_for_only_in_mlx_is_refused():
    plan = make_plan(M27 | {"num_hidden_layers": 1, "num_local_experts": 2}, load("mq4"))
    gate = next(e.module for e in plan.entries if e.role == "expert.gate")
    assert plan.with_specs({gate: Spec(2, 256, "lloyd")}).nbytes < plan.nbytes
    with pytest.raises(RotorError, match=r"role 'norm' is not quantized"):
        plan.with_specs({"model.norm": Spec(8, 32, "q8")})


def test_config_says_every_module_of_our_formats_and_names_the_file():
    plan = make_plan(read_config(MODEL), load("mq2-lloyd"))
    config = manifest.config_of(read_config(MODEL), plan)
    section = config["quantization"]
    assert config["quantization_config"] == section and config["model_file"] == "mlx_rotor_formats.py"
    assert (section["mode"], section["bits"], section["group_size"]) == ("affine", 4, 64)  # down, the only one of MLX's
    for entry in plan.entries:
        if entry.spec and entry.spec.mode != "affine":
            assert section[entry.module] == entry.spec.as_config()
    assert list(manifest.formats_file(read_config(MODEL), plan)) == ["mlx_rotor_formats.py"]
    alone = manifest.config_of(read_config(MODEL), make_plan(read_config(MODEL), load("mxfp4-16")))["quantization"]
    assert alone["mode"] == "affine" and all(v["mode"] == "iq4_nl" for v in alone.values() if isinstance(v, dict))


def test_policies_of_mlxs_formats_name_no_file():
    plan = make_plan(read_config(MODEL), load("config-i"))
    assert "model_file" not in manifest.config_of(read_config(MODEL), plan)
    assert manifest.formats_file(read_config(MODEL), plan) == {}


def test_a_budget_decides_on_affine_weights_alone():
    text = '[budget]\nbits_per_weight = 5.2\n[[rule]]\nroles = ["expert.gate"]\nmode = "lloyd"\nbits = 2\n'
    plan = Recipe(parse(text + '[[rule]]\nroles = ["*"]\nbits = 4', "p")).plan(read_config(MODEL))
    assert {e.spec for e in plan.entries if e.role == "expert.gate"} == {Spec(2, 256, "lloyd")}
    assert len({e.spec for e in plan.entries if e.spec and e.spec.mode == "affine"}) > 1


def test_reports_have_rows_for_our_formats():
    plan = make_plan(M27, load("mq2-lloyd"))
    row = report.summarise("mq2-lloyd", plan, fit="search", shard_bytes=4 * 10**9)
    assert row.stacks == {"2b g256 lloyd": 124, "4b g128": 62} and 0.05 < row.fitted < 0.1
    assert "2b g256 lloyd" in report.table([row])


def test_what_a_policy_asks_for_in_vain_is_said():
    config = read_config(MODEL)

    def notes(name, **given):
        recipe = Recipe(load(name), **given)
        return recipe.notes(make_plan(config, recipe.policy))

    assert [note.rpartition(": ")[2] for note in notes("mq2")] == ["left out without --calibration or --imatrix"]
    assert "KV scales" in notes("mxfp4-16")[0] and notes("mq4") == notes("config-i") == []
    assert notes("mq2", calibration="bundled") == notes("mxfp4-16", calibration="bundled") == []
    assert notes("mq2", fit="fast")[0].endswith("without --calibration or --imatrix and --fit search or best")
    llama = Recipe(load("mq2"), calibration="bundled").notes(make_plan(zoo_configs.config("llama"), load("mq2")))
    assert "no normalization" in llama[0]
    assert len(feeding(make_plan(config, load("mq2")).entries)) == 8
