"""Many rows, each times its expert, in the simulator, against the reference."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import SOME
from grids import grid
from kernel_cases import SCHEDULES, distance, needs_kernels, needs_simulator, running
from mlx_rotor.kernels.experts import reference, tiles
from tile_cases import RAGGED, agree, experts_of, packed, rows_of, sorted_off


def ragged(name=("affine", 4, 64), counts=RAGGED, width=40, columns=64, **how):
    w = packed(name, len(counts), width, columns=columns, **how)
    return rows_of(sum(counts), columns), w, experts_of(counts)


@needs_kernels
@pytest.mark.parametrize("name", SOME, ids=lambda name: "-".join(map(str, name)))
def test_formats(name):
    """One of each way that weights are expanded; `test_tiles_matmul` has every format in the same tiles."""
    agree(sorted_off, *ragged(name, (3, 0, 14), columns=max(name[2], 64)))


@needs_kernels
@grid(
    1,
    counts=[RAGGED, (100, 1), (0, 1, 100, 0), (1,) * 20, (64, 64), (7,), (8, 8, 8, 9, 15, 17, 16)],
    block=list(tiles.SHAPES),
)
def test_segments(counts, block):
    agree(sorted_off, *ragged(counts=counts), block=block)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_few_rows(rows):
    """Fewer than eight indices lie in constant memory."""
    agree(sorted_off, *ragged(counts=(0, rows - 1, 0, 1), bias=True))


@needs_kernels
@grid(1, width=[1, 33], dtype=[mx.float16, mx.bfloat16])
def test_dtypes_widths_and_a_bias(dtype, width):
    x, w, indices = ragged(("affine", 2, 64), width=width, columns=192, bias=True)
    agree(sorted_off, x.astype(dtype), w, indices, block=64)


@needs_kernels
def test_experts_that_no_row_has_are_not_read():
    x, w, indices = ragged(bias=True)
    absent = mx.array([not n for n in RAGGED])
    words, *beside = w.parts
    gone = tuple(mx.where(absent[:, None, None], mx.nan, part).astype(part.dtype) for part in beside)
    broken = replace(w, parts=(words, *gone), bias=mx.where(absent[:, None], mx.nan, w.bias).astype(w.bias.dtype))
    with running():
        got = np.array(tiles.gather_tiled(x, broken, indices))
        np.testing.assert_array_equal(got, np.array(tiles.gather_tiled(x, w, indices)))
    assert np.isfinite(got).all()


def any_order(tokens=23, each=3, columns=96):
    """Tokens x, experts of theirs in any order, weights of these."""
    w = packed(("q8", 8, 32), 6, 40, columns=columns, bias=True)
    chosen = [np.random.default_rng(i).permutation(6)[:each] for i in range(tokens)]
    return rows_of(tokens, columns), w, mx.array(np.array(chosen).astype(np.uint32))


def unsorted_off(x, w, indices) -> float:
    got = tiles.gather_unsorted(x, w, indices)
    assert got.dtype == x.dtype
    with mx.stream(mx.cpu):
        each = mx.repeat(x[:, None], indices.shape[1], axis=1)
        return distance(got, reference.gather(each.astype(mx.float32), w, indices))


@needs_kernels
@grid(1, sizes=[(23, 3), (40, 1), (2, 3), (1, 6)], dtype=[mx.float32, mx.bfloat16])
def test_experts_in_any_order(sizes, dtype):
    x, w, indices = any_order(*sizes)
    agree(unsorted_off, x.astype(dtype), w, indices)


@needs_kernels
def test_runs_of_experts_need_not_ascend():
    x, w, _ = ragged()
    agree(sorted_off, x, w, mx.array(np.repeat([3, 1, 3, 0, 5], [20, 20, 9, 1, 18]).astype(np.uint32)))


@needs_kernels
def test_rows_and_places_apart():
    x, w, indices = ragged()
    permuted = mx.array(np.random.default_rng(3).permutation(len(x)).astype(np.uint32))
    with running():
        want = np.array(tiles.gather_tiled(x, w, indices))
        from_rows = np.array(tiles.gather_tiled(x[mx.argsort(permuted)], w, indices, rows=permuted))
        placed = np.array(tiles.gather_tiled(x, w, indices, places=permuted))
    np.testing.assert_array_equal(from_rows, want)
    np.testing.assert_array_equal(placed[np.array(permuted)], want)


@needs_simulator
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: o.order)
def test_no_schedule_matters(options):
    agree(sorted_off, *ragged(("lloyd", 3, 64), columns=192, bias=True), block=64, options=options)
