import hashlib

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quant import fit
from mlx_rotor.quant.policy import FITS, FOLDER, Spec, load, parse, shipped
from mlx_rotor.quant.selectors import ROLES, Layers, expand, kept_unasked

RULE = '[[rule]]\nroles = ["attn.q"]\nbits = 4\n'
KEEP_REST = '[[rule]]\nroles = ["*"]\nkeep = true\n'


def spec_of(policy, role, layer=0, count=8, columns=3072, module="m"):
    rule = policy.rule(role, module, layer, count)
    return None if rule is None else policy.spec(rule, role, columns)


def test_config_i_is_literal():
    policy = load("config-i")
    for layer in range(62):
        edge = layer in (0, 1, 60, 61)
        for role, middle in (("expert.gate", 2), ("expert.up", 2), ("expert.down", 3), ("attn.q", 4), ("attn.o", 4)):
            assert spec_of(policy, role, layer, 62) == Spec(8 if edge else middle, 64)
        for role in ("router", "router.bias", "norm"):
            assert policy.rule(role, "m", layer, 62) is None
    assert spec_of(policy, "embed", None, 62) == spec_of(policy, "head", None, 62) == Spec(8, 64)
    assert policy.digest == hashlib.sha256((FOLDER / "config-i.toml").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "ends", "middle"),
    [
        ("config-i", 2, {"attn.q": 4, "attn.kv_b": 4, "mlp.gate": 4, "mlp.down": 4, "shared.down": 4, "linear.in": 4}),
        ("config-i-hybrid", 2, {"attn.q": 5, "attn.o": 5, "mlp.gate": 4, "mlp.gate_up": 4, "mlp.down": 4}),
        ("config-i-premium", 4, {"attn.q": 5, "mlp.gate": 5, "mlp.gate_up": 5, "mlp.down": 6, "shared.down": 6}),
    ],
)
def test_config_i_of_dense_models(name, ends, middle):
    policy = load(name)
    for role, bits in middle.items():
        found = [spec_of(policy, role, layer, 20).bits for layer in range(20)]
        assert found == [8] * ends + [bits] * (20 - 2 * ends) + [8] * ends, role


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_uniform_policies_give_every_linear_the_same_bits(bits):
    policy = load(f"uniform-{bits}bit")
    for role in ROLES.values():
        expected = None if kept_unasked(role.name) else Spec(bits, 64)
        assert spec_of(policy, role.name, 3 if role.layered else None) == expected


def test_every_shipped_policy_covers_every_role():
    known = {"config-i", "config-i-hybrid", "config-i-premium", "jang-k"} | {
        f"uniform-{b}bit" for b in (2, 3, 4, 5, 6, 8)
    }
    assert known <= set(shipped())
    for name in shipped():
        policy = load(name)
        assert policy.description
        for role in ROLES.values():
            for layer in range(9) if role.layered else [None]:
                rule = policy.rule(role.name, "m", layer, 9)
                asked = role.name == "router" and policy.name.startswith("mq")  # hipfire's tiers quantize it
                assert (rule is None) == (kept_unasked(role.name) and not asked), (name, role.name)


@pytest.mark.parametrize(
    ("layers", "covered"),
    [
        ('["first 2", "last 2"]', {0, 1, 8, 9}),
        ('"first 1"', {0}),
        ("[3]", {3}),
        ("3", {3}),
        ('["2-4", 7]', {2, 3, 4, 7}),
        ('["last 20"]', set(range(10))),
        ('"0..1"', {0, 1}),
        ('"..1"', {0, 1}),
        ('"-2.."', {8, 9}),
        ('"-2..-1"', {8, 9}),
        ("-1", {9}),
        ('"2..-3"', set(range(2, 8))),
        ('"4.."', set(range(4, 10))),
        ('"8..-4"', set()),
        ('["0", "-3..-3"]', {0, 7}),
    ],
)
def test_layer_selectors(layers, covered):
    policy = parse(f"{RULE}layers = {layers}\n{KEEP_REST}", "p")
    assert {layer for layer in range(10) if spec_of(policy, "attn.q", layer, 10)} == covered


