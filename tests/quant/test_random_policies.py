"""Random policies over random models: a plan is either a clean error or what MLX itself makes of the same specs."""

import hashlib
import math

import mlx.core as mx
import mlx.nn as nn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import zoo_configs
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import parameters, skeleton
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.policy import BITS, Spec, parse
from mlx_rotor.quant.selectors import ROLES, kept_unasked

TYPES = ("minimax", "qwen3_moe", "qwen3_next", "deepseek_v3", "glm4_moe_lite", "gpt_oss", "mistral4", "llama", "phi3")
DTYPES = {"U32": mx.uint32, "U8": mx.uint8, "BF16": mx.bfloat16}
SIZES = st.sampled_from([32, 64, 96, 128])


@st.composite
def configs(draw):
    config = zoo_configs.config(draw(st.sampled_from(TYPES)))
    hidden = draw(SIZES)
    changes = {
        "hidden_size": hidden,
        "intermediate_size": draw(SIZES),
        "moe_intermediate_size": draw(SIZES),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "vocab_size": 64,
        "head_dim": 32,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if "kv_lora_rank" in config:
        changes |= {"kv_lora_rank": draw(SIZES), "qk_nope_head_dim": 32, "v_head_dim": 64, "q_lora_rank": 32}
    if "layer_types" in config:
        changes["layer_types"] = (["sliding_attention", "full_attention"] * 2)[: changes["num_hidden_layers"]]
    return config | changes


LAYERS = st.sampled_from(['"first 1"', '"last 1"', '["0..1", "-1"]', '"middle"', '"1.."', "0", '"..-2"', '["5-7"]'])
PATTERNS = st.sampled_from(
    ["*", "attn.*", "expert.*", "mlp.*", "linear.*", "shared.*", "embed", "expert.down", "router"]
)
GROUPS = st.sampled_from(["32", "64", "[128, 64, 32]", "[64, 32]"])


@st.composite
def rules(draw):
    lines = [f"roles = [{', '.join(repr(p) for p in draw(st.lists(PATTERNS, min_size=1, max_size=2)))}]"]
    if draw(st.integers(0, 2)) == 0:
        lines.append(f"layers = {draw(LAYERS)}")
    if draw(st.integers(0, 4)) == 0:
        lines.append('names = ["*q_proj", "*.layers.1.*"]')
    how = draw(st.integers(0, 6))
    if how == 0:
        lines.append("keep = true")
    elif how == 1:
        lines.append(f'mode = "{draw(st.sampled_from(["mxfp4", "mxfp8", "nvfp4"]))}"')
    else:
        lines += [f"bits = {draw(st.sampled_from(BITS))}", f"group_size = {draw(GROUPS)}"]
    return "\n".join(["[[rule]]", *lines])


@st.composite
def policies(draw):
    floors = draw(
        st.dictionaries(st.sampled_from(["attn.*", "head", "expert.down"]), st.sampled_from(BITS), max_size=2)
    )
    text = "[floors]\n" + "".join(f'"{role}" = {bits}\n' for role, bits in floors.items())
    last = '[[rule]]\nroles = ["*"]\n' + draw(
        st.sampled_from(["keep = true", "bits = 4\ngroup_size = [64, 32]", "bits = 3"])
    )
    return "\n".join([text, *draw(st.lists(rules(), max_size=4)), last])


def quantized_by_mlx(config, plan):
    """Name -> (shape, dtype) of mlx_lm's model after mlx.nn.quantize with the plan's specs."""
    model = skeleton(config)
    model.set_dtype(mx.bfloat16)
    specs = {entry.module: entry.spec.as_config() for entry in plan.entries if entry.spec}
    if specs:
        nn.quantize(model, class_predicate=lambda path, _: specs.get(path, False))
    return {name: (array.shape, array.dtype) for name, array in tree_flatten(model.parameters())}


def hold_against_mlx(config, plan):
    expected = quantized_by_mlx(config, plan)
    outputs = {o.name: o for e in plan.entries for o in e.outputs}
    assert len(outputs) == sum(len(e.outputs) for e in plan.entries) and outputs.keys() == expected.keys()
    for entry in plan.entries:
        for output in entry.outputs:
            shape, dtype = expected[output.name]
            assert output.shape == shape
            assert entry.spec is None or DTYPES[output.dtype] == dtype
            if entry.spec:
                assert output.nbytes == math.prod(shape) * dtype.size
    assert plan.nbytes == sum(o.nbytes for o in outputs.values())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(configs(), policies(), st.data())
def test_a_plan_is_an_error_or_what_mlx_makes_of_it(config, text, data):
    try:
        plan = make_plan(config, parse(text, "p"))
    except RotorError as e:
        assert str(e)
        assume(False)
    tree = parameters(skeleton(config))
    assert plan.parameters == sum(math.prod(shape) for shape in tree.values())
    assert len({e.module for e in plan.entries}) == len(plan.entries) == len(tree)
    assert [e.layer or 0 for e in plan.entries if e.layer is not None] == sorted(
        e.layer for e in plan.entries if e.layer is not None
    )
    hold_against_mlx(config, plan)
    asked = "roles = ['router']" in text
    for entry in plan.entries:
        if entry.spec:
            assert entry.spec.bits >= plan.policy.floors.get(entry.role, 0)
            assert ROLES[entry.role].quantizable and (not kept_unasked(entry.role) or asked)
    free = [e for e in plan.entries if plan.options(e)]
    choice = {e.module: data.draw(st.sampled_from((None, *plan.options(e)))) for e in free[:: max(1, len(free) // 4)]}
    solved = plan.with_specs(choice)
    assert choice == {e.module: e.spec for e in solved.entries if e.module in choice}
    hold_against_mlx(config, solved)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=40), policies(), st.integers(0, 400))
def test_a_mangled_policy_is_a_policy_or_a_clean_error(junk, text, at):
    mangled = text[:at] + junk + text[at + len(junk) :]
    try:
        policy = parse(mangled, "p")
    except RotorError as e:
        assert "policy p" in str(e)
    else:
        assert policy.rules and policy.digest == hashlib.sha256(mangled.encode()).hexdigest()


def test_the_check_sees_a_wrong_size():
    config = zoo_configs.config("llama")
    plan = make_plan(config, parse('[[rule]]\nroles = ["*"]\nbits = 4\ngroup_size = 32', "p"))
    hold_against_mlx(config, plan)
    wrong = plan.with_specs({plan.entries[0].module: Spec(3, 32)})
    outputs = {o.name: o.shape for e in wrong.entries for o in e.outputs}
    assert outputs != {name: shape for name, (shape, _) in quantized_by_mlx(config, plan).items()}
