"""Counts of operations: known exactly for kernels written by hand, and as the algorithm says for MLX's own."""

from __future__ import annotations

import mlx.core as mx
import pytest

from . import CompileError, Kernel, Options, Report
from .arithmetic import instrument
from .operations import KINDS
from .test_mlx_kernels import attention

LANES, STEPS = 64, 5
COUNTED = Options(mode="arithmetic")


def run(body: str, header: str = "", threads: int = LANES, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, Report]:
    """Of `body` with float x[LANES], uint w[LANES] and n = STEPS as inputs, y[LANES] as its output."""
    inputs = [mx.arange(LANES).astype(mx.float32), mx.arange(LANES).astype(mx.uint32) * 77777, mx.array(STEPS)]
    kernel = Kernel("counted", ["x", "w", "n"], ["y"], f"uint i = thread_position_in_grid.x;\n{body}", header)
    result = kernel.run(inputs, [(LANES,)], [dtype], (threads, 1, 1), (32, 1, 1), options=COUNTED)
    assert result.report.errors == []
    assert set(result.report.operations) <= set(KINDS)
    return result.outputs[0], result.report


def per_lane(report: Report, lanes: int = LANES) -> dict[str, float]:
    """What the kernel computes for its result: without the overhead, and without loads and stores."""
    useful = {kind: n - report.overhead.get(kind, 0) for kind, n in report.operations.items()}
    return {kind: n / lanes for kind, n in useful.items() if n and not kind.startswith(("load_", "store_"))}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("float a = x[i]; for (int j = 0; j < n; j++) a = fma(a, 1.5f, 2.0f); y[i] = a;", {"fma": STEPS}),
        ("float a = x[i]; for (int j = 0; j < n; j++) a = a * 1.5f + 2.0f; y[i] = a;", {"fma": STEPS}),
        ("float a = x[i]; for (int j = 0; j < n; j++) a = (a + 1.0f) * 3.0f; y[i] = a;", {"float": 2 * STEPS}),
        ("y[i] = as_type<float>(w[i] << 3);", {"shift": 1}),
        ("y[i] = as_type<float>((w[i] << n) ^ (w[i] >> 5));", {"shift_left_dynamic": 1, "shift": 1, "bitwise": 1}),
        ("y[i] = as_type<float>(w[i] >> n);", {"shift_right_dynamic": 1}),
        ("y[i] = as_type<float>((w[i] >> 7 & 15) + w[i]);", {"extract": 1, "integer": 1}),
        ("y[i] = as_type<float>(w[i] >> 7 & 0x0f0f);", {"shift": 1, "bitwise": 1}),
        ("y[i] = as_type<float>(w[i] * w[i ^ 1] | 1);", {"multiply": 1, "bitwise": 1}),
        ("y[i] = as_type<float>(w[i] / (w[i ^ 1] + 3));", {"integer_divide": 1, "integer": 1}),
        ("y[i] = float(w[i]);", {"convert": 1}),
        ("y[i] = float(half(x[i]));", {"half": 2}),
        ("y[i] = float(bfloat(x[i]));", {"bfloat": 2}),
        ("float a = x[i]; y[i] = a * a < 9.0f ? a : 2.0f;", {"float": 1, "select": 1}),
        ("y[i] = max(x[i], x[i ^ 1]);", {"select": 1}),
        ("y[i] = exp2(x[i]);", {"exp2": 1}),
        ("y[i] = exp(x[i]);", {"exp2": 1, "float": 1}),
        ("y[i] = sqrt(x[i]);", {"sqrt": 1}),
        ("y[i] = rsqrt(x[i]);", {"rsqrt": 1}),
        ("y[i] = x[i] / x[i ^ 1];", {"divide": 1}),
        ("y[i] = -fabs(x[i]) + 1.0f;", {"float": 1}),
        ("y[i] = as_type<float>(popcount(w[i]));", {"bit_count": 1}),
    ],
)
def test_scalars(body, expected):
    assert per_lane(run(body)[1]) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("float4 a = float4(x[i], x[i ^ 1], x[i ^ 2], x[i ^ 3]); a = fma(a, a, a); y[i] = a.x + a.y + a.z + a.w;", 4),
        ("half2 a = half2(x[i], x[i ^ 1]); a = fma(a, a, a); y[i] = float(a.x) + float(a.y);", 2),
    ],
)
def test_vectors_count_once_a_component(body, expected):
    assert run(body)[1].operations["fma"] == expected * LANES