@pytest.mark.parametrize(
    ("ends", "middle"),
    [
        (['["first 2", "last 2"]'], range(2, 8)),
        (['"first 1"', '["0..2", "-1"]'], range(3, 9)),
        (['"-4.."', "[5]"], range(6)),
        (['["last 20", "2-3"]'], range(0)),
    ],
)
def test_the_middle_is_what_the_policys_ends_leave(ends, middle):
    rules = "".join(f'[[rule]]\nroles = ["attn.k"]\nbits = 8\nlayers = {layers}\n' for layers in ends)
    policy = parse(f'{RULE}layers = "middle"\n{rules}{KEEP_REST}', "p")
    assert [layer for layer in range(10) if spec_of(policy, "attn.q", layer, 10)] == list(middle)


def test_the_first_rule_that_covers_decides():
    policy = parse(RULE + '[[rule]]\nroles = ["attn.*"]\nbits = 2\ngroup_size = 32', "p")
    assert spec_of(policy, "attn.q") == Spec(4, 64)
    assert spec_of(policy, "attn.k") == Spec(2, 32)


def test_names_select_modules():
    text = '[[rule]]\nnames = ["*.layers.3.*", "*.q_proj"]\n{}bits = 8\n' + RULE + '[[rule]]\nroles = ["*"]\nbits = 2'
    policy = parse(text.format(""), "p")
    assert spec_of(policy, "attn.q", module="model.layers.3.self_attn.k_proj").bits == 8
    assert spec_of(policy, "attn.q", module="model.layers.4.self_attn.q_proj").bits == 8
    assert spec_of(policy, "attn.q", module="model.layers.4.self_attn.k_proj").bits == 4
    assert policy.rule("norm", "model.layers.3.input_layernorm", 3, 8) is None
    both = parse(text.format('roles = ["attn.k"]\nlayers = "first 4"\n'), "p")
    assert spec_of(both, "attn.k", 3, module="model.layers.3.x").bits == 8
    assert spec_of(both, "attn.k", 5, module="model.layers.5.q_proj").bits == 2
    assert spec_of(both, "attn.q", 3, module="model.layers.3.x").bits == 4


def test_group_size_and_the_like_have_a_default_of_the_file():
    text = 'group_size = 128\nfit = "best"\n' + RULE
    policy = parse(text + '[[rule]]\nroles = ["attn.k"]\nbits = 2\ngroup_size = 32\nfit = "fast"', "p")
    assert spec_of(policy, "attn.q") == Spec(4, 128)
    assert spec_of(policy, "attn.k") == Spec(2, 32)
    assert [rule.fit for rule in policy.rules] == ["best", "fast"]
    assert parse(RULE, "p").rules[0].fit == ""
    assert spec_of(parse('mode = "mxfp4"\n[[rule]]\nroles = ["attn.q"]', "p"), "attn.q") == Spec(4, 32, "mxfp4")


def test_the_first_group_size_that_divides_is_taken():
    policy = parse(RULE + "group_size = [128, 64, 32]", "p")
    found = {columns: spec_of(policy, "attn.q", columns=columns).group_size for columns in (3072, 192, 96)}
    assert found == {3072: 128, 192: 64, 96: 32}
    with pytest.raises(
        RotorError, match="group_size 128, 64, 32 does not divide its 80 input dimensions; would fit: none"
    ):
        spec_of(policy, "attn.q", columns=80)


