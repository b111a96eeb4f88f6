"""A packed matrix times few rows, in the simulator, against the reference."""

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import EVERY, SOME, agree, matmul_off, normal, weights
from grids import grid, thinned
from kernel_cases import SCHEDULES, needs_kernels, needs_simulator, running
from mlx_rotor.errors import RotorError
from mlx_rotor.kernels.experts import MAX_ROWS, matmul, prepared
from mlx_rotor.kernels.experts.few_rows import matvec


@needs_kernels
@pytest.mark.parametrize("name", thinned(EVERY, 6), ids=lambda name: "-".join(map(str, name)))
def test_every_format(name):
    columns = 2 * max(name[2], 32)
    agree(matmul_off, normal(1, columns), weights(name, (33,), columns, bias=True))


@needs_kernels
@grid(
    1,
    name=[("affine", 4, 32), ("affine", 3, 32), ("iq4_nl", 4, 32), ("affine", 8, 32), ("q8", 8, 32)],
    columns=[64, 96, 160, 1056, 2880],
)
def test_columns(name, columns):
    agree(matmul_off, normal(2, columns), weights(name, (9,), columns))


@needs_kernels
@grid(1, width=[1, 33, 130], rows=[1, 3, MAX_ROWS])
def test_edges_of_rows_and_outputs(rows, width):
    agree(matmul_off, normal(rows, 256), weights(("affine", 3, 64), (width,), 256, bias=True))


@needs_kernels
@pytest.mark.parametrize("name", [("affine", 3, 64), ("lloyd", 3, 256), ("lloyd", 2, 256), ("affine", 8, 32)], ids=str)
def test_more_columns_than_a_threadgroup_holds(name):
    """Panels, the last of them shorter."""
    x, w = normal(MAX_ROWS, 1792), weights(name, (5,), 1792, bias=True)
    assert prepared.geometry(5, 1792, (prepared.side(w),), MAX_ROWS, 64).panel < 1792
    agree(matmul_off, x, w)


@needs_kernels
@grid(
    1,
    name=[("affine", 3, 64), ("lloyd", 2, 64)],
    beside=[mx.float16, mx.bfloat16, mx.float32],
    dtype=[mx.float16, mx.bfloat16],
)
def test_dtypes(name, beside, dtype):
    agree(matmul_off, normal(2, 192, dtype=dtype), weights(name, (9,), 192, dtype=beside, bias=True))


@needs_kernels
def test_a_matrix_of_fewer_than_eight_numbers():
    agree(matmul_off, normal(1, 32), weights(("affine", 2, 32), (1,), 32, bias=True))


@needs_kernels
def test_layouts():
    """Rows of a transposed x and a batch of them; weights that are every other row of others."""
    w = weights(("affine", 4, 64), (40,), 64, bias=True)
    thinner = type(w)(w.format, tuple(part[::2] for part in w.parts), w.columns, w.bias[::2])
    agree(matmul_off, mx.contiguous(normal(3, 64).T).T, thinner)
    agree(matmul_off, normal(2, 3, 64), w)


@needs_simulator
@grid(1, name=SOME, options=SCHEDULES)
def test_no_schedule_matters(name, options):
    agree(matmul_off, normal(2, 512), weights(name, (33,), 512, bias=True), options=options)


@needs_simulator
def test_results_do_not_depend_on_the_order():
    x, w = normal(2, 512), weights(("lloyd", 3, 256), (33,), 512)
    got = []
    for options in SCHEDULES[::2]:
        with running(options):
            got.append(np.array(matmul(x, w)))
    assert np.array_equal(*got)


def test_what_it_does_not_take():
    w = weights(("affine", 4, 32), (8,), 64)
    with pytest.raises(RotorError, match="columns"):
        matvec(normal(1, 32), w)
    with pytest.raises(RotorError, match="int32"):
        matvec(normal(1, 64).astype(mx.int32), w)
    with pytest.raises(RotorError, match="dimensions"):
        matvec(normal(1, 64), weights(("affine", 4, 32), (2, 8), 64))
