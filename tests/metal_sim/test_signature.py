"""The generated text is MLX's own: MLX prints it on Linux too, while it exports a graph with the kernel in it."""

from __future__ import annotations

import os
import sys

import mlx.core as mx
import pytest

from .signature import generate

F32 = mx.float32
ONE_D = "uint i = thread_position_in_grid.x; out[i] = inp[i];"
SHAPES = """
  uint i = thread_position_in_grid.x + simdgroup_index_in_threadgroup;
  o[i] = T(q[i]) * q_shape[0] + q_strides[1] + q_ndim + tiny_shape[0];
  p[0] = threads_per_grid.x + threadgroup_position_in_grid.y + thread_index_in_simdgroup;
"""
HISTOGRAM = "atomic_fetch_add_explicit(&h[i[thread_position_in_grid.x]], 1u, memory_order_relaxed);"
DTYPES = (mx.bool_, mx.int8, mx.uint16, mx.int32, mx.uint64, mx.float16, mx.bfloat16, mx.complex64)
CASES = {
    "plain": dict(source=ONE_D, inputs=[("inp", mx.zeros(16))], outputs=[("out", F32)]),
    "shapes": dict(
        source=SHAPES,
        header="inline float f(float x) { return x; }\n",
        inputs=[("q", mx.zeros((4, 8), mx.bfloat16)), ("s", mx.array(2.0)), ("tiny", mx.zeros(3, mx.int64))],
        outputs=[("o", mx.float16), ("p", mx.uint8)],
        template=[("T", mx.float16), ("N", 3), ("F", True)],
    ),
    "atomics": dict(
        source=HISTOGRAM, inputs=[("i", mx.zeros(64, mx.uint8))], outputs=[("h", mx.uint32)], atomic_outputs=True
    ),
    **{
        str(dtype): dict(
            source="y[0] = x[0];",
            inputs=[("x", mx.zeros(9, dtype))],
            outputs=[("y", dtype)],
            template=[("U", dtype), ("K", -7), ("B", False)],
        )
        for dtype in DTYPES
    },
}


def printed_by_mlx(folder, *, source, inputs, outputs, header="", template=(), atomic_outputs=False) -> str:
    kernel = mx.fast.metal_kernel(
        name="k",
        input_names=[name for name, _ in inputs],
        output_names=[name for name, _ in outputs],
        source=source,
        header=header,
        atomic_outputs=atomic_outputs,
    )

    def call(*arrays):
        return kernel(
            inputs=list(arrays),
            template=list(template),
            grid=(16, 1, 1),
            threadgroup=(16, 1, 1),
            output_shapes=[(16,)] * len(outputs),
            output_dtypes=[dtype for _, dtype in outputs],
            init_value=0.0,
            verbose=True,
        )

    sys.stdout.flush()
    output, log = os.dup(1), folder / "printed"
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            mx.export_function(str(folder / "k.mlxfn"), call, *[a for _, a in inputs])
        finally:
            os.dup2(output, 1)
            os.close(output)
    fenced = log.read_text().split("```\n", 1)[1].rsplit("\n```", 1)[0]
    return fenced.split("\ntemplate [[host_name")[0].rstrip("\n") + "\n"


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_mlx_generates(tmp_path, name):
    made = generate("k", **{"header": "", **CASES[name]})
    assert made.text == printed_by_mlx(tmp_path, **CASES[name])
    assert made.text.splitlines()[made.lines_before] == CASES[name]["source"].splitlines()[0]
