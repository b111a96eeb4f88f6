"""Attaching fused experts: parity of whole models, what is left to mlx_lm and how that is said, and taking them off."""

import copy
import importlib
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import stream_generate
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

import mlx_rotor
import zoo
from expert_models import apart, expert_layers, logits, pack, pack_in
from grids import thinned
from mlx_rotor.cli import command
from mlx_rotor.errors import RotorError
from mlx_rotor.host import expert_layers as fused_layers
from mlx_rotor.host import experts
from mlx_rotor.host.expert_layers import kernel_name
from mlx_rotor.host.experts import attach_experts, detach_experts
from mlx_rotor.host.versions import digest
from mlx_rotor.models import routers
from tiny_models import tiny

quantize = importlib.import_module("mlx_rotor.quantize")  # the command; the package has a function of that name

GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "routed_scaling_factor": 1.7}
MODELS = {
    "minimax": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "mixtral": {},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4},
    "glm4_moe": GROUPS,
    "deepseek_v3": GROUPS,
    "gpt_oss": {"num_local_experts": 8},
    "olmoe": {"norm_topk_prob": False},
}
SIZES = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 96}
LLOYD, IQ4, Q8 = ("lloyd", 3, 64), ("iq4_nl", 4, 16), ("q8", 8, 32)


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def model():
    return pack(zoo.build("minimax"))


def stock_in(monkeypatch):
    """Experts in mlx_lm's own way are NaN for as many tokens as kernels take: nobody may read them."""
    real = SwitchGLU.__call__

    def call(self, x, indices):
        out = real(self, x, indices)
        return out if indices.size // indices.shape[-1] > 8 else mx.full(out.shape, mx.nan, out.dtype)

    monkeypatch.setattr(SwitchGLU, "__call__", call)


@pytest.mark.parametrize("rows", thinned([1, 3], [3]))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_stocks(name, rows, monkeypatch):
    model = pack(zoo.build(name, **SIZES, **MODELS[name]))
    chunks = (2, 9, 1, 1) if rows == 3 else (7, 12, 1, 1)
    want = logits(model, chunks, rows)
    report = attach_experts(model, "fused")
    stock_in(monkeypatch)
    assert apart(logits(model, chunks, rows), want) < 1e-5
    assert all((c.fused, c.summed, c.routed, c.stock) == (3, 3, 3, 1) for c in (e.counts for e in report.layers))
    every = len(report.layers)
    assert report.describe() == f"{every} layers fused (2-bit/4-bit/3-bit affine, reference kernels)"


@pytest.mark.parametrize("name", ["minimax", "gpt_oss", "deepseek_v3"])
def test_our_formats(name, monkeypatch):
    model = pack_in(zoo.build(name, **SIZES | {"moe_intermediate_size": 64, "intermediate_size": 64}), LLOYD, IQ4, Q8)
    want = logits(model)
    report = attach_experts(model, "fused")
    stock_in(monkeypatch)
    assert apart(logits(model), want) < 1e-5
    assert "3-bit lloyd/4-bit iq4_nl/8-bit q8" in report.describe()


@pytest.mark.parametrize("policy", ["config-i", pytest.param("mq3-lloyd", marks=pytest.mark.nightly)])
def test_the_logits_of_the_bundled_model_quantized(policy, tmp_path, monkeypatch):
    out = tmp_path / policy
    assert command.run(quantize.main, ["--policy", policy, "--fit", "fast", "--out", str(out)]) == 0
    model, _ = mlx_rotor.load(out)
    want = logits(model)
    report = attach_experts(model, "fused")
    stock_in(monkeypatch)
    assert apart(logits(model), want) < 1e-5
    assert [(e.counts.fused, e.counts.stock) for e in report.layers] == [(5, 1)] * 8


def test_the_bundled_model():
    """With KV compressed at the same time, through mlx_lm's generation."""
    model, tokenizer = mlx_rotor.load()
    pack(model, (2, 2, 3), 64)
    mlx_rotor.attach(model, "turbo4")
    try:
        texts = []
        for mode in ("stock", "fused"):
            report = attach_experts(model, mode)
            out = list(stream_generate(model, tokenizer, tokenizer.encode("The sea"), max_tokens=6))
            texts.append("".join(r.text for r in out))
        assert texts[0] == texts[1] and len(texts[0]) > 5
        assert all(e.counts.fused >= 6 and e.counts.stock == 0 for e in report.layers) and len(report.layers) == 8
    finally:
        detach_experts(model)
        mlx_rotor.detach(model)


