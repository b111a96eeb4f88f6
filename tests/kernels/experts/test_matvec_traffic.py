"""Traffic of a layer's experts at MiniMax-M2's dimensions against the bytes that must move, and operations a weight.

One threadgroup's rows are run, of every expert that it reads: all others move the same.
"""

import importlib

import mlx.core as mx
import pytest

from expert_cases import normal, weights
from grids import grid, thinned
from kernel_cases import needs_simulator
from metal_sim.bench.kernel_traffic import Tally, counted
from metal_sim.bench.throughput import DEVICES, predict
from mlx_rotor.kernels.experts.few_rows import down_metal, gate_up_metal, matvec

pytestmark = needs_simulator
HIDDEN, INTERMEDIATE, CHOSEN = 3072, 1536, 8
GATE_ROWS, DOWN_ROWS = 128, 64
# (gate and up, down): the policies' formats.
MIXES = {
    "config-i": (("affine", 2, 64), ("affine", 3, 64)),
    "mq4": (("affine", 4, 128), ("affine", 4, 128)),
    "mq3-lloyd": (("lloyd", 3, 256), ("lloyd", 3, 256)),
    "mq2-lloyd": (("lloyd", 2, 256), ("lloyd", 3, 256)),
    "iq4_nl": (("iq4_nl", 4, 16), ("iq4_nl", 4, 16)),
}


def dtype(name) -> mx.Dtype:
    return mx.bfloat16 if name[0] == "affine" else mx.float16


def gate_up(name, mode="count") -> tuple[Tally, int]:
    """One of the threadgroups of one expert; the packed bytes it must read."""
    gate, up = (weights(name, (1, GATE_ROWS), HIDDEN, dtype=dtype(name), seed=seed) for seed in (1, 2))
    with counted(mode) as tally:
        gate_up_metal(normal(1, HIDDEN, dtype=mx.bfloat16), gate, up, mx.zeros((1, 1), mx.uint32), "swiglu")
    return tally, gate.nbytes + up.nbytes


def down(name, mode="count", experts=CHOSEN) -> tuple[Tally, int]:
    w = weights(name, (experts, DOWN_ROWS), INTERMEDIATE, dtype=dtype(name))
    h, indices = normal(1, experts, INTERMEDIATE, dtype=mx.bfloat16), mx.arange(experts)[None].astype(mx.uint32)
    with counted(mode) as tally:
        down_metal(h, w, indices, mx.ones((1, experts)))
    return tally, w.nbytes


@pytest.mark.parametrize("name", thinned(list(MIXES), 2))
def test_experts_move_little_more_than_they_must(name):
    into, out = MIXES[name]
    (one, packed), (other, packed_out) = gate_up(into), down(out)
    groups, groups_out = CHOSEN * INTERMEDIATE // GATE_ROWS, HIDDEN // DOWN_ROWS
    activations = 2 * (HIDDEN + 2 * CHOSEN * INTERMEDIATE + HIDDEN)  # x, h written and read, the result
    needed = packed * groups + packed_out * groups_out + activations
    moved = one.moved * groups + other.moved * groups_out
    lines = one.lines * groups + other.lines * groups_out
    ideal = one.ideal_lines * groups + other.ideal_lines * groups_out
    assert needed < moved <= 1.05 * needed
    assert ideal >= 0.95 * lines
    assert one.launches == other.launches == 1


def test_x_read_by_more_threadgroups_is_seen(monkeypatch):
    monkeypatch.setattr(importlib.import_module(gate_up_metal.__module__), "GATE_UP_ROWS", 32)
    tally, packed = gate_up(("affine", 2, 64))
    assert tally.moved > 1.05 * packed


def slower(run, name) -> float:
    """Time of arithmetic over that of memory on an M4 Max, by the model of throughput.py."""
    arithmetic, packed = run(name, "arithmetic")
    found = predict(arithmetic.issued, packed, DEVICES["M4 Max"])
    return found.arithmetic / found.memory


@pytest.mark.parametrize(
    "name", thinned([("affine", 2, 64), ("affine", 4, 128), ("iq4_nl", 4, 16), ("lloyd", 2, 256)], 4), ids=str
)
def test_memory_is_slower_than_arithmetic_in_gate_up(name):
    assert slower(gate_up, name) < 0.95


@pytest.mark.parametrize("name", thinned([("affine", 3, 64), ("lloyd", 3, 256), ("lloyd", 2, 256)], 3), ids=str)
def test_memory_is_slower_than_arithmetic_in_down(name):
    assert slower(lambda name, mode: down(name, mode, 4), name) < 0.95


@grid(1, name=[("q8", 8, 32), ("affine", 8, 64)], columns=[HIDDEN, INTERMEDIATE])
def test_8_bits_are_read_by_whole_lines(name, columns):
    """Of attention and heads."""
    w = weights(name, (DOWN_ROWS,), columns, dtype=dtype(name))
    with counted("count") as tally:
        matvec(normal(1, columns, dtype=mx.bfloat16), w)
    assert tally.moved <= 1.05 * w.nbytes
    assert tally.line_use >= 0.95
