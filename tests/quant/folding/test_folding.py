"""Factors leave what a model computes unchanged, and nothing else does; what is folded is worth it."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import mlx.utils
import numpy as np
import pytest
from given import Given

from mlx_rotor import bundled as demo
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.quant import policy as policies
from mlx_rotor.quant.folding import scales
from mlx_rotor.quant.folding.proof import check, prove
from mlx_rotor.quant.folding.scales import READINGS, FoldedWeights, Scales, down_foldings, joined, norm_foldings
from mlx_rotor.quant.folding.search import ScaleFolding, factors, output_error
from mlx_rotor.quant.guide import Unguided
from mlx_rotor.quant.plan import make_plan
from mlx_rotor.quant.source import Checkpoint

BUNDLED = json.loads((demo.MODEL / "config.json").read_text())
POLICY = policies.parse('[[rule]]\nroles = ["*"]\nbits = 2\ngroup_size = [128, 64, 32]\n', "two")
TOKENS = np.random.default_rng(3).integers(0, 200, (2, 12))
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
OTHERS = {
    "llama": SMALL | {"model_type": "llama", "intermediate_size": 96, "tie_word_embeddings": True},
    "qwen2_moe": SMALL
    | {
        "model_type": "qwen2_moe",
        "intermediate_size": 96,
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "mixtral": SMALL
    | {"model_type": "mixtral", "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
}


class Held:
    """The weights of a model that is in memory."""

    def __init__(self, model):
        self.values = dict(mlx.utils.tree_flatten(model.parameters()))

    def read(self, entry, part=0, start=0, stop=None):
        value = self.values[entry.name or f"{entry.module}.weight"].astype(mx.float32)
        return (value[part] if entry.stacked else value)[start:stop]


class Known:
    """Statistics with a few large inputs, alike for all parts."""

    def __init__(self, spread, peaks=None):
        self.spread, self.peaks = spread, peaks or {}

    def importance(self, entry, part=0):
        key = mx.random.key(entry.shape[-1])
        return mx.exp(self.spread * mx.random.normal((entry.shape[-1],), key=key))

    def hessian(self, entry, part=0):
        return None

    def peak(self, entry, part):
        return self.peaks.get(part, 1.0)


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(0)


@pytest.fixture(scope="module")
def bundled():
    return make_plan(BUNDLED, POLICY), Checkpoint.open(demo.MODEL, BUNDLED)


def layer(plan, number):
    return [entry for entry in plan.entries if entry.layer == number]


def random_folds(plan, model_type):
    """Every fold there is, by random factors: powers of two for normalizations, others for experts."""
    found = []
    for number in range(plan.layers):
        for fold in norm_foldings(layer(plan, number)):
            found.append(fold.scales(factors(mx.exp(3 * mx.random.normal(fold.norm.shape)), 1.0, whole=True)))
        for fold in down_foldings(layer(plan, number), model_type):
            each = {p: mx.exp(mx.random.normal((fold.down.shape[-1],))) for p in range(fold.down.parts)}
            found.append(fold.scales(each))
    return joined(*found)


def stock_logits(config, plan, weights):
    """Of the whole model, as mlx_lm runs it, with weights read entry by entry."""
    model = skeleton(config)
    values = {}
    for entry in plan.entries:
        parts = [weights.read(entry, part) for part in range(entry.parts)]
        values[entry.name or f"{entry.module}.weight"] = mx.stack(parts).reshape(entry.shape)
    model.load_weights(list(values.items()))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def test_the_whole_model_is_unchanged_by_every_fold(bundled):
    plan, checkpoint = bundled
    found = random_folds(plan, "minimax_m2")
    before, after = (stock_logits(BUNDLED, plan, w) for w in (checkpoint, FoldedWeights(checkpoint, found)))
    assert len({module for module, _ in found}) == 8 * 9
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert not np.array_equal(np.array(FoldedWeights(checkpoint, found).read(layer(plan, 0)[0])), 0)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    plan = make_plan(OTHERS[name], POLICY)
    model = skeleton(OTHERS[name])
    weights = Held(model)
    roles = {e.role for fold in norm_foldings(layer(plan, 0)) for e in fold.readers}
    assert roles == {e.role for e in layer(plan, 0)} - {
        "norm",
        "bias",
        "attn.o",
        "mlp.down",
        "expert.down",
        "shared.down",
    }
    found = random_folds(plan, name)
    before, after = (stock_logits(OTHERS[name], plan, w) for w in (weights, FoldedWeights(weights, found)))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert check(OTHERS[name], plan, weights, found, TOKENS, layers=[0, 1]) <= 1e-5


READERS = ["router", "expert.gate", "expert.up", "attn.q", "attn.k", "attn.v"]


@pytest.mark.parametrize("left_out", READERS)
def test_the_check_finds_a_reader_that_was_left_out(bundled, left_out):
    plan, checkpoint = bundled
    found = joined(
        *(
            fold.scales(factors(mx.exp(mx.random.normal((256,))), 1.0, whole=True))
            for fold in norm_foldings(layer(plan, 0))
        )
    )
    assert check(BUNDLED, plan, checkpoint, found, TOKENS, layers=[0]) <= 1e-5
    roles = {entry.module: entry.role for entry in plan.entries}
    short = {key: scales for key, scales in found.items() if roles[key[0]] != left_out}
    assert len(short) < len(found)
    with pytest.raises(RotorError, match="folding changes the model"):
        check(BUNDLED, plan, checkpoint, short, TOKENS, layers=[0])


def test_the_check_finds_an_expert_that_was_half_folded(bundled):
    plan, checkpoint = bundled
    (fold,) = down_foldings(layer(plan, 0), "minimax_m2")
    # Which experts a text takes is the model's to say: all of them lack half of the fold.
    each = {part: mx.full((64,), 1.5) for part in range(fold.down.parts)}
    assert check(BUNDLED, plan, checkpoint, fold.scales(each), TOKENS, layers=[0]) <= 1e-5
    half = {key: scales for key, scales in fold.scales(each).items() if key[0] == fold.down.module}
    with pytest.raises(RotorError, match="differ by"):
        check(BUNDLED, plan, checkpoint, half, TOKENS, layers=[0])


def test_a_slice_of_rows_gets_its_own_factors(bundled):
    plan, checkpoint = bundled
    up = next(e for e in plan.entries if e.role == "expert.up")
    rows, columns = mx.arange(1, 65).astype(mx.float32), mx.arange(1, 257).astype(mx.float32)
    folded = FoldedWeights(checkpoint, {(up.module, 3): Scales(rows, columns)})
    whole = np.array(checkpoint.read(up, 3)) * np.arange(1, 65)[:, None] * np.arange(1, 257)
    np.testing.assert_allclose(np.array(folded.read(up, 3, 8, 24)), whole[8:24], rtol=1e-6)
    assert mx.array_equal(folded.read(up, 2), checkpoint.read(up, 2))


def test_factors():
    square = mx.array([1e-3, 1.0, 1.0, 1e3])
    s = factors(square, 1.0, whole=False)
    np.testing.assert_allclose(np.array(s), np.array(square) ** 0.5, rtol=1e-5)
    assert np.array(factors(square, 0.0, whole=False)).tolist() == [1, 1, 1, 1]
    whole = np.array(factors(mx.exp(2 * mx.random.normal((512,))), 1.0, whole=True))
    assert set(np.log2(whole)) <= set(range(-6, 7)) and len(set(whole)) > 2
    for w in (mx.random.normal((8, 512)).astype(mx.bfloat16),):
        scaled = w.astype(mx.float32) * mx.array(whole)
        assert mx.array_equal(scaled.astype(mx.bfloat16).astype(mx.float32), scaled)  # nothing is rounded in storage
    assert np.isfinite(np.array(factors(mx.array([0.0, 1.0]), 1.0, whole=False))).all()


@pytest.mark.parametrize("method", ["fast", "search"])
def test_what_is_chosen_lowers_the_error_and_is_exact(bundled, method, tmp_path):
    plan, checkpoint = bundled
    statistics = Known(2.0)
    guide = ScaleFolding(Given(checkpoint, statistics), plan, "minimax_m2", method, tmp_path)
    weights, seen = guide.layer(0, layer(plan, 0))
    chosen = {c.what.rpartition(".")[2]: c for c in guide.found[0].chosen}
    assert all(0 < c.alpha <= 1 and c.ratio < 0.99 for c in chosen.values())
    assert check(BUNDLED, plan, checkpoint, guide.found[0].scales, TOKENS, layers=[0]) <= 1e-5
    assert prove(guide, BUNDLED, plan, checkpoint, TOKENS) == (0,)
    if method == "fast":  # mx.quantize knows nothing of the inputs: here folding pays most
        assert chosen.keys() == {"input_layernorm", "post_attention_layernorm", "down_proj"}
    entry = next(e for e in layer(plan, 0) if e.role == "expert.up")
    if "post_attention_layernorm" in chosen:
        ones = mx.ones((256,))
        square, inputs = statistics.importance(entry), seen.importance(entry)
        before = output_error(checkpoint.read(entry, 1), entry, method, square, ones)
        after = output_error(weights.read(entry, 1), entry, method, inputs, ones)
        assert after < before
    told = guide.describe()["folds"]
    assert {row["fold"].rpartition(".")[2] for row in told if row["layer"] == 0} == chosen.keys()
    later = ScaleFolding(Given(checkpoint, statistics), plan, "minimax_m2", method, tmp_path)
    assert later.describe()["folds"] == told  # a job that goes on tells what the first run did, too
    other = ScaleFolding(Given(checkpoint, statistics), plan, "minimax_m2", method, tmp_path, norms=False)
    assert other.describe()["folds"] == []


def test_a_fold_that_is_not_exact_is_refused_before_the_job(bundled, monkeypatch, tmp_path):
    plan, checkpoint = bundled
    short = tuple(replace(r, readers=tuple(x for x in r.readers if x != "router")) for r in READINGS)
    monkeypatch.setattr(scales, "READINGS", short)
    guide = ScaleFolding(Given(checkpoint, Known(2.0)), plan, "minimax_m2", "fast", tmp_path)
    with pytest.raises(RotorError, match="Some reader of the folded inputs is not known"):
        prove(guide, BUNDLED, plan, checkpoint, TOKENS)


def test_inputs_that_are_alike_are_left_alone(bundled, tmp_path):
    plan, checkpoint = bundled
    guide = ScaleFolding(Given(checkpoint, Known(0.0)), plan, "minimax_m2", "search", tmp_path)
    weights, _ = guide.layer(1, layer(plan, 1))
    assert guide.found[1].chosen == () and guide.describe()["folds"] == []
    entry = layer(plan, 1)[0]
    assert mx.array_equal(weights.read(entry), checkpoint.read(entry))


def test_what_lies_outside_the_layers_is_handed_on(bundled, tmp_path):
    plan, checkpoint = bundled
    guide = ScaleFolding(Given(checkpoint, Known(1.0)), plan, "minimax_m2", "search", tmp_path)
    assert guide.layer(None, []) == (checkpoint, guide._guide.statistics)
    blind = ScaleFolding(Unguided(checkpoint), plan, "minimax_m2", "search", tmp_path)
    assert blind.layer(0, layer(plan, 0)) == (checkpoint, None)
    digests = [
        ScaleFolding(Given(checkpoint, None), plan, "minimax_m2", m, tmp_path, downs=d).digest
        for m in ("fast", "search")
        for d in (True, False)
    ]
    assert len({*digests, guide.digest}) == 4


def test_clamped_experts_are_refused(bundled, tmp_path):
    plan, checkpoint = bundled
    with pytest.raises(RotorError, match=r"gpt_oss.*clamp"):
        ScaleFolding(Given(checkpoint, None), plan, "gpt_oss", "fast", tmp_path)
    assert ScaleFolding(Given(checkpoint, Known(0.0)), plan, "gpt_oss", "fast", tmp_path, downs=False).layer(0, [])


def test_what_is_not_quantized_or_read_elsewhere_is_not_folded(bundled):
    plan, _ = bundled
    entries = layer(plan, 0)
    assert len(norm_foldings(entries)) == 2
    router = next(e for e in entries if e.role == "router")
    indexed = [*entries, replace(router, role="attn.index", module="model.layers.0.self_attn.index")]
    assert [f.norm.module.rpartition(".")[2] for f in norm_foldings(indexed)] == ["post_attention_layernorm"]
    odd = [replace(e, shape=(16, 128)) if e is router else e for e in entries]
    with pytest.raises(RotorError, match="can't be folded"):
        norm_foldings(odd)


DENSE_FIRST = SMALL | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "rope_scaling": None,
}
# A normalization of the attention's output, or one that adds 1 to its weights, under the name that is folded.
UNFIT = {
    "gemma": SMALL | {"model_type": "gemma", "intermediate_size": 96, "head_dim": 32},
    "olmo2": SMALL | {"model_type": "olmo2", "intermediate_size": 96},
    "cohere": SMALL | {"model_type": "cohere", "intermediate_size": 96},
}


def test_each_kind_of_layer_is_proved_on(tmp_path):
    plan, weights = make_plan(DENSE_FIRST, POLICY), Held(skeleton(DENSE_FIRST))
    guide = ScaleFolding(Given(weights, Known(0.0)), plan, "deepseek_v3", "fast", tmp_path)
    assert prove(guide, DENSE_FIRST, plan, weights, TOKENS) == (0, 1)
    assert {module.split(".")[2] for module, _ in guide.trial(1)} == {"1"}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_never_worth_folding_in_the_first_layers_is_proved_all_the_same(name, tmp_path):
    plan, weights = make_plan(UNFIT[name], POLICY), Held(skeleton(UNFIT[name]))
    guide = ScaleFolding(Given(weights, Known(0.0)), plan, name, "search", tmp_path)
    with pytest.raises(RotorError, match="folding changes the model"):
        prove(guide, UNFIT[name], plan, weights, TOKENS)
