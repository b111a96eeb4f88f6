"""Mistakes planted in the tiled kernels one at a time: simulator or reference must object."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import barriers, distance, mutated, needs_simulator, objections
from mlx_rotor.kernels.experts import reference, tiles
from tile_cases import dense_off, experts_of, packed, rows_of, sorted_off

pytestmark = needs_simulator
COUNTS = (1, 38, 24, 0, 5, 1)
NAME, COLUMNS, WIDTH = ("q8", 8, 32), 160, 43


def dense():
    return dense_off(rows_of(89, COLUMNS), packed(NAME, WIDTH, columns=COLUMNS, bias=True), block=64)


def gathered():
    w = packed(NAME, len(COUNTS), WIDTH, columns=COLUMNS, bias=True)
    return sorted_off(rows_of(sum(COUNTS), COLUMNS), w, experts_of(COUNTS), block=64)


def unsorted():
    tokens, each = 23, 3
    w = packed(NAME, each, WIDTH, columns=COLUMNS)
    x = rows_of(tokens, COLUMNS)
    indices = mx.array(np.array([np.random.default_rng(i).permutation(each) for i in range(tokens)]).astype(np.uint32))
    want = reference.gather(mx.repeat(x[:, None], each, axis=1), w, indices)
    return distance(tiles.gather_unsorted(x, w, indices), want)


def test_nothing_is_wrong_without_a_mistake():
    assert objections(dense) == []
    assert objections(gathered) == []
    assert objections(unsorted) == []


@pytest.mark.parametrize(("path", "call", "at"), barriers("experts/tile.h"), ids=lambda x: str(x)[:24])
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(dense)


@pytest.mark.parametrize(
    ("path", "old", "new", "at"),
    [
        ("experts/tile.h", "slot % 8 / 2", "slot % 4", 0),
        ("experts/tile.h", "2 * (slot / 8)", "2 * (slot / 4)", 0),
        ("experts/tile.h", "8 * (r / 2) + r % 2", "4 * r", 0),
        ("experts/tile.h", "+ 4 * column;", "+ 2 * column;", 0),
        ("experts/tile.h", "+ row;", "+ column;", 0),
        ("experts/tile.h", "first < end ? 1 : 0", "first + 8 < end ? 1 : 0", 0),
        ("experts/tile.h", "min(first + row, end - 1)", "first + row", 0),
        ("experts/tile.h", "simdgroup_float8x8(0.0f)", "simdgroup_float8x8(1.0f)", 0),
        ("experts/tile.h", "if (mine < columns)", "if (true)", 0),
        ("experts/tile.h", "min(columns - k, uint(MLX_ROTOR_TILE_STEP)) / 32", "MLX_ROTOR_TILE_STEP / 32", 0),
        ("experts/tile.h", "thread_index % 4 * 32", "thread_index % 4 * 16", 0),
        ("experts/tile.h", "if (r < end)", "if (r <= end)", 0),
        ("experts/tile.h", "n + EACH <= width", "n < width", 0),
        ("experts/tile.h", "if (n + i < width)", "if (n + i <= width)", 0),
        ("experts/tile.h", "if (n + i < width)", "if (n + i + 1 < width)", 0),
        ("experts/tile.h", "n + i < width ?", "n + i + 1 < width ?", 0),
        ("experts/tile.h", "ROOM 34", "ROOM 31", 0),
        ("experts/matmul.h", ", width - 1)", ", width)", 0),
        ("experts/matmul.h", "min(begin + P::ROWS, rows)", "begin + P::ROWS", 0),
        ("experts/gather.h", ", width - 1)", ", width)", 0),
        ("experts/gather.h", "min((group.y + 1) * P::ROWS, rows)", "(group.y + 1) * P::ROWS", 0),
        ("experts/gather.h", "r = begin + lane; r < last", "r = begin + lane; r + 1 < last", 0),
        ("experts/gather.h", "r += 32", "r += 64", 0),
        ("experts/gather.h", "simd_min(end)", "end", 0),
        ("experts/gather.h", "bias, base)", "bias, 0)", 0),
    ],
)
def test_a_loose_bound_or_a_wrong_operation_is_seen(path, old, new, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, old, new, at):
        assert objections(gathered if path == "experts/gather.h" else dense)


@pytest.mark.parametrize(
    ("old", "new"), [("from[min(first + row, end - 1)]", "min(first + row, end - 1)"), ("places[r]", "r")]
)
def test_a_row_in_the_wrong_place_is_seen(old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, "experts/tile.h", old, new):
        assert objections(unsorted)
