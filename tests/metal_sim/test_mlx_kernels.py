"""MLX's own kernels, unchanged, from the wheel: they agree with MLX on the CPU, and their traffic is counted."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from grids import grid

from . import Buffer, Options, Report, bits, from_bits, mlx_source, run_file

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
NAMES = {F32: "float", F16: "half", BF16: "bfloat"}
QUANTIZED = (
    '#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"\n#include "mlx/backend/metal/kernels/quantized_utils.h"\n'
)


def inputs(**arrays: mx.array | np.ndarray) -> list[Buffer]:
    return [Buffer(name, bits(a) if isinstance(a, mx.array) else a) for name, a in arrays.items()]


def output(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> Buffer:
    return Buffer(name, bits(mx.zeros(shape, dtype)), writable=True, written=False)


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def error(got: np.ndarray, dtype: mx.Dtype, exact: mx.array) -> float:
    return float(mx.abs(from_bits(got, dtype).astype(F32) - exact).max())


def attention(
    dtype: mx.Dtype, heads: int, kv_heads: int, tokens: int, rows: int = 1, causal: bool = False, mode: str = "check"
) -> tuple[float, Report]:
    """`sdpa_vector`, head dimension 128: error against MLX, and the report."""
    dim = 128
    q = normal((1, heads, rows, dim), dtype, 1)
    k, v = (normal((1, kv_heads, tokens, dim), dtype, seed) for seed in (2, 3))
    head, row = np.array(tokens * dim, np.uint64), np.array(dim, np.uint64)
    buffers = [
        *inputs(q=q, k=k, v=v),
        output("out", q.shape, dtype),
        *inputs(gqa=np.array(heads // kv_heads, np.int32), n=np.array(tokens, np.int32)),
        *inputs(k_head=head, k_row=row, v_head=head, v_row=row, scale=np.array(dim**-0.5, np.float32)),
        *[None] * 7,
    ]
    (out,), report = run_file(
        mlx_source("sdpa_vector.h"),
        "sdpa_vector",
        [NAMES[dtype], str(dim), str(dim)],
        buffers,
        (1024 * heads, rows, 1),
        (1024, 1, 1),
        constants={"do_causal": causal},
        options=Options(mode=mode),
    )
    wide = [a.astype(F32) for a in (q, k, v)]
    mask = "causal" if causal else None
    exact = mx.fast.scaled_dot_product_attention(*wide, scale=dim**-0.5, mask=mask)
    return error(out, dtype, exact), report


@grid(1, of=[(F32, 2e-5), (F16, 2e-3), (BF16, 2e-2)], case=[(1, False), (4, True)])
def test_sdpa_vector(of, case):
    (dtype, tolerance), (rows, causal) = of, case
    wrong, report = attention(dtype, 8, 2, 293, rows, causal)
    assert report.findings() == []
    assert wrong < tolerance


def test_sdpa_vector_reads_each_key_once_per_query_head():
    wrong, report = attention(F16, 32, 8, 1024, mode="count")
    keys = 8 * 1024 * 128 * 2
    assert wrong < 2e-3
    assert report.buffers["k"].unique == report.buffers["v"].unique == keys
    assert report.buffers["k"].loaded == report.buffers["k"].per_group == 4 * keys
    # A lane loads its four neighbouring values one by one: each load spreads 64 bytes over two lines.
    assert report.line_use(["k", "v"]) == 0.5


def test_fast_mode_agrees():
    wrong, report = attention(F16, 8, 8, 1024, mode="fast")
    assert wrong < 2e-3
    assert report.accesses == []


@grid(1, of=[(F32, 1e-4), (F16, 1e-2), (BF16, 1e-1)], case=[(4, 64), (8, 32), (3, 64), (2, 128)])
def test_affine_qmv_fast(of, case):
    (dtype, tolerance), (width, group) = of, case
    rows, columns = 64, 1024
    w, x = normal((rows, columns), dtype, 4) * 0.1, normal((1, columns), dtype, 5)
    packed, scales, biases = mx.quantize(w.astype(dtype), group_size=group, bits=width)
    buffers = [
        *inputs(w=packed, scales=scales, biases=biases, x=x),
        output("y", (1, rows), dtype),
        *inputs(columns=np.array(columns, np.int32), rows=np.array(rows, np.int32)),
        *[None] * 8,
    ]
    (y,), report = run_file(
        mlx_source("quantized.h"),
        "affine_qmv_fast",
        [NAMES[dtype], str(group), str(width), "false"],
        buffers,
        (32, rows // 4, 1),
        (32, 2, 1),
        before=QUANTIZED,
    )
    wide = (scales.astype(F32), biases.astype(F32))
    exact = mx.quantized_matmul(x.astype(F32), packed, *wide, group_size=group, bits=width)
    assert report.findings() == []
    assert error(y, dtype, exact) < tolerance
    assert report.buffers["w"].loaded == packed.nbytes


def test_affine_qmm_t():
    n, width, group = 64, 128, 64
    w, x = normal((n, width), F16, 6) * 0.1, normal((n, width), F16, 7)
    packed, scales, biases = mx.quantize(w.astype(F16), group_size=group, bits=4)
    sizes = {"k": width, "n": n, "m": n}
    buffers = [
        *inputs(w=packed, scales=scales, biases=biases, x=x),
        output("y", (n, n), F16),
        *inputs(**{name: np.array(size, np.int32) for name, size in sizes.items()}),
        *[None] * 8,
    ]
    (y,), report = run_file(
        mlx_source("quantized.h"),
        "affine_qmm_t",
        ["half", str(group), "4", "true", "false"],
        buffers,
        (32 * (n // 32), 2 * (n // 32), 2),
        (32, 2, 2),
        before=QUANTIZED,
    )
    wide = (scales.astype(F32), biases.astype(F32))
    exact = mx.quantized_matmul(x.astype(F32), packed, *wide, group_size=group, bits=4)
    assert report.findings() == []
    assert error(y, F16, exact) < 2e-2
    assert report.counts["simdgroup_barriers"] > 0
