"""Many rows times one packed matrix, in the simulator, against the reference."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import SCHEDULES, needs_kernels, needs_simulator, running
from mlx_rotor.errors import RotorError
from mlx_rotor.kernels.experts import tiles
from tile_cases import EVERY, agree, dense_off, packed, rows_of


@needs_kernels
@pytest.mark.parametrize("name", thinned(EVERY, 3), ids=lambda name: "-".join(map(str, name)))
def test_every_format(name):
    columns = max(name[2], 64)
    agree(dense_off, rows_of(20, columns), packed(name, 40, columns=columns))


@needs_kernels
@grid(1, columns=[32, 128, 160, 288], block=list(tiles.SHAPES))
def test_columns_and_blocks(columns, block):
    """Steps of K that are whole and not; a last block of rows and of outputs that are not."""
    agree(dense_off, rows_of(block + 9, columns), packed(("q8", 8, 32), 40, columns=columns, bias=True), block=block)


@needs_kernels
@grid(1, width=[1, 31, 33], rows=[1, 7, 8, 9, 32, 33, 65])
def test_edges_of_rows_and_outputs(rows, width):
    agree(dense_off, rows_of(rows, 64), packed(("affine", 4, 64), width, columns=64, bias=True))


@needs_kernels
@grid(1, dtype=[mx.float16, mx.bfloat16], beside=[mx.float16, mx.bfloat16, mx.float32])
def test_dtypes(dtype, beside):
    w = packed(("affine", 3, 64), 33, columns=192, dtype=beside, bias=True)
    agree(dense_off, rows_of(40, 192, dtype), w, block=64)


@needs_kernels
def test_values_of_x_beyond_half():
    x = (rows_of(20, 64) * 1e30).astype(mx.bfloat16)
    agree(dense_off, x, packed(("lloyd", 4, 64), 40, columns=64))


@needs_kernels
def test_layouts():
    """Rows of a transposed x, weights that are every other row of others."""
    w = packed(("affine", 4, 64), 80, columns=64, bias=True)
    thinner = type(w)(w.format, tuple(part[::2] for part in w.parts), w.columns, w.bias[::2])
    agree(dense_off, mx.contiguous(rows_of(20, 64).T).T, thinner)
    agree(dense_off, rows_of(9, 65).flatten()[3 : 3 + 8 * 64].reshape(8, 64), w)


@needs_kernels
def test_a_row_without_a_number_stays_alone():
    x, w = rows_of(40, 64), packed(("affine", 4, 64), 33, columns=64)
    broken = mx.where(mx.arange(40)[:, None] == 17, mx.nan, x)
    with running():
        got = np.array(tiles.matmul_tiled(broken, w))
        want = np.array(tiles.matmul_tiled(x, w))
    rest = np.arange(40) != 17
    assert np.isnan(got[17]).all()
    np.testing.assert_array_equal(got[rest], want[rest])


@needs_simulator
def test_a_row_is_the_same_in_every_block():
    x, w = rows_of(70, 160), packed(("q8", 8, 32), 40, columns=160)
    with running():
        first, *others = (np.array(tiles._launch(x, w, {}, len(x), block)) for block in tiles.SHAPES)
    for other in others:
        np.testing.assert_array_equal(first, other)


@needs_simulator
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: o.order)
def test_no_schedule_matters(options):
    w = packed(("lloyd", 3, 64), 40, columns=192, bias=True)
    agree(dense_off, rows_of(70, 192), w, block=64, options=options)


def test_more_rows_a_threadgroup_where_a_gpu_stays_busy():
    assert [tiles.block_for(rows, 1536, 32) for rows in (9, 17, 64, 320, 4096)] == [16, 32, 32, 32, 64]
    assert [tiles.block_for(rows, 1536, 16) for rows in (9, 17, 64, 320, 4096)] == [16, 16, 16, 32, 64]


def test_what_does_not_fit_is_refused():
    w = packed(("affine", 4, 64), 8, columns=64)
    with pytest.raises(RotorError, match="64 columns"):
        tiles.matmul_tiled(rows_of(9, 128), w)
    with pytest.raises(RotorError, match="int32"):
        tiles.matmul_tiled(mx.zeros((9, 64), mx.int32), w)
    with pytest.raises(RotorError, match="3 dimensions"):
        tiles.gather_tiled(rows_of(9, 64), w, mx.zeros((9,), mx.uint32))
    with pytest.raises(RotorError, match="8\\] for 9 rows"):
        tiles.gather_tiled(rows_of(9, 64), packed(("affine", 4, 64), 2, 8, columns=64), mx.zeros((8,), mx.uint32))


def test_no_rows():
    assert tiles.matmul_tiled(mx.zeros((0, 64)), packed(("affine", 4, 64), 8, columns=64)).shape == (0, 8)
