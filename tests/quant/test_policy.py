import hashlib

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quant.policy import FOLDER, Layers, Spec, load, parse, shipped
from mlx_rotor.quant.roles import ROLES, expand

RULE = '[[rule]]\nroles = ["attn.q"]\nbits = 4\n'


def test_config_i_is_literal():
    policy = load("config-i")
    for layer in range(62):
        edge = layer in (0, 1, 60, 61)
        for role, middle in (("expert.gate", 2), ("expert.up", 2), ("expert.down", 3), ("attn.q", 4), ("attn.o", 4)):
            assert policy.spec(role, layer, 62) == Spec(8 if edge else middle, 64)
        for role in ("router", "router.bias", "norm"):
            assert policy.spec(role, layer, 62) is None
    assert policy.spec("embed", None, 62) == policy.spec("head", None, 62) == Spec(8, 64)
    assert policy.digest == hashlib.sha256((FOLDER / "config-i.toml").read_bytes()).hexdigest()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_policies_give_every_linear_the_same_bits(bits):
    policy = load(f"uniform-{bits}bit")
    for role in ROLES.values():
        expected = Spec(bits, 64) if role.quantizable else None
        assert policy.spec(role.name, 3 if role.layered else None, 8) == expected


def test_every_shipped_policy_covers_every_role():
    assert {"config-i", "uniform-2bit", "uniform-3bit", "uniform-4bit", "uniform-8bit"} <= set(shipped())
    for name in shipped():
        policy = load(name)
        assert policy.description
        for role in ROLES.values():
            for layer in range(5) if role.layered else [None]:
                policy.spec(role.name, layer, 5)


@pytest.mark.parametrize(
    ("layers", "covered"),
    [
        ('["first 2", "last 2"]', {0, 1, 8, 9}),
        ('"first 1"', {0}),
        ("[3]", {3}),
        ('["2-4", 7]', {2, 3, 4, 7}),
        ('["last 20"]', set(range(10))),
    ],
)
def test_layer_selectors(layers, covered):
    policy = parse(f'{RULE}layers = {layers}\n[[rule]]\nroles = ["attn.q"]\nkeep = true', "p")
    assert {layer for layer in range(10) if policy.spec("attn.q", layer, 10)} == covered


def test_the_first_rule_that_covers_decides():
    policy = parse(RULE + '[[rule]]\nroles = ["attn.*"]\nbits = 2\ngroup_size = 32', "p")
    assert policy.spec("attn.q", 0, 1) == Spec(4, 64)
    assert policy.spec("attn.k", 0, 1) == Spec(2, 32)


def test_group_size_has_a_default_of_the_file():
    policy = parse("group_size = 128\n" + RULE + '[[rule]]\nroles = ["attn.k"]\nbits = 2\ngroup_size = 32', "p")
    assert policy.spec("attn.q", 0, 1) == Spec(4, 128)
    assert policy.spec("attn.k", 0, 1) == Spec(2, 32)


def test_a_file_is_a_policy_named_after_itself(tmp_path):
    (tmp_path / "mine.toml").write_text(RULE)
    policy = load(tmp_path / "mine.toml")
    assert policy.name == "mine" and policy.spec("attn.q", 0, 1) == Spec(4)


def test_an_uncovered_role_is_an_error_that_names_it():
    with pytest.raises(RotorError, match=r"policy p: no rule covers role 'attn\.k' in layer 3"):
        parse(RULE, "p").spec("attn.k", 3, 8)
    with pytest.raises(RotorError, match="no rule covers role 'embed';"):
        parse(RULE, "p").spec("embed", None, 8)


def test_a_layer_the_model_lacks_is_an_error():
    with pytest.raises(RotorError, match="selects layer 30, but the model has layers 0-7"):
        Layers(ranges=((20, 30),)).covers(0, 8)


def test_an_unknown_policy_lists_the_shipped_ones():
    with pytest.raises(RotorError, match="unknown policy 'config-x'; shipped: config-i, uniform-2bit"):
        load("config-x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "policy p: not TOML"),
        ("", r"policy p: needs at least one \[\[rule\]\]"),
        ("rules = 1\n" + RULE, "policy p: unknown key 'rules'; keys: description"),
        (RULE + "bit = 4", "policy p, rule 1: unknown key 'bit'; keys: bits"),
        (RULE + '[[rule]]\nroles = ["attn.z"]\nbits = 4', r"rule 2: unknown role 'attn\.z'; roles: embed, head"),
        ('[[rule]]\nroles = ["expert"]\nbits = 4', "unknown role 'expert'"),
        ("[[rule]]\nroles = []\nbits = 4", "needs roles"),
        ('[[rule]]\nroles = "attn.q"\nbits = 4', "needs roles"),
        ('[[rule]]\nroles = ["attn.q"]', "needs either bits = N or keep = true"),
        (RULE + "keep = true", "needs either bits = N or keep = true"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = false', "needs either bits = N or keep = true"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = true\ngroup_size = 64', "keep = true takes neither"),
        ('[[rule]]\nroles = ["attn.q"]\nbits = 7', "bits = 7 is not supported; bits can be 2, 3, 4, 5, 6, 8"),
        ('[[rule]]\nroles = ["attn.q"]\nbits = true', "bits = True is not supported"),
        (RULE + "group_size = 48", "group_size = 48 is not supported; group_size can be 32, 64, 128"),
        (RULE + 'mode = "mxfp4"', "mode = 'mxfp4' is not supported; mode can be affine"),
        ('[[rule]]\nroles = ["router"]\nbits = 8', r"role 'router' \(expert scores\) is never quantized"),
        ('[[rule]]\nroles = ["norm"]\nbits = 8', "never quantized"),
        ('[[rule]]\nroles = ["embed"]\nbits = 8\nlayers = ["first 2"]', "role 'embed' has no layers"),
        (RULE + 'layers = ["middle 2"]', "'middle 2' is none of 'first N', 'last N', 'A-B', N"),
        (RULE + "layers = [true]", "True is none of"),
        (RULE + "layers = [-1]", "-1 is none of"),
        (RULE + 'layers = ["5-3"]', "'5-3' runs backwards"),
        (RULE + "layers = []", "an empty list selects nothing"),
    ],
)
def test_what_is_not_understood_is_an_error(text, message):
    with pytest.raises(RotorError, match=message):
        parse(text, "p")


def test_patterns_expand_to_known_roles():
    assert expand("expert.*") == ("expert.gate", "expert.up", "expert.down")
    assert expand("router") == ("router",)
