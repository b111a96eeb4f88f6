"""Kernels with one bug each, which the simulator must name, beside the same kernels without it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from . import Kernel, KernelError, Options
from .report import UNKNOWN_LINE

GROUPS, THREADS = 64, 256
SHARED = """
  threadgroup float sh[256];
  uint t = thread_position_in_threadgroup.x, g = threadgroup_position_in_grid.x;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
INDEX = "uint i = thread_position_in_grid.x;\n"
LANE = "uint t = thread_position_in_threadgroup.x; float v = 0;\n"
STORE = "if (thread_position_in_grid.x < 64) out[t] = v;\n"


@dataclass(frozen=True)
class Case:
    """A body, what must be said of it ("" if nothing), and what it needs."""

    name: str
    source: str
    said: str = ""
    header: str = ""
    init: float | None = None
    options: Options = field(default_factory=Options)


RACES = [
    Case(
        "missing barrier",
        f"{SHARED}sh[t] = inp[g * 256 + t];\nfor (uint s = 128; s > 0; s >>= 1) {{\n"
        f"if (t < s) sh[t] += sh[t + s];\n{BARRIER}}}\nif (t == 0) out[g] = sh[0];",
        "race on threadgroup",
    ),
    Case(
        "barrier with mem_none",
        SHARED + "sh[t] = inp[g * 256 + t]; threadgroup_barrier(mem_flags::mem_none); if (t == 0) out[g] = sh[1];",
        "race on threadgroup",
    ),
    Case(
        "simdgroup barrier where threads of two simdgroups meet",
        SHARED + "sh[t] = inp[g * 256 + t]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        "if (t == 0) out[g] = sh[100];",
        "race on threadgroup",
    ),
    Case(
        "simdgroup barrier within a simdgroup",
        SHARED + "sh[t] = inp[g * 256 + t]; simdgroup_barrier(mem_flags::mem_threadgroup);if (t == 0) out[g] = sh[10];",
    ),
    Case(
        "race between threadgroups",
        "out[thread_position_in_threadgroup.x % 64] = inp[thread_position_in_grid.x];",
        "race on device",
    ),
    Case("counter without an atomic", "out[0] += 1;", "race on device", init=0),
    Case(
        "float atomic add",
        "if (thread_position_in_grid.x < 64)"
        "atomic_fetch_add_explicit((device atomic<float>*)out, 1.0f, memory_order_relaxed);",
        init=0,
    ),
]
MEMORY = [
    Case("write one element past the end", INDEX + "if (i % 256 == 0) out[i / 256 + 1] = inp[i];", "bounds: store"),
    Case("read far before the start", INDEX + "if (i < 64) out[i] = inp[int(i) - 40000];", "out of bounds: load"),
    Case(
        "overrun of a threadgroup array into the next",
        "threadgroup float a[32]; threadgroup float b[32]; uint t = thread_position_in_threadgroup.x;\n"
        f"if (t < 32) {{ a[t] = 1; b[t] = 2; }}\n{BARRIER}uint n = t + inp_shape[0] - 32;\n"
        "if (t == 0) { threadgroup float* p = a; out[threadgroup_position_in_grid.x] = p[n]; }",
        "out of bounds: load",
    ),
    Case(
        "index past a local array",
        INDEX + "float q[4] = {1, 2, 3, 4}; if (i < 64) out[i] = q[i & 7];",
        "array index out of range",
    ),
    Case(
        "index past a local array through a pointer",
        INDEX + "float q[4] = {1, 2, 3, 4}; float z = f(q, i & 7); if (i < 64) out[i] = z;",
        "local array",
        header="__attribute__((noinline)) float f(thread float* p, uint i) { return p[i]; }\n",
    ),
    Case(
        "uninitialised threadgroup memory",
        f"{SHARED}if (t < 255) sh[t] = inp[g * 256 + t];\n{BARRIER}if (t == 0) out[g] = sh[255];",
        "uninitialised threadgroup",
    ),
    Case("output not written whole", INDEX + "if (i < 60) out[i] = inp[i];", "unwritten bytes of out: 16"),
    Case("reading an unwritten output", INDEX + "if (i < 64) out[i] += inp[i];", "unwritten output read"),
    Case(
        "vector load at element alignment",
        INDEX + "if (i < 64) out[i] = (*(const device float4*)(inp + i)).x;",
        "misaligned",
    ),
    Case(
        "packed vector load at element alignment",
        INDEX + "if (i < 64) out[i] = (*(const device packed_float4*)(inp + i)).x;",
    ),
    Case(
        "aligned vector load from a slice",
        INDEX + "if (i < 64) out[i] = ((const device float4*)inp)[i].x;",
        "misaligned",
        options=Options(offsets={"inp": 4}),
    ),
    Case(
        "more than 32 KiB of threadgroup memory",
        SHARED.replace("256", "8200") + "sh[t] = 1; if (t == 0) out[g] = sh[0];",
        "32 KiB",
    ),
    Case(
        "write to an input through a cast",
        INDEX + "if (i < 64) { out[i] = inp[i]; ((device float*)inp)[i] = 0; }",
        "write to a read-only buffer: store of 4 B at byte 0 of 'inp' (65536 B)",
    ),
    Case("pointer made of a number", "out[0] = *(const device float*)(ulong)64;", "wild pointer: load of 4 B"),
    Case(
        "stack overflow",
        INDEX + "float q[20000]; for (uint j = 0; j < 20000; ++j) q[j] = inp[j & 63]; out[i & 63] = q[i];",
        "stack overflow",
    ),
]
FLOW = [
    Case(
        "barrier in divergent flow",
        f"{SHARED}if (t < 128) {{ {BARRIER} }} else {{ {BARRIER} }}\nif (t == 0) out[g] = 1;",
        "divergent threadgroup barrier",
    ),
    Case(
        "barrier after an early return",
        f"{SHARED}if (t > 100) return;\n{BARRIER}if (t == 0) out[g] = 1;",
        "after some threads returned",
    ),
    Case(
        "simd_sum in half of the lanes",
        f"{LANE}if (t % 32 < 16) v = simd_sum(inp[t]);\n{STORE}",
        "lanes have returned",
    ),
    Case(
        "simd_sum in one branch, simd_max in the other",
        f"{LANE}if (t % 32 < 16) v = simd_sum(inp[t]); else v = simd_max(inp[t]);\n{STORE}",
        "under divergence",
    ),
    Case(
        "shuffle from an inactive lane",
        f"{LANE}if (t % 32 < 16) v = simd_shuffle(inp[t], ushort(20));\n{STORE}",
        "shuffle from an inactive lane",
    ),
    Case(
        "simd_sum after an early return",
        INDEX + "if (i % 32 >= 20) return; float v = simd_sum(inp[i]); if (i < 64) out[i] = v;",
        "have returned",
    ),
]
ARITHMETIC = [
    Case(
        "signed overflow",
        INDEX + "int a = 2147483647 - 10 + int(i); if (i < 64) out[i] = a;",
        "signed integer overflow (+) at source:2",
    ),
    Case(
        "float to integer out of range",
        INDEX + "if (i < 64) out[i] = float(uchar(inp[i] * 1e6f + 300.0f));",
        "float to integer",
    ),
    Case("division by zero", INDEX + "if (i < 64) out[i] = float(100 / int(i));", "division by zero"),
    # OpenCL masks the amount, as Apple's GPUs do: defined, so nothing is said.
    Case("shift by the width", INDEX + "if (i < 64) out[i] = float(1u << (i & 32));"),
]


