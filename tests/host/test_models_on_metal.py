"""Whole models of mlx_lm over the real kernels, in the simulator or on a Mac's GPU: the logits are the references'."""

import mlx.core as mx
import pytest

from grids import thinned
from kernel_cases import distance, needs_kernels, running
from mlx_rotor import attach, detach, make_prompt_cache
from mlx_rotor.host import layers
from tiny_models import tiny

PROMPT = [(7 * i * i + 3) % 250 for i in range(80)]


def logits(model, backend, monkeypatch):
    """Of two prompt chunks and three single tokens, with a ring short enough that most tokens are packed."""
    monkeypatch.setenv("MLX_ROTOR_BACKEND", backend)
    attach(model, "trellis4v3", sinks=2, ring=16, protect_layers=0, check=False)
    cache = model.make_cache()
    steps = [PROMPT[:50], PROMPT[50:77], *([t] for t in PROMPT[77:])]
    out = [model(mx.array([step]), cache=cache)[:, -1] for step in steps]
    mx.eval(out)
    detach(model)
    return out


@needs_kernels
@pytest.mark.parametrize("architecture", thinned(["llama", "minimax", "gpt_oss"], ["minimax"]))
def test_logits_are_the_references(monkeypatch, architecture):
    """gpt_oss with its windows compressed, which are of 40 tokens here."""
    monkeypatch.setattr(layers, "SHORTEST_WINDOW", 40)
    model = tiny(architecture, **({"sliding_window": 40} if architecture == "gpt_oss" else {}))
    if architecture == "gpt_oss":
        assert [c.window for c in make_prompt_cache(model)] == [40, None, None]
    want = logits(model, "reference", monkeypatch)
    with running() as simulator:
        got = logits(model, "metal", monkeypatch)
    assert simulator.objections == []
    names = [name.split("_")[2] for name, _ in simulator.reports]
    assert {"encode", "rotate", "prefill", "decode", "merge"} <= set(names) or not names
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < 2e-5
