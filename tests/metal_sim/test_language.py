"""Text that is no Metal is refused before it runs, and Metal is accepted."""

from __future__ import annotations

import mlx.core as mx
import pytest

from . import CompileError, Kernel

F32, BF16 = mx.float32, mx.bfloat16
INDEX = "uint i = thread_position_in_grid.x; "
FIRST = "if (thread_position_in_grid.x < 64) out[thread_position_in_grid.x] = "
REFUSED = {
    "device pointer into a plain pointer": (f"const float* p = inp; {FIRST} p[0];", "", "without an address space"),
    "helper that takes a plain pointer": (
        f"{FIRST} f(inp);",
        "inline float f(const float* p) { return p[0]; }\n",
        "without an address space",
    ),
    "reference to a local": (f"float a = inp[0]; float& r = a; {FIRST} r;", "", "without an address space"),
    "threadgroup pointer from device": (f"threadgroup const float* p = inp; {FIRST} p[0];", "", "__local float"),
    "write to an input": ("inp[0] = 1; out[0] = 1;", "", "not assignable"),
    "write to a constant table": ("tbl[0] = 1; out[0] = 1;", "constant float tbl[2] = {1, 2};\n", "const"),
    "table that is not constant": ("out[0] = inp[0] * W[1];", "constexpr float W[2] = {1, 2};\n", "must be 'constant'"),
    "static local": ("static int n = 0; out[0] = inp[0] + n;", "", "must be 'constant'"),
    "double": ("double d = inp[0]; out[0] = d;", "", "double"),
    "C-style vector cast": (f"{INDEX}int4 v = int4(i); float4 f = (float4)v; out[i] = f.x;", "", "C-style cast"),
    "lambda": (f"auto f = [](float a) {{ return a; }}; {INDEX}out[i] = f(inp[i]);", "", "LambdaExpr"),
    "goto": ("goto end; out[0] = 1; end: return;", "", "GotoStmt"),
    "simd_sum of 64-bit integers": ("long v = simd_sum(long(inp[0])); out[0] = v;", "", "from 'long' to 'bfloat"),
    "64-bit atomic add": (
        "atomic_fetch_add_explicit((device atomic<ulong>*)out, 1ul, memory_order_relaxed);",
        "",
        "atomic_ulong",
    ),
    "unknown function": ("out[0] = frobnicate(inp[0]);", "", "frobnicate"),
    "std": ("out[0] = std::exp(inp[0]);", "", "std"),
}


def run(source: str, header: str = "", dtype: mx.Dtype = F32, x: mx.array | None = None) -> list[str]:
    x = mx.ones((64,), F32) if x is None else x
    return (
        Kernel("language", ["inp"], ["out"], source, header)
        .run([x], [(64,)], [dtype], (64, 1, 1), (64, 1, 1))
        .report.findings()
    )


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    source, header, said = REFUSED[name]
    with pytest.raises(CompileError, match=said):
        run(source, header)


def test_the_refusal_names_the_line():
    with pytest.raises(CompileError, match=r"^source:3: .*frobnicate"):
        run("\n\nout[0] = frobnicate(inp[0]);")
    with pytest.raises(CompileError, match=r"^header:2: .*without an address space"):
        run("out[0] = f(inp);", "\ninline float f(const float* p) { return p[0]; }\n")


def test_float_becomes_bfloat_only_where_it_is_written():
    with pytest.raises(CompileError, match="converts nothing to bfloat"):
        run(f"{INDEX}out[i] = float(inp[i]) * 2.0f;", dtype=BF16)
    assert run(f"{INDEX}out[i] = bfloat(float(inp[i]) * 2.0f);", dtype=BF16) == []
    assert run(f"{INDEX}out[i] = inp[i] * inp[i];", dtype=BF16, x=mx.ones((64,), BF16)) == []


def test_a_literal_without_suffix_is_a_float():
    assert run(f"{INDEX}out[i] = inp[i] * 0.1;") == []


def test_small_inputs_lie_in_constant_memory():
    device = "inline float f(const device float* p) { return p[0]; }\n"
    any_space = "template <typename P> inline float f(P p) { return p[0]; }\n"
    source = f"{INDEX}out[i] = f(inp);"
    assert run(source, device) == []
    with pytest.raises(CompileError, match="no matching function"):
        run(source, device, x=mx.ones((4,)))
    assert run(source, any_space, x=mx.ones((4,))) == []
