"""Kernels without a bug compute what MLX or NumPy computes, in every order, with nothing to object to."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from . import Kernel, KernelError, Options

F32 = mx.float32
ORDERS = ["forward", "reverse", "random"]
TREE = """
  threadgroup float sh[256];
  uint t = thread_position_in_threadgroup.x, g = threadgroup_position_in_grid.x;
  sh[t] = inp[g * 256 + t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 128; s > 0; s >>= 1) {
    if (t < s) sh[t] += sh[t + s];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (t == 0) out[g] = sh[0];
"""
MATRIX_VECTOR = """
  uint row = threadgroup_position_in_grid.y * 8 + simdgroup_index_in_threadgroup * 4;
  uint lane = thread_index_in_simdgroup;
  float acc[4] = {0};
  for (uint k0 = lane * 16; k0 < K; k0 += 512) {
    float xs[16]; float sum = 0;
    for (uint i = 0; i < 16; i++) { xs[i] = static_cast<float>(x[k0 + i]); sum += xs[i]; }
    for (uint r = 0; r < 4; r++) {
      const device uint32_t* wp = w + (row + r) * (K / 8) + k0 / 8;
      float s = static_cast<float>(scales[(row + r) * (K / GS) + k0 / GS]);
      float bias = static_cast<float>(biases[(row + r) * (K / GS) + k0 / GS]);
      float d = 0;
      for (uint j = 0; j < 2; j++)
        for (uint i = 0; i < 8; i++) d += xs[j * 8 + i] * static_cast<float>(extract_bits(wp[j], 4 * i, 4));
      acc[r] += s * d + bias * sum;
    }
  }
  for (uint r = 0; r < 4; r++) {
    float v = simd_sum(acc[r]);
    if (lane == 0) y[row + r] = static_cast<T>(v);
  }
"""
MATRIX = """
  simdgroup_float8x8 A, B, C = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  uint r = threadgroup_position_in_grid.y * 8, c = threadgroup_position_in_grid.x * 8;
  for (uint k = 0; k < K; k += 8) {
    simdgroup_load(A, a + r * K + k, K);
    simdgroup_load(B, b + k * N + c, N);
    simdgroup_multiply_accumulate(C, A, B, C);
  }
  simdgroup_store(C, out + r * N + c, N);
"""
LANES = """
  uint i = thread_position_in_grid.x;
  uint v = inp[i];
  uint ballot = uint(simd_vote::vote_t(simd_ballot(v & 1)));
  float4 f = float4(float2(v, 1), half2(0.5h, 2.0h));
  f.xy = f.wz;
  uint parts[8] = {simd_prefix_exclusive_sum(v), simd_shuffle_xor(v, ushort(1)), simd_shuffle_down(v, ushort(3)),
                   simd_broadcast(v, ushort(5)), popcount(ballot), uint(2 * dot(f, float4(1))), uint(tbl[v & 3]),
                   quad_sum(v)};
  for (uint j = 0; j < 8; j++) atomic_store_explicit(&out[8 * i + j], parts[j], memory_order_relaxed);
  atomic_fetch_add_explicit(&hist[v & 3], 1u, memory_order_relaxed);
"""


def error(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(F32) - b.astype(F32)).max())


@pytest.mark.parametrize("size", [1, 7, 31, 1000])
def test_elementwise(size):
    a, b = mx.random.normal((2, size), key=mx.random.key(size))
    kernel = Kernel("fma", ["a", "b"], ["out"], "uint i = thread_position_in_grid.x; out[i] = fma(a[i], b[i], T(1));")
    result = kernel.run([a, b], [(size,)], [F32], (size, 1, 1), (256, 1, 1), [("T", F32)])
    assert result.report.findings() == []
    assert error(result.outputs[0], a * b + 1) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
def test_tree_reduction(order):
    x = mx.random.normal((8, 256), key=mx.random.key(1))
    options = Options(order=order, seed=7)
    kernel = Kernel("tree", ["inp"], ["out"], TREE)
    result = kernel.run([x], [(8,)], [F32], (8 * 256, 1, 1), (256, 1, 1), options=options)
    assert result.report.findings() == []
    assert error(result.outputs[0], x.sum(1)) < 1e-4
    assert result.report.counts["threadgroup_barriers"] == 8 * 9
    assert result.report.counts["threadgroup_bytes"] == 1024


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (mx.float16, 2e-2), (mx.bfloat16, 2e-1)])
def test_quantized_matrix_vector(dtype, tolerance):
    rows, width = 64, 1024
    w = mx.random.normal((rows, width), key=mx.random.key(2)).astype(dtype) * 0.1
    x = mx.random.normal((width,), key=mx.random.key(3)).astype(dtype)
    packed, scales, biases = mx.quantize(w, group_size=64, bits=4)
    kernel = Kernel("qmv", ["w", "scales", "biases", "x"], ["y"], MATRIX_VECTOR)
    template = [("T", dtype), ("K", width), ("GS", 64)]
    inputs = [packed, scales, biases, x]
    result = kernel.run(inputs, [(rows,)], [dtype], (32, rows // 4, 1), (32, 2, 1), template)
    exact = mx.quantized_matmul(x[None].astype(F32), packed, scales.astype(F32), biases.astype(F32), bits=4)[0]
    assert result.report.findings() == []
    assert error(result.outputs[0], exact) < tolerance


def test_simdgroup_matrices():
    a, b = mx.random.normal((32, 64), key=mx.random.key(4)), mx.random.normal((64, 48), key=mx.random.key(5))
    kernel = Kernel("matmul", ["a", "b"], ["out"], MATRIX, header="#include <metal_simdgroup_matrix>\n")
    template = [("K", 64), ("N", 48)]
    result = kernel.run([a, b], [(32, 48)], [F32], (32 * 6, 4, 1), (32, 1, 1), template)
    assert result.report.findings() == []
    assert error(result.outputs[0], a @ b) < 1e-4


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_atomics_vectors_and_tables(order):
    v = np.random.default_rng(6).integers(0, 100, 128, dtype=np.uint32)
    header = "constant float tbl[4] = {10, 20, 30, 40};\n"
    kernel = Kernel("lanes", ["inp"], ["out", "hist"], LANES, header, atomic_outputs=True)
    out, hist = kernel(
        [mx.array(v)],
        [(128, 8), (4,)],
        [mx.uint32, mx.uint32],
        (128, 1, 1),
        (64, 1, 1),
        init_value=0,
        options=Options(order=order),
    )
    n, lane = v.astype(np.int64).reshape(-1, 32), np.arange(32)
    expected = [
        np.cumsum(n, 1) - n,
        n[:, lane ^ 1],
        np.where(lane + 3 < 32, n[:, np.minimum(lane + 3, 31)], n),
        np.repeat(n[:, 5:6], 32, 1),
        np.repeat((n & 1).sum(1)[:, None], 32, 1),
        np.full(n.shape, 2 * (2 + 0.5 + 0.5 + 2)),
        np.array([10, 20, 30, 40])[n & 3],
        np.repeat(n.reshape(-1, 8, 4).sum(2), 4, 1),
    ]
    np.testing.assert_array_equal(np.array(out).T.reshape(8, *n.shape), expected)
    np.testing.assert_array_equal(np.array(hist), np.bincount(v & 3, minlength=4))


def test_strided_inputs():
    x = mx.arange(96, dtype=mx.float32).reshape(8, 12)
    source = "uint i = thread_position_in_grid.x; out[i] = T(x[elem_to_loc(i, x_shape, x_strides, x_ndim)]);"
    for dtype in (F32, mx.bfloat16):
        for view in (x.astype(dtype).T, x.astype(dtype)[1::2, 2:9:3]):
            for contiguous in (True, False):
                kernel = Kernel("strided", ["x"], ["out"], source, ensure_row_contiguous=contiguous)
                size = view.size
                result = kernel.run([view], [view.shape], [dtype], (size, 1, 1), (32, 1, 1), [("T", dtype)])
                assert result.report.findings() == []
                assert mx.array_equal(result.outputs[0], view)
                reads_whole_memory = result.report.buffers["x"].unique
                assert reads_whole_memory > 0


def test_denormals_are_kept_or_flushed():
    kernel = Kernel("half", ["a"], ["o"], "uint i = thread_position_in_grid.x; o[i] = a[i] * 0.5f;")
    a = mx.array([1e-38, 3e-38, 1.0] * 4)
    first = {}
    for flush in (False, True):
        options = Options(flush_denormals=flush)
        (out,) = kernel([a], [(12,)], [F32], (12, 1, 1), (12, 1, 1), options=options)
        first[flush] = np.array(out)[:3]
    np.testing.assert_array_equal(first[False], np.array([1e-38, 3e-38, 1], np.float32) * np.float32(0.5))
    np.testing.assert_array_equal(first[True], [0, np.float32(3e-38) * np.float32(0.5), 0.5])


def test_an_endless_kernel_is_stopped():
    kernel = Kernel("endless", ["a"], ["o"], "while (a[0] < 1) o[0] = a[1];")
    with pytest.raises(KernelError, match="no end after 1 s"):
        kernel([mx.zeros(8)], [(8,)], [F32], (1, 1, 1), (1, 1, 1), options=Options(timeout=1))


def test_a_kernel_that_kills_its_process():
    kernel = Kernel("wild", ["a"], ["o"], "o[thread_position_in_grid.x] = a[40000000];")
    run = [mx.zeros(8)], [(8,)], [F32], (8, 1, 1), (8, 1, 1)
    with pytest.raises(KernelError, match="SIGSEGV in mode fast; run it in mode check"):
        kernel(*run, options=Options(mode="fast"))
    with pytest.raises(KernelError, match="out of bounds: load of 4 B at byte 160000000 of 'a'"):
        kernel(*run)


def test_sizes_metal_refuses():
    kernel = Kernel("big", ["a"], ["o"], "o[thread_position_in_grid.x] = a[0];")
    with pytest.raises(ValueError, match="more than 1024 threads"):
        kernel([mx.zeros(8)], [(2048,)], [F32], (2048, 1, 1), (2048, 1, 1))