def findings(case: Case) -> list[str]:
    x = mx.random.normal((GROUPS, THREADS), key=mx.random.key(0))
    kernel = Kernel("case", ["inp"], ["out"], case.source, case.header)
    result = kernel.run(
        [x],
        [(GROUPS,)],
        [mx.float32],
        (GROUPS * THREADS, 1, 1),
        (THREADS, 1, 1),
        init_value=case.init,
        options=case.options,
    )
    return result.report.findings()


@pytest.mark.parametrize("case", [*RACES, *MEMORY, *FLOW, *ARITHMETIC], ids=lambda case: case.name.replace(" ", "-"))
def test_what_is_said_of(case):
    said = "\n".join(findings(case))
    assert case.said in said
    assert bool(said) == bool(case.said), said


def test_a_finding_names_the_access_the_line_and_the_thread():
    case = Case("", INDEX + "\n\nif (i == 300) out[64] = inp[i]; else if (i < 64) out[i] = 0;")
    (said,) = findings(case)[:1]
    line = "source:4" if shutil.which("addr2line") else UNKNOWN_LINE
    access = f"out of bounds: store of 4 B at byte 256 of 'out' (256 B) at {line}"
    assert said == f"{access}, thread (44, 0, 0) of threadgroup (1, 0, 0)"


def test_an_uninitialised_local_is_not_zero():
    source = INDEX + "float q[2]; if (inp[i] > 1e9f) q[1] = 1; out[i] = q[i & 1];"
    (out,) = Kernel("local", ["inp"], ["out"], source)([mx.zeros(64)], [(64,)], [mx.float32], (64, 1, 1), (32, 1, 1))
    assert np.isnan(np.array(out)[1])


def test_a_call_raises_what_run_reports():
    kernel = Kernel("far", ["inp"], ["out"], "out[thread_position_in_grid.x + 1] = inp[0];")
    with pytest.raises(KernelError, match="out of bounds: store of 4 B at byte 256 of 'out'"):
        kernel([mx.zeros(64)], [(64,)], [mx.float32], (64, 1, 1), (32, 1, 1))


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_a_race_is_found_in_other_orders(order):
    case = RACES[0]
    said = findings(Case(case.name, case.source, options=Options(order=order, seed=3)))
    assert any("race on threadgroup" in line for line in said)