def test_words_of_64_bits_count_twice():
    body = "ulong a = ulong(w[i]) << 32 | w[i ^ 1]; a ^= a << 7; y[i] = as_type<float>(uint(a >> 32) + uint(a));"
    got = per_lane(run(body)[1])
    assert got["bitwise"] == 4 and got["shift"] == 6


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y[i] = simd_sum(x[i]);", {"reduction": 1}),
        ("float4 v = float4(x[i], 1, 2, x[i ^ 1]); v = simd_max(v); y[i] = as_type<float4>(v).x;", {"reduction": 4}),
        ("y[i] = simd_shuffle_xor(x[i], 1);", {"shuffle": 1}),
        ("y[i] = simd_shuffle(x[i], 3);", {"shuffle": 1}),
        ("y[i] = simd_shuffle(x[i], ushort(w[i] & 31));", {"shuffle_any": 1, "bitwise": 1}),
        ("y[i] = quad_sum(x[i]);", {"quad_reduction": 1}),
        ("y[i] = simd_prefix_exclusive_sum(x[i]);", {"scan": 1}),
        ("y[i] = simd_all(x[i] > -1.0f) ? 1.0f : 0.0f;", {"vote": 1, "compare": 1, "select": 1}),
        ("threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = x[i];", {"barrier": 1}),
        ("simdgroup_barrier(mem_flags::mem_none); y[i] = x[i];", {"simdgroup_barrier": 1}),
    ],
)
def test_what_lanes_do_together_counts_as_one(body, expected):
    assert per_lane(run(body)[1]) == expected


def test_matrices():
    body = """
      threadgroup float s[64];
      s[thread_index_in_simdgroup] = x[i]; s[thread_index_in_simdgroup + 32] = x[i];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      simdgroup_float8x8 a, b, c = simdgroup_float8x8(0);
      simdgroup_load(a, x); simdgroup_load(b, s);
      for (int j = 0; j < n; j++) simdgroup_multiply_accumulate(c, a, b, c);
      simdgroup_store(c, s);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      y[i] = s[thread_index_in_simdgroup];
    """
    report = run(body)[1]
    assert per_lane(report) == {"matrix": STEPS, "simdgroup_barrier": 2}
    memory = {k: n / LANES for k, n in report.operations.items() if "threadgroup" in k or k == "load_device"}
    assert memory == {"load_device": 2, "load_threadgroup": 2, "store_threadgroup": 3}


def test_memory_by_address_space():
    header = "constant float table[4] = {0.5f, 1.5f, 2.25f, 7.0f};"
    body = """
      threadgroup float4 s[32];
      uint l = thread_index_in_simdgroup;
      s[l] = float4(x[i]);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      y[i] = table[w[i] & 3] + s[l ^ 1].x + float(n);
    """
    report = run(body, header)[1]
    memory = {k: n / LANES for k, n in report.operations.items() if k.startswith(("load", "store"))}
    device = {"load_device": 2, "store_device": 1}
    assert memory == device | {"load_table": 1, "load_constant": 1, "load_threadgroup": 1, "store_threadgroup": 1}


def test_atomics():
    kernel = Kernel(
        "bump", ["x"], ["y"], "atomic_fetch_add_explicit(&y[0], 1u, memory_order_relaxed);", atomic_outputs=True
    )
    result = kernel.run([mx.zeros(1)], [(1,)], [mx.uint32], (LANES, 1, 1), (32, 1, 1), init_value=0, options=COUNTED)
    assert result.outputs[0].item() == LANES
    assert result.report.operations["atomic"] == LANES