def test_speculative_decoding(bundled):
    """A draft model that is fused too; its guesses are checked several at a time."""
    _, tokenizer = bundled
    model = pack(mlx_rotor.load()[0], (4, 4, 4), 64)
    draft = pack(mlx_rotor.load()[0], (3, 3, 3), 64)
    reports = {}

    def text(mode):
        reports[mode] = [attach_experts(m, mode) for m in (model, draft)]
        how = {"draft_model": draft, "num_draft_tokens": 3, "max_tokens": 8}
        return "".join(r.text for r in stream_generate(model, tokenizer, tokenizer.encode("The sea"), **how))

    assert text("fused") == text("stock")
    for report in reports["fused"]:
        assert all(e.counts.fused > 0 and e.counts.summed == e.counts.routed == e.counts.fused for e in report.layers)


def test_parameters_and_classes_stay(model):
    before = tree_flatten(model.parameters())
    kinds = [type(m) for _, m in model.named_modules()]
    attach_experts(model, "fused")
    attach_experts(model, "fused")
    after = tree_flatten(model.parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    fused = [m for _, m in model.named_modules()]
    assert all(isinstance(m, kind) for m, kind in zip(fused, kinds, strict=True))
    assert [type(m) for m in fused] != kinds
    detach_experts(model)
    assert [type(m) for _, m in model.named_modules()] == kinds
    assert not any(name.startswith("_rotor") for _, m in model.named_modules() for name in vars(m))


def test_copies_are_fused_on_their_own(model):
    want = logits(model)
    report = attach_experts(model, "fused")
    other = copy.deepcopy(model)
    detach_experts(model)
    assert apart(logits(other), want) < 1e-5
    assert all(layer.counts.fused == 0 for layer in report.layers)
    assert all(fused_layers.state_of(layer).counts.fused == 5 for _, layer in expert_layers(other))


def test_weights_that_change_are_read_anew(model):
    attach_experts(model, "fused")
    logits(model)
    for _, layer in expert_layers(model):
        layer.up_proj.scales, layer.down_proj.biases = layer.up_proj.scales * 2, layer.down_proj.biases * 3
    got = logits(model)
    detach_experts(model)
    assert apart(got, logits(model)) < 1e-5


def test_a_projection_that_is_replaced_goes_mlx_lms_way(model):
    """As LoRA does, after experts were attached."""
    report = attach_experts(model, "fused")
    changed = expert_layers(model)[1][1]
    changed.up_proj = nn.Module()
    changed.up_proj.__class__ = type("Doubled", (nn.Module,), {"__call__": lambda _, x, i, sorted_indices=False: x})
    changed.gate_proj = changed.up_proj
    changed.down_proj = changed.up_proj
    logits(model)
    assert [e.counts.fused > 0 for e in report.layers] == [True, False, True]
    assert report.calls()[1] == "Warning: experts of layers 1 were to be fused and never were"
    assert report.to_dict()["never_fused"] == [1]


# ------------------------------------------------------------ what is left, and how it is said


def test_without_kernels_auto_is_stock(model):
    kinds = [type(m) for _, m in model.named_modules()]
    report = attach_experts(model)
    assert [type(m) for _, m in model.named_modules()] == kinds
    why = "no kernels run here: MLX_ROTOR_BACKEND=reference"
    if mx.metal.is_available():
        why = "no kernels run here: MLX's default device is the CPU"
    elif "no Metal" in report.describe():
        why = "no kernels run here: this machine has no Metal"
    assert report.describe() == f"3 layers left to mlx_lm ({why})"


def test_stock(model):
    assert attach_experts(model, "stock").describe() == "3 layers left to mlx_lm (--experts stock)"
    assert not any(isinstance(m, fused_layers.FusedSwitchGLU) for _, m in model.named_modules())


def test_auto_obeys_what_was_measured(model, monkeypatch):
    monkeypatch.setattr(experts, "backend", lambda: "metal")
    known = {1: None, 2: None, 4: "slower", 8: "slower"}
    asked = set()

    def prefers(key, rows):
        asked.add(key)
        return known[next(n for n in known if n >= rows)]

    monkeypatch.setattr(experts.check_results, "prefers_stock", prefers)
    want = logits(model, (4, 2, 1))
    report = attach_experts(model)
    assert asked == {"affine2:32+affine4:32+affine3:32 64x32"}
    assert report.describe().endswith("; layers 0-2: stock for 3-8 tokens at once, faster here")
    assert apart(logits(model, (4, 2, 1)), want) < 1e-5
    assert {(e.counts.fused, e.counts.stock) for e in report.layers} == {(2, 1)}
    known |= {1: "fused took 2 ms and stock 1", 2: "slower"}
    assert attach_experts(model).describe() == "3 layers left to mlx_lm (fused took 2 ms and stock 1)"
    assert "3 layers fused" in attach_experts(model, "fused").describe()


def test_mixed_layers_are_told_apart():
    model = zoo.build("mixtral")
    first, second, third = (layer for _, layer in expert_layers(model))
    first.gate_proj = first.gate_proj.to_quantized(32, 4, mode="mxfp4")
    pack_one = {name: getattr(second, name).to_quantized(32, 8) for name in ("gate_proj", "up_proj", "down_proj")}
    for name, made in pack_one.items():
        setattr(second, name, made)
    with pytest.raises(RotorError, match="gate_proj is a QuantizedSwitchLinear of mode mxfp4"):
        attach_experts(model, "fused")
    assert [type(m) for _, m in expert_layers(model)] == [SwitchGLU] * 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "backend", lambda: "metal")
        report = attach_experts(model)
    assert report.describe() == (
        "1 layer fused (8-bit affine, 3 launches a layer); 1 layer left to mlx_lm (gate_proj is a "
        "QuantizedSwitchLinear of mode mxfp4); 1 layer left to mlx_lm (gate_proj is not quantized)"
    )
    said = report.to_dict()
    assert said["fused"] == [{"layers": [1], "formats": "8-bit affine", "launches": 3, "summed": True}]
    assert [group["layers"] for group in said["left"]] == [[0], [2]]
    assert type(second) is fused_layers.FusedSwitchGLU and type(third) is SwitchGLU