@pytest.mark.parametrize(
    ("mode", "spec"),
    [("mxfp4", Spec(4, 32, "mxfp4")), ("mxfp8", Spec(8, 32, "mxfp8")), ("nvfp4", Spec(4, 16, "nvfp4"))],
)
def test_modes_of_mlx_have_their_bits_and_groups(mode, spec):
    for given in ("", f"bits = {spec.bits}\n", f"group_size = {spec.group_size}\n"):
        policy = parse(f'group_size = 128\n[[rule]]\nroles = ["attn.q"]\nmode = "{mode}"\n{given}', "p")
        assert spec_of(policy, "attn.q") == spec


def test_nothing_goes_below_a_floor():
    floors = '[floors]\n"attn.*" = 5\n"attn.k" = 3\nhead = 6\n'
    policy = parse(f'{floors}[[rule]]\nroles = ["*"]\nbits = 2\ngroup_size = 32', "p")
    assert policy.floors["attn.v"] == policy.floors["attn.k"] == 5, "the highest of those that speak of it"
    assert spec_of(policy, "attn.q") == Spec(5, 32) and spec_of(policy, "head", None) == Spec(6, 32)
    assert spec_of(policy, "mlp.up") == Spec(2, 32)
    fixed = parse('[floors]\n"attn.*" = 5\n[[rule]]\nroles = ["attn.q"]\nmode = "mxfp4"', "p")
    with pytest.raises(RotorError, match=r"mode mxfp4 has 4 bits, the policy's floor for attn\.q is 5"):
        spec_of(fixed, "attn.q")


def test_only_a_rule_of_its_own_quantizes_the_router():
    for roles in ('["*"]', '["rout*", "attn.q"]'):
        policy = parse(f"[[rule]]\nroles = {roles}\nbits = 2", "p")
        assert policy.rule("router", "model.layers.0.mlp.gate", 0, 8) is None
    asked = parse('[[rule]]\nroles = ["router"]\nbits = 8\n[[rule]]\nroles = ["*"]\nbits = 2', "p")
    assert spec_of(asked, "router") == Spec(8, 64)
    with pytest.raises(
        RotorError, match=r"role 'router' .* is quantized only by a rule of its own, roles = \[\"router\"\]"
    ):
        parse('[[rule]]\nroles = ["router", "attn.q"]\nbits = 8', "p")


def test_a_file_is_a_policy_named_after_itself(tmp_path):
    (tmp_path / "mine.toml").write_text(RULE)
    policy = load(tmp_path / "mine.toml")
    assert policy.name == "mine" and spec_of(policy, "attn.q") == Spec(4)


@pytest.mark.parametrize(("layers", "layer"), [('"2..30"', 30), ("[8]", 8), ('"2..-9"', -9), ('"9.."', 9)])
def test_a_layer_the_model_lacks_is_an_error(layers, layer):
    policy = parse(f"{KEEP_REST.replace('*', 'norm')}{RULE}layers = {layers}", "p")
    with pytest.raises(
        RotorError, match=f"policy p, rule 2: a rule selects layer {layer}, but the model has layers 0-7"
    ):
        policy.rule("attn.q", "m", 0, 8)


def test_ends_take_what_there_is():
    assert Layers(first=3).covers(0, 2) and Layers(last=3).covers(0, 2)


