"""Every architecture of mlx_lm with packed experts: fused, its logits are those of mlx_lm's own way."""

import mlx.core as mx
import pytest

import zoo
from expert_models import apart, expert_layers, logits, pack
from mlx_rotor.host.experts import AUTO, attach_experts, detach_experts
from mlx_rotor.models import routers

RUNNABLE = [name for name in zoo.architectures() if name not in zoo.EXCLUDED]
# Where what follows the experts is not the weighted sum of most models: a clamp or norm of its own, or mx.sum.
OWN_SUM = {"longcat_flash", "longcat_flash_ngram", "muse_spark"}
OWN_ROUTER = {
    "bailing_hybrid", "bailing_moe_v3", "deepseek_v2", "gemma4_text", "kimi_linear", "laguna", "lfm2_moe", "llama4",
    "longcat_flash", "longcat_flash_ngram", "muse_spark", "phimoe",
}  # fmt: skip
LEFT = {"kimi_k3": "SiTU", "deepseek_v41": "DeepseekV41SwiGLU"}
# Always: every router that is known, and every way to be something else. The others at night.
ALWAYS = {name.partition(".")[0] for name in routers()} | OWN_SUM | LEFT.keys() | {"gemma4_text", "llama4", "lfm2_moe"}
ARCHITECTURES = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.nightly) for name in RUNNABLE]
CHANGES = {"gemma4_text": {"enable_moe_block": True, "top_k_experts": 2}}


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    mx.disable_compile()  # which would take a second for each function
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_stocks(name):
    model = zoo.build(name, **CHANGES.get(name, {}))
    if not expert_layers(model):
        assert name not in OWN_SUM | OWN_ROUTER | LEFT.keys()
        return
    pack(model)
    want = logits(model)
    if name in LEFT:
        with pytest.raises(Exception, match=LEFT[name]):
            attach_experts(model, "fused")
        assert all(type(layer).__name__ == "SwitchGLU" for _, layer in expert_layers(model))
        assert LEFT[name] in attach_experts(model, AUTO).describe()
        assert mx.array_equal(logits(model), want)
        return
    report = attach_experts(model, "fused")
    got = logits(model)
    assert apart(got, want) < 1e-5
    assert [layer.path for layer in report.layers] == [path for path, _ in expert_layers(model)]
    assert {bool(layer.own_router) for layer in report.layers} == {name in OWN_ROUTER}
    assert {layer.summed for layer in report.layers} == {name not in OWN_SUM}
    for layer in report.layers:
        counts = layer.counts
        assert (counts.fused, counts.stock) == (5, 1)  # one chunk has more tokens than the kernels take
        assert counts.routed == (0 if name in OWN_ROUTER else 5)
        assert counts.summed == (0 if name in OWN_SUM or name == "llama4" else 5)
    detach_experts(model)
    assert mx.array_equal(logits(model), want)
