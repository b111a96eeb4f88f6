"""Whole models with fused experts over the real kernels, in the simulator or on a Mac's GPU."""

import copy

import mlx.core as mx
import pytest

import zoo
from expert_models import apart, logits, pack, pack_in
from grids import thinned
from kernel_cases import SUPPORTED, needs_kernels, running
from mlx_rotor.host.experts import AUTO, attach_experts, detach_experts

CHUNKS = (9, 3, 1)
OURS = ("iq4_nl", 4, 16), ("lloyd", 2, 64), ("q8", 8, 32)
# phimoe keeps its own router; its code's weighted sum is fused all the same.
MODELS = {
    "minimax": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v3": {"n_group": 2, "topk_group": 1, "n_routed_experts": 8},
    "gpt_oss": {},
    "phimoe": {},
}


@pytest.fixture(autouse=True)
def not_compiled():
    mx.disable_compile()
    yield
    mx.enable_compile()


def small(name):
    return zoo.build(name, num_hidden_layers=2, first_k_dense_replace=1, **MODELS[name])


def fused(model, monkeypatch, chunks=CHUNKS):
    """Its logits with whatever `auto` fuses where kernels run, the report, and names of the kernels that ran."""
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    with running() as simulator:
        report = attach_experts(model, AUTO)
        before = len(simulator.reports)
        got = logits(model, chunks)
    assert simulator.objections == []
    detach_experts(model)
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    return got, report, [name.split("_", 2)[2].rpartition("_")[0] for name, _ in simulator.reports[before:]]


@needs_kernels
@pytest.mark.parametrize("name", thinned(list(MODELS), ["minimax"]))
def test_logits_are_stocks(name, monkeypatch):
    model = pack(small(name))
    got, report, launches = fused(model, monkeypatch)
    assert apart(got, logits(model, CHUNKS)) < 1e-5
    every = len(report.layers)
    assert len(report.fused) == every and {layer.launches for layer in report.layers} == {2 if name == "phimoe" else 3}
    assert {(e.counts.fused, e.counts.summed, e.counts.stock) for e in report.layers} == {(2, 2, 1)}
    if SUPPORTED:
        # The simulator runs what is only built too: experts one after the other, behind a model's own sum.
        step = ["gate_up", "down", "down"] if name == "phimoe" else ["route", "gate_up", "down"]
        assert launches == step * every * 2


@needs_kernels
def test_our_formats(monkeypatch):
    """Beyond the kernels' rows, in tiles."""
    model = pack_in(zoo.build("minimax", num_hidden_layers=1, intermediate_size=64), *OURS)
    want = logits(model, CHUNKS)
    got, report, launches = fused(model, monkeypatch)
    assert apart(got, want) < 1e-5
    counts = report.layers[0].counts
    assert (counts.fused, counts.tiled, counts.stock) == (2, 1, 0)
    if SUPPORTED:
        assert launches == ["gather_tiled"] * 3 + ["route", "gate_up", "down"] * 2
    assert report.describe() == "1 layer fused (4-bit iq4_nl/2-bit lloyd/8-bit q8, 3 launches a layer)"


@needs_kernels
def test_bfloat16_is_within_the_error_of_stocks(monkeypatch):
    """Of the third of the tokens that are nearest."""
    model = pack(zoo.build("minimax", num_hidden_layers=1, **MODELS["minimax"]))
    model.set_dtype(mx.bfloat16)
    exact = copy.deepcopy(model)
    exact.set_dtype(mx.float32)
    chunks = (8, 1)
    want = logits(exact, chunks)

    def off(got):
        assert got.dtype == mx.bfloat16
        each = mx.sort(mx.mean((got.astype(mx.float32) - want) ** 2, axis=-1).flatten())
        return mx.mean(each[: len(each) // 3]).item() ** 0.5

    got, report, _ = fused(model, monkeypatch, chunks)
    assert 0 < off(got) < off(logits(model, chunks))
    assert all(e.counts.stock == 0 for e in report.layers)