def test_an_unknown_policy_lists_the_shipped_ones():
    with pytest.raises(RotorError, match="unknown policy 'config-x'; shipped: config-i, config-i-hybrid"):
        load("config-x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "policy p: not TOML"),
        ("", r"policy p: needs at least one \[\[rule\]\]"),
        ("rules = 1\n" + RULE, "policy p: unknown key 'rules'; keys: awq, budget, description"),
        (RULE + "bit = 4", "policy p, rule 1: unknown key 'bit'; keys: bits"),
        (RULE + '[[rule]]\nroles = ["attn.z"]\nbits = 4', r"rule 2: unknown role 'attn\.z'; roles: embed, head"),
        ('[[rule]]\nroles = ["expert"]\nbits = 4', "unknown role 'expert'"),
        ("[[rule]]\nbits = 4", r'needs roles = \["...", ...\], or names'),
        ("[[rule]]\nroles = []\nbits = 4", r'roles must be a list, roles = \["...", ...\]'),
        ('[[rule]]\nroles = "attn.q"\nbits = 4', "roles must be a list"),
        (RULE + 'names = "x"', "names must be a list"),
        (RULE + "names = [1]", "names must be a list"),
        ('[[rule]]\nroles = ["attn.q"]', "needs either bits = N or keep = true"),
        (RULE + "keep = true", "needs either bits = N or keep = true"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = true\nmode = "mxfp4"', "needs either bits = N or keep = true"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = false', "needs either bits = N or keep = true"),
        (RULE + "keep = false", "needs either bits = N or keep = true"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = 1', "needs either bits = N or keep = true"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = true\ngroup_size = 64', "keep = true takes no group_size"),
        ('[[rule]]\nroles = ["attn.q"]\nkeep = true\nfit = "best"', "keep = true takes no fit"),
        ('[[rule]]\nroles = ["attn.q"]\nbits = 7', "bits = 7 is not supported; bits can be 2, 3, 4, 5, 6, 8"),
        ('[[rule]]\nroles = ["attn.q"]\nbits = true', "bits = True is not supported"),
        ('[[rule]]\nroles = ["attn.q"]\nbits = [4]', r"bits = \[4\] is not supported"),
        (RULE + "group_size = 48", "group_size = 48 is not supported; group_size can be 32, 64, 128"),
        (RULE + "group_size = [64, 48]", "group_size = 48 is not supported"),
        (RULE + "group_size = []", "group_size: an empty list fits nothing"),
        (RULE + 'mode = "mxfp8"', "bits = 4 is not supported; bits can be 8"),
        (RULE + 'mode = "nvfp4"\ngroup_size = 64', "group_size = 64 is not supported; group_size can be 16"),
        (RULE + 'mode = "q4"', "mode = 'q4' is not supported; mode can be affine, mxfp4, mxfp8, nvfp4"),
        (RULE + 'fit = "slow"', "fit = 'slow' is not supported; fit can be fast, search, best"),
        ('[[rule]]\nroles = ["norm"]\nbits = 8', r"role 'norm' .* is never quantized: use keep = true"),
        ('[[rule]]\nroles = ["bias"]\nbits = 8', "never quantized"),
        ('[[rule]]\nroles = ["embed"]\nbits = 8\nlayers = ["first 2"]', "role 'embed' has no layers"),
        (RULE + 'layers = ["middle 2"]', "'middle 2' is none of 'first N', 'last N', 'A..B'"),
        (RULE + 'layers = "middle"', "policy p: a rule selects the middle layers, but none the first or the last"),
        (RULE + "layers = [true]", "True is none of"),
        (RULE + "layers = 1.0", "1.0 is none of"),
        (RULE + 'layers = ".."', "'..' is none of"),
        (RULE + 'layers = "first 0"', "'first 0' is none of"),
        (RULE + 'layers = ["5-3"]', "'5-3' runs backwards"),
        (RULE + 'layers = ["-1..-3"]', "'-1..-3' runs backwards"),
        (RULE + "layers = []", "an empty list selects nothing"),
        ('[floors]\n"attn" = 4\n' + RULE, "policy p: floors, 'attn': unknown role 'attn'"),
        ('[floors]\n"attn.*" = 7\n' + RULE, r"policy p: floors, 'attn\.\*': bits = 7 is not supported"),
        ("floors = 4\n" + RULE, "policy p: floors must be a table"),
    ],
)
def test_what_is_not_understood_is_an_error(text, message):
    with pytest.raises(RotorError, match=message):
        parse(text, "p")


def test_patterns_expand_to_known_roles():
    assert expand("expert.*") == ("expert.gate", "expert.up", "expert.down")
    assert expand("router") == ("router",)


def test_policies_and_jobs_know_the_same_fits():
    assert FITS == fit.FITS