def test_models_without_experts():
    model = tiny("qwen3")
    assert attach_experts(model).describe() == "" and attach_experts(model).layers == ()
    with pytest.raises(RotorError, match="no expert layers"):
        attach_experts(model, "fused")
    with pytest.raises(RotorError, match="auto, fused, stock"):
        attach_experts(model, "always")
    assert experts.mode_of_draft("stock") == "stock" and experts.mode_of_draft("fused") == "auto"


def test_experts_that_are_no_gated_layers_are_named():
    model = zoo.build("phixtral")
    with pytest.raises(RotorError, match="SwitchMLP is no SwitchGLU"):
        attach_experts(model, "fused")


def test_a_layer_that_decoding_never_calls(model):
    model.unused = copy.deepcopy(expert_layers(model)[0][1])
    report = attach_experts(model, "fused")
    assert report.layers[-1].left == experts.UNUSED and type(model.unused) is SwitchGLU
    assert len(report.fused) == 3


def test_a_kernel_that_refuses(model, monkeypatch):
    """A shape that no kernel takes: left to mlx_lm with what the kernel says, an error where fused was asked for."""
    real = fused_layers.FusedExperts.weighted

    def weighted(self, x, indices, weights):
        if self.gate.parts[0] is expert_layers(model)[2][1].gate_proj.weight:
            raise RotorError("no kernel takes this")
        return real(self, x, indices, weights)

    monkeypatch.setattr(fused_layers.FusedExperts, "weighted", weighted)
    want = logits(model)
    with pytest.raises(RotorError, match="no kernel takes this"):
        attach_experts(model, "fused")
    monkeypatch.setattr(experts, "backend", lambda: "metal")
    report = attach_experts(model)
    assert (
        "2 layers fused" in report.describe() and "1 layer left to mlx_lm (no kernel takes this)" in report.describe()
    )
    assert apart(logits(model), want) < 1e-5


# ------------------------------------------------------------ recognising code


