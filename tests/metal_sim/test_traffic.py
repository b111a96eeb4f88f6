"""Traffic figures tell a good way to read memory from a bad one."""

from __future__ import annotations

import mlx.core as mx
import pytest

from . import Kernel, Options

ROWS, COLUMNS = 64, 512
SIMDGROUP = """
  uint r = threadgroup_position_in_grid.x; float a = 0;
  for (uint c = thread_index_in_simdgroup; c < 512; c += 32) a += x[r * 512 + c];
  a = simd_sum(a);
  if (thread_index_in_simdgroup == 0) y[r] = a;
"""
THREAD = """
  uint r = thread_position_in_grid.x; float a = 0;
  for (uint c = 0; c < 512; c++) a += x[r * 512 + c];
  y[r] = a;
"""
VECTOR = """
  uint r = threadgroup_position_in_grid.x; float4 a = 0;
  const device float4* p = (const device float4*)(x + r * 512);
  for (uint c = thread_index_in_simdgroup; c < 128; c += 32) a += p[c];
  float s = simd_sum(a.x + a.y + a.z + a.w);
  if (thread_index_in_simdgroup == 0) y[r] = s;
"""


@pytest.mark.parametrize("mode", ["count", "check"])
@pytest.mark.parametrize(
    ("source", "threads", "loads", "lines", "line_use"),
    [
        (SIMDGROUP, 32 * ROWS, ROWS * 16, 1, 1),
        (THREAD, ROWS, 2 * 512, 32, 1 / 32),
        (VECTOR, 32 * ROWS, ROWS * 4, 4, 1),
    ],
    ids=["row-per-simdgroup", "row-per-thread", "row-per-simdgroup-float4"],
)
def test_sum_of_rows(source, threads, loads, lines, line_use, mode):
    x = mx.random.normal((ROWS, COLUMNS), key=mx.random.key(0))
    kernel = Kernel("rows", ["x"], ["y"], source)
    result = kernel.run([x], [(ROWS,)], [mx.float32], (threads, 1, 1), (32, 1, 1), options=Options(mode=mode))
    report = result.report
    assert float(mx.abs(result.outputs[0] - x.sum(1)).max()) < 1e-4
    assert report.buffers["x"].loaded == report.buffers["x"].unique == x.nbytes
    assert report.buffers["y"].stored == 4 * ROWS
    read = [a for a in report.accesses if a.buffer == "x"]
    assert sum(a.simd_accesses for a in read) == loads
    assert sum(a.lines for a in read) == loads * lines
    assert report.line_use(["x"]) == line_use


def test_reading_twice_counts_twice():
    source = "uint i = thread_position_in_grid.x; out[i] = x[i / 2];"
    (x, n) = mx.zeros(128), 256
    report = Kernel("twice", ["x"], ["out"], source).run([x], [(n,)], [mx.float32], (n, 1, 1), (32, 1, 1)).report
    assert report.buffers["x"].loaded == 2 * x.nbytes
    assert report.buffers["x"].unique == x.nbytes
    assert report.buffers["x"].per_group == 8 * 128  # eight threadgroups of a 128-byte line each
