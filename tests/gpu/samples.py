"""Small kernels that between them use every operation of the headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .cuda import Size

UINT, FLOAT, HALF, BFLOAT = mx.uint32, mx.float32, mx.float16, mx.bfloat16
MATRICES = "#include <metal_simdgroup_matrix>\n"


@dataclass(frozen=True)
class Sample:
    """A kernel, as a maker of kernels takes it, and one call of it."""

    name: str
    source: str
    inputs: dict[str, Any]
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    grid: Size
    threadgroup: Size
    template: Sequence[tuple[str, Any]] = ()
    header: str = ""
    init_value: float | None = None
    atomic: bool = False

    def run(self, maker: Callable[..., Callable[..., list[mx.array]]], **options: Any) -> list[mx.array]:
        """What the kernel, made by `maker`, gives for the call."""
        kernel = maker(
            name=f"sample_{self.name}",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
            atomic_outputs=self.atomic,
        )
        return kernel(
            inputs=list(self.inputs.values()),
            output_shapes=[shape for shape, _ in self.outputs.values()],
            output_dtypes=[dtype for _, dtype in self.outputs.values()],
            grid=self.grid,
            threadgroup=self.threadgroup,
            template=list(self.template),
            init_value=self.init_value,
            **options,
        )


def _normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _table(name: str, values: Sequence[str], dtype: mx.Dtype, threads: int, group: Size, **more: Any) -> Sample:
    """Every thread i has x = x[i] and writes `values` to row i."""
    grid = more.pop("grid", (threads, 1, 1))
    source = more.pop("before", "uint i = thread_position_in_grid.x; T x = a[i];")
    source += "".join(f"\n  o[{len(values)} * i + {k}] = O({value});" for k, value in enumerate(values))
    inputs = more.pop("inputs", None) or {"a": mx.arange(threads).astype(dtype) % 13 - (5 if dtype != UINT else 0)}
    shape = (threads, len(values))
    template = [("T", dtype), ("O", more.pop("result", dtype))]
    return Sample(name, source, inputs, {"o": (shape, template[1][1])}, grid, group, template, **more)


SHUFFLES = [
    *("simd_shuffle(x, ushort((i * 7) & 31))", "simd_broadcast(x, ushort(5))", "simd_broadcast_first(x)"),
    *("simd_shuffle_xor(x, ushort(9))", "simd_shuffle_up(x, ushort(3))", "simd_shuffle_down(x, ushort(4))"),
    *("simd_shuffle_rotate_up(x, ushort(3))", "simd_shuffle_rotate_down(x, ushort(30))"),
    *("simd_shuffle_and_fill_up(x, T(x + T(1)), ushort(2))", "simd_shuffle_and_fill_down(x, T(x + T(1)), ushort(5))"),
    *(
        "simd_shuffle_and_fill_up(x, x, ushort(1), ushort(8))",
        "simd_shuffle_and_fill_down(x, x, ushort(3), ushort(16))",
    ),
]
QUADS = [
    *("quad_sum(x)", "quad_min(x)", "quad_max(x)", "quad_shuffle(x, ushort((i + 1) & 3))"),
    *("quad_broadcast(x, ushort(2))", "quad_shuffle_xor(x, ushort(3))", "quad_shuffle_up(x, ushort(1))"),
    "quad_shuffle_down(x, ushort(2))",
]
REDUCTIONS = [
    *("simd_sum(x)", "simd_min(x)", "simd_max(x)", "simd_product(x)"),
    *("simd_prefix_inclusive_sum(x)", "simd_prefix_exclusive_sum(x)"),
    *("simd_prefix_inclusive_product(x)", "simd_prefix_exclusive_product(x)"),
]
VOTES = [
    *("simd_and(x)", "simd_or(x)", "simd_xor(x)", "simd_any(x > 11)", "simd_all(x < 12)", "simd_is_first()"),
    *("uint(simd_vote::vote_t(simd_ballot(x & 1)))", "uint(simd_vote::vote_t(simd_active_threads_mask()))"),
]
MATHS = [
    *("exp2(x)", "log2(y)", "exp(x)", "log(y)", "exp10(x * 0.1f)", "log10(y)", "sqrt(y)", "rsqrt(y)", "sin(x)"),
    *("cos(x)", "tan(x)", "asin(x * 0.1f)", "acos(x * 0.1f)", "atan(x)", "sinh(x)", "cosh(x)", "tanh(x)", "asinh(x)"),
    *("acosh(y)", "atanh(x * 0.1f)", "pow(y, x)", "fmod(x, 1.5f)", "atan2(x, y)", "floor(x)", "ceil(x)", "trunc(x)"),
    *("round(x)", "rint(x)", "fract(x)", "fma(x, y, 0.5f)", "fabs(x)", "clamp(x, -1.0f, 1.0f)", "sign(x)"),
    *("ldexp(x, 3)", "min(x, y)", "max(x, 0.5f)", "mix(x, y, 0.25f)", "x / y", "select(x, y, x > 0)"),
    *("dot(float4(x, y, 1, 2), float4(y))", "float4(float2(x, y), half2(0.5h, 2.0h)).wzyx.x"),
    *("float(half(x))", "float(bfloat(x))", "float(half(y) * half(x))", "as_type<float>(as_type<uint>(x) ^ 1u)"),
]
INTEGERS = [
    *("popcount(x)", "clz(x)", "ctz(x)", "reverse_bits(x)", "extract_bits(x, 2, 3)", "insert_bits(x, 5u, 4, 3)"),
    *("mulhi(x, 0x9E3779B9u)", "rotate(x, 7u)", "min(x, 9u)", "max(x, 9u)", "clamp(x, 3u, 8u)", "mul24(x, 77u)"),
    *("uint(uchar(x * 99))", "uint(as_type<ushort>(half(x)))", "as_type<uint>(half2(half(x), 1.5h))", "table[x & 3]"),
]
PLACES = [
    *(f"{v}.{a}" for a in "xyz" for v in ("thread_position_in_threadgroup", "threadgroup_position_in_grid")),
    *(f"{v}.{a}" for a in "xyz" for v in ("threads_per_grid", "threads_per_threadgroup", "threadgroups_per_grid")),
    *(f"dispatch_threads_per_threadgroup.{a}" for a in "xyz"),
    *("thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"),
    *("simdgroups_per_threadgroup", "threads_per_simdgroup", "thread_index_in_quadgroup"),
    "quadgroup_index_in_threadgroup",
]
PLACE = """uint3 p = thread_position_in_grid, g = threads_per_grid;
  uint i = (p.z * g.y + p.y) * g.x + p.x;"""
TREE = """
  threadgroup float part[256];
  threadgroup uint last;
  uint t = thread_position_in_threadgroup.x, g = threadgroup_position_in_grid.x;
  part[t] = a[g * 256 + t];
  if (t == 255) last = g;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 128; s > 0; s >>= 1) {
    if (t < s) part[t] += part[t + s];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (t == 0) o[g] = part[0] + last;
"""
WITHIN = """
  threadgroup uint turned[64];
  uint t = thread_position_in_threadgroup.x;
  turned[t] = a[thread_position_in_grid.x];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  o[thread_position_in_grid.x] = turned[t ^ 31];
"""
MATRIX = """
  simdgroup_matrix<T, 8, 8> A, B;
  simdgroup_float8x8 C = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  threadgroup T tile[64];
  uint r = threadgroup_position_in_grid.y * 8, c = threadgroup_position_in_grid.x * 8;
  for (uint k = 0; k < 16; k += 8) {
    simdgroup_load(A, a + r * 16 + k, 16);
    simdgroup_load(B, b + c * 16 + k, 16, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(C, A, B, C);
  }
  simdgroup_store(A, tile, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  C.thread_elements()[1] += float(tile[thread_index_in_simdgroup]);
  simdgroup_store(C, o + r * 16 + c, 16);
"""
ATOMICS = """
  threadgroup atomic<uint> seen;
  uint i = thread_position_in_grid.x;
  if (thread_position_in_threadgroup.x == 0) atomic_store_explicit(&seen, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&seen, a[i], memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&o[a[i] & 3], 1u, memory_order_relaxed);
  atomic_fetch_max_explicit(&o[4], a[i], memory_order_relaxed);
  atomic_fetch_min_explicit(&o[5], a[i], memory_order_relaxed);
  atomic_fetch_or_explicit(&o[6], 1u << (a[i] & 31), memory_order_relaxed);
  atomic_fetch_xor_explicit(&o[7], a[i], memory_order_relaxed);
  uint expected = 1000;
  while (!atomic_compare_exchange_weak_explicit(&o[8], &expected, expected + a[i],
                                                memory_order_relaxed, memory_order_relaxed)) {}
  if (thread_position_in_threadgroup.x == 0)
    atomic_store_explicit(&o[9 + threadgroup_position_in_grid.x],
                          atomic_load_explicit(&seen, memory_order_relaxed), memory_order_relaxed);
"""


def samples() -> list[Sample]:
    """All of them, in whole and in partial simdgroups."""
    lone = "uint i = thread_position_in_grid.x; float x = a[i], y = 1.0f + abs(x);"
    table = "constant uint table[4] = {7, 11, 13, 17};\n"
    short = [*REDUCTIONS[:5], VOTES[6]]
    found = [
        _table("lanes_uint", [*REDUCTIONS, *SHUFFLES, *QUADS, *VOTES], UINT, 128, (64, 1, 1)),
        _table("lanes_float", [*REDUCTIONS, *SHUFFLES, *QUADS], FLOAT, 64, (64, 1, 1)),
        _table("lanes_half", [*REDUCTIONS[:3], *SHUFFLES, *QUADS], HALF, 64, (64, 1, 1)),
        _table("lanes_bfloat", [*REDUCTIONS[:3], *SHUFFLES[:2], *SHUFFLES[3:6]], BFLOAT, 64, (64, 1, 1)),
        _table("lanes_uchar", SHUFFLES[:8], mx.uint8, 64, (64, 1, 1)),
        _table("lanes_partial", [*REDUCTIONS[:3], *QUADS[:3], VOTES[7]], UINT, 70, (48, 1, 1)),
        _table("lanes_short", short, UINT, 44, (11, 2, 1), grid=(11, 4, 1), before=f"{PLACE} T x = a[i];"),
        _table("maths", MATHS, FLOAT, 96, (32, 1, 1), before=lone, inputs={"a": _normal(96) * 3}),
        _table("integers", INTEGERS, UINT, 64, (32, 1, 1), header=table),
        _table("places", PLACES, UINT, 4 * 6 * 5, (4, 3, 2), before=PLACE, inputs={"a": mx.array(0)}, grid=(4, 6, 5)),
        Sample("tree", TREE, {"a": _normal(4, 256)}, {"o": ((4,), FLOAT)}, (1024, 1, 1), (256, 1, 1)),
        Sample("within", WITHIN, {"a": mx.arange(128)}, {"o": ((128,), UINT)}, (128, 1, 1), (64, 1, 1)),
    ]
    for n in (1, 7, 1000):  # a reference, constant memory, device memory
        source = "uint i = thread_position_in_grid.x; o[i] = fma(a[i], b[i], s);"
        inputs = {"a": _normal(n), "b": _normal(n, seed=1), "s": 0.5}
        found.append(Sample(f"fma_{n}", source, inputs, {"o": ((n,), FLOAT)}, (n, 1, 1), (256, 1, 1)))
    for dtype, name in ((FLOAT, "float"), (HALF, "half"), (BFLOAT, "bfloat")):
        inputs = {"a": _normal(16, 16).astype(dtype), "b": _normal(16, 16, seed=1).astype(dtype)}
        out = {"o": ((16, 16), FLOAT)}
        typed = [("T", dtype)]
        found.append(Sample(f"matrix_{name}", MATRIX, inputs, out, (64, 2, 1), (32, 1, 1), typed, header=MATRICES))
    view = _normal(12, 8).T[1::2]
    source = "uint i = thread_position_in_grid.x; o[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];"
    found.append(Sample("strided", source, {"a": view}, {"o": (view.shape, FLOAT)}, (view.size, 1, 1), (32, 1, 1)))
    counts = mx.array(np.random.default_rng(1).integers(1, 99, 128, dtype=np.uint32))
    call = {"a": counts}, {"o": ((11,), UINT)}, (128, 1, 1), (64, 1, 1)
    found.append(Sample("atomics", ATOMICS, *call, init_value=50, atomic=True))
    return found