def test_lanes_that_take_a_branch_count():
    body = "float a = x[i]; if (i % 32 < 8) for (int j = 0; j < n; j++) a = fma(a, a, 1.0f); y[i] = a;"
    report = run(body)[1]
    assert report.operations["fma"] == STEPS * LANES / 4
    assert report.issued["fma"] == STEPS * LANES


def test_lanes_that_loop_longest_hold_their_simdgroup():
    body = "float a = x[i]; for (uint j = 0; j < i; j++) a = fma(a, 0.5f, 1.0f); y[i] = a;"
    report = run(body)[1]
    assert report.operations["fma"] == sum(range(LANES))
    assert report.issued["fma"] == 32 * (31 + 63)


def test_lanes_that_are_not_there_do_not_count():
    report = run("y[i] = x[i] * 3.0f;", threads=40)[1]
    assert (report.operations["float"], report.issued["float"]) == (40, 64)


def test_addresses_and_branches_are_overhead():
    body = "float a = 0; for (int j = 0; j < n; j++) a += x[(i * 3 + j) & 63]; y[i] = a;"
    report = run(body)[1]
    assert per_lane(report) == {"float": STEPS}
    assert report.overhead["branch"] >= STEPS * LANES
    assert report.overhead["multiply"] == LANES
    assert report.overhead["bitwise"] == STEPS * LANES
    assert all(n <= report.operations[kind] for kind, n in report.overhead.items())


def test_integers_that_reach_the_result_are_not_overhead():
    report = run("uint a = w[i] + 5; y[a & 63] = float(a);", threads=32)[1]
    assert report.operations["integer"] - report.overhead.get("integer", 0) == 32
    assert report.overhead["bitwise"] == 32


def test_a_run_counts_and_computes_as_other_modes_do():
    body = "float a = x[i]; for (int j = 0; j < n; j++) a = a * 0.5f + float(w[i] >> 3 & 7); y[i] = simd_sum(a);"
    counted, report = run(body)
    assert report.accesses == [] and report.findings() == []
    assert report.issued == report.operations
    kernel = Kernel("counted", ["x", "w", "n"], ["y"], f"uint i = thread_position_in_grid.x;\n{body}")
    inputs = [mx.arange(LANES).astype(mx.float32), mx.arange(LANES).astype(mx.uint32) * 77777, mx.array(STEPS)]
    result = kernel.run(inputs, [(LANES,)], [mx.float32], (LANES, 1, 1), (32, 1, 1))
    assert mx.array_equal(result.outputs[0], counted)
    assert result.report.operations == result.report.overhead == result.report.issued == {}


def test_what_has_no_kind_is_an_error():
    with pytest.raises(CompileError, match="no kind for a call of nobody_knows"):
        instrument("define void @f() {\n  call void @nobody_knows()\n  ret void\n}\n")
    with pytest.raises(CompileError, match="no kind for the instruction cmpxchg"):
        instrument("define void @f(ptr %0) {\n  %2 = cmpxchg ptr %0, i32 0, i32 1 acq_rel monotonic\n  ret void\n}\n")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sdpa_vector(dtype):
    """The work of a key more: q·k and weight·v are one FMA an element each, and a lane has four elements of each.

    Once a key and lane: one FMA for the sum of weights, two exponentials with a subtraction and a product each, a
    maximum, a reduction. Once an element: the output's product with the factor by which the maximum rose.
    """
    heads, short, long = 4, 256, 512
    (wrong, few), (_, many) = (attention(dtype, heads, 2, tokens, mode="arithmetic") for tokens in (short, long))
    assert wrong < 1e-2
    elements = heads * 128 * (long - short)
    more = {kind: (many.operations[kind] - n) / elements for kind, n in few.operations.items()}
    assert more["fma"] == 2 + 1 / 4
    assert more["float"] == 1 + 4 / 4
    assert more["exp2"] == 2 / 4
    assert more["reduction"] == more["select"] == 1 / 4
    assert more["load_device"] == more["bfloat" if dtype == mx.bfloat16 else "half"] == 2
    assert more["load_threadgroup"] == more["divide"] == more["load_constant"] == 0