def test_activations_are_recognised_by_what_they_compute():
    from mlx_lm.models import activations, gemma4_text, kimi_k3, muse_spark, step3p5

    assert kernel_name(SwiGLU()) == kernel_name(muse_spark.PreciseSwiGLU()) == "swiglu"
    assert kernel_name(gemma4_text.GeGLU()) == "geglu"
    assert kernel_name(activations.SwigluOAI()) == "gpt_oss"
    others = [
        activations.SwigluOAI(limit=10.0),
        activations.SwigluOAI(alpha=1.0),
        step3p5.ClampedSwiGLU(1000.0),
        kimi_k3.SiTU(1.0, None),
        lambda up, gate: nn.gelu(gate) * up,
        lambda up, gate: nn.gelu_fast_approx(gate) * up,
        lambda up, gate: nn.silu(up) * gate,
        lambda up, gate: nn.relu(gate) * up,
        lambda up, gate: up,
        lambda up: up,
    ]
    assert [kernel_name(other) for other in others] == [None] * len(others)


def test_every_known_block_is_the_installed_one():
    """A contract with the installed mlx_lm: a block of other code is left with its own router."""
    import importlib

    assert len(routers()) == 28
    for name, block in routers().items():
        module, _, kind = name.partition(".")
        found = getattr(importlib.import_module(f"mlx_lm.models.{module}"), kind)
        assert digest(found, block.uses) == block.digest, name


def test_other_code_keeps_its_router(model, monkeypatch):
    name = "minimax.MiniMaxSparseMoeBlock"
    monkeypatch.setitem(routers(), name, replace(routers()[name], digest="0" * 12))
    want = logits(model)
    report = attach_experts(model, "fused")
    assert report.describe() == (
        "3 layers fused (2-bit/4-bit/3-bit affine, reference kernels); layers 0-2: mlx_lm's router "
        "(MiniMaxSparseMoeBlock is other code in this mlx_lm)"
    )
    assert apart(logits(model), want) < 1e-5
    assert {(e.counts.summed, e.counts.routed) for e in report.layers} == {(5, 0)}


def test_a_digest_sees_code_and_no_white_space(tmp_path, monkeypatch):
    block, helper = "class A:\n    def __call__(self, x):\n        return helper(x)\n", "def helper(x):\n    return x\n"
    texts = {
        "one": block + helper,
        "spaced": (block + helper).replace("\n", "\n\n").replace("return ", "return  "),
        "block": block.replace("(x)", "(-x)") + helper,
        "helper": block + helper.replace("return x", "return -x"),
        "none": block,
    }
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for name, text in texts.items():
        (tmp_path / f"digested_{name}.py").write_text(text)
        found[name] = digest(__import__(f"digested_{name}").A, ("helper",))
    assert found["one"] == found["spaced"] != ""
    assert len({found["one"], found["block"], found["helper"]}) == 3 and found["none"] == ""


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_within_the_error_of_stocks(name):
    """Of the quarter of the tokens that are nearest: those whose experts a rounding changes are far off either way."""
    model = pack(zoo.build(name, **SIZES, **MODELS[name]), (4, 4, 4))
    model.set_dtype(mx.bfloat16)
    exact = copy.deepcopy(model)
    exact.set_dtype(mx.float32)
    chunks = (8, 8, 8, 1)
    want = logits(exact, chunks)

    def off(got):
        assert got.dtype == mx.bfloat16
        each = mx.sort(mx.mean((got.astype(mx.float32) - want) ** 2, axis=-1).flatten())
        return mx.mean(each[: len(each) // 4]).item() ** 0.5

    stocks = off(logits(model, chunks))
    report = attach_experts(model, "fused")
    assert 0 < off(logits(model, chunks)) < stocks
    assert all(e.counts.stock == 0 for e in report.layers)


@pytest.mark.parametrize("name", ["minimax", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_sharded_models(name):
    """Sharded over one machine, before and after: the sum over machines is the block's, behind the fused one."""
    model = pack(zoo.build(name))
    want = logits(model)
    model.shard(mx.distributed.init())
    attach_experts(model, "fused")
    assert apart(logits(model), want) < 1e-5
    again = pack(zoo.build(name))
    report = attach_experts(again, "fused")
    again.shard(mx.distributed.init())
    assert apart(logits(again), want) < 1e-5
    assert all(e.counts.fused == 5 for e in report.layers)
