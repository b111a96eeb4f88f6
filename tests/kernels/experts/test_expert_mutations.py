"""Mistakes planted one at a time in the kernels for few rows: simulator or reference must object."""

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import down_off, gate_up_off, matmul_off, normal, weights
from kernel_cases import barriers, mutated, needs_simulator, objections

pytestmark = needs_simulator
INDICES = mx.array([[5, 1, 3], [1, 5, 0]], mx.uint32)


def into_experts():
    """Rows that are no whole sets, several blocks a lane, codes staged and not."""
    gate, up = (
        weights(name, (7, 37), 768, bias=True, seed=seed)
        for seed, name in enumerate([("affine", 3, 64), ("affine", 2, 64)])
    )
    return gate_up_off(0.2 * normal(2, 768), gate, up, INDICES, "gpt_oss")


def with_tables():
    return matmul_off(normal(1, 768), weights(("lloyd", 2, 256), (37,), 768))


def out_of_experts():
    shares = mx.array(np.random.default_rng(1).random((2, 3)).astype(np.float32))
    return down_off(normal(2, 3, 512), weights(("affine", 3, 64), (7, 37), 512, bias=True), INDICES, shares)


def in_pieces():
    """Panels, the last of them shorter."""
    return matmul_off(normal(8, 896), weights(("lloyd", 3, 128), (37,), 896, bias=True))


def in_halves():
    """8-bit codes, the last blocks of a row an odd number."""
    return matmul_off(normal(1, 1056), weights(("q8", 8, 32), (5,), 1056))


RUNS = {
    "gate_up": into_experts,
    "tables": with_tables,
    "down": out_of_experts,
    "matvec": in_pieces,
    "halves": in_halves,
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_wrong_without_a_mistake(name):
    assert objections(RUNS[name]) == []


@pytest.mark.parametrize(
    ("path", "call", "at"),
    barriers("experts/gate_up.h", "experts/down.h", "experts/matvec.h"),
    ids=lambda x: str(x)[:24],
)
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    run = RUNS[path.split("/")[1].removesuffix(".h")]
    if path == "experts/gate_up.h" and (call, at) == ("threadgroup_barrier(mem_flags::mem_threadgroup);", 0):
        run = many_columns
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(run)


def many_columns():
    """gate_up in panels."""
    gate, up = (weights(("affine", 4, 32), (2, 5), 7936, seed=seed) for seed in (1, 2))
    return gate_up_off(normal(1, 7936), gate, up, mx.array([[1]], mx.uint32))


@pytest.mark.parametrize("at", [0, 1])
def test_a_missing_barrier_around_tables_is_seen(at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, "experts/walk.h", "simdgroup_barrier(mem_flags::mem_threadgroup);", "", at):
        assert objections(with_tables)


@pytest.mark.parametrize(
    ("run", "path", "old", "new", "at"),
    [
        ("down", "walk", "own + i < count", "own + i <= count", 0),
        ("down", "walk", "own + i < count", "own + i + 1 < count", 0),
        ("down", "walk", "lane - (at & 31u)", "lane + (at & 31u)", 0),
        ("down", "walk", "own < rows", "own <= rows", 0),
        ("matvec", "walk", "block + i * LANES < columns / 32", "block + i * LANES <= columns / 32", 0),
        ("matvec", "walk", "W::first_count(start)", "0", 0),
        ("matvec", "walk", "start / 32 * BITS, each", "0, each", 0),
        ("gate_up", "walk", "ROWS * FIRST + own * SECOND", "own * SECOND", 0),
        ("gate_up", "walk", "codes_at = row * ROW_WORDS", "codes_at = 0", 0),
        ("gate_up", "walk", "set * (ROWS * ROW_WORDS)", "0", 0),
        ("gate_up", "walk", "const float sum = simd_sum(value)", "const float sum = value", 0),
        ("gate_up", "walk", "low = fma(n[e], x[e], low)", "low = fma(n[e], x[e - 1], low)", 0),
        ("gate_up", "walk", "distance < LANES", "distance < LANES / 2", 0),
        ("gate_up", "gate_up", "set < L::SETS && row < L::N", "set < L::SETS && row <= L::N", 0),
        ("gate_up", "gate_up", "uint(indices[chosen]) * L::N", "group.y * L::N", 0),
        ("gate_up", "gate_up", "x + group.z * L::COLUMNS", "x", 0),
        ("gate_up", "gate_up", "float(up_bias[before + row])", "float(up_bias[row])", 0),
        ("gate_up", "activation", "-7.0f, 7.0f) + 1.0f", "-7.0f, 7.0f)", 0),
        ("gate_up", "activation", "fmin(gate, 7.0f)", "fmin(gate, 9.0f)", 0),
        ("down", "down", "fma(share, sum_of_expert, sums[s])", "sum_of_expert + sums[s]", 0),
        ("down", "down", "fma(share, float(bias[before + kept]), added)", "added", 0),
        ("down", "down", "slot < end", "slot + 1 < end", 0),
        ("down", "down", "set < L::SETS && kept < L::N", "set < L::SETS && kept <= L::N", 0),
        ("matvec", "matvec", "staged + t * room, i", "staged, i", 0),
        ("tables", "walk", "lane * 32 / W::GROUP * W::TABLE", "0", 0),
        ("down", "down", "slot + lane < end", "slot + lane <= end", 0),
        ("down", "down", "(slot - begin) % 32))", "slot % 2))", 0),
        ("matvec", "matvec", "float(bias[kept])", "float(bias[0])", 0),
        ("halves", "walk", "min(LANES, columns / 32 - i * LANES)", "LANES", 0),
        ("halves", "walk", "MLX_ROTOR_BLOCK_SUM + high / 16 % 2", "MLX_ROTOR_BLOCK_SUM", 0),
        ("halves", "walk", "apart(i, columns) / 4, word", "16, word", 0),
        ("halves", "walk", "low % 32, x, 0", "0, x, 0", 0),
        ("halves", "walk", "own_first + other * first_each", "own_first + one * first_each", 0),
    ],
)  # fmt: skip
def test_a_loose_bound_or_a_wrong_operation_is_seen(run, path, old, new, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, f"experts/{path}.h", old, new, at):
        assert objections(RUNS[run])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (("lloyd", 3, 256), "mask << 18", "mask << 17"),
        (("lloyd", 3, 256), "? 10 : 13", "? 11 : 13"),
        (("lloyd", 3, 256), "(c >> 16) & 63u", "(c >> 16) & 31u"),
        (("lloyd", 3, 256), "n[(code + 1) % 32]", "n[code]"),
        (("lloyd", 3, 64), "? 10 : 13", "? 10 : 12"),
        (("lloyd", 3, 64), "two<25>(e >> 11", "two<25>(e >> 8"),
        (("lloyd", 3, 64), "(e >> 23) & 7u", "(e >> 20) & 7u"),
        (("lloyd", 4, 64), "32 * i + 16 + at", "32 * i + at"),
        (("iq4_nl", 4, 32), "at += WIDTH", "at += 2 * WIDTH"),
    ],
)
def test_a_wrong_place_in_a_table_is_seen(name, old, new, monkeypatch, tmp_path):
    def run():
        return matmul_off(normal(1, 512), weights(name, (2,), 512))

    assert objections(run) == []
    with mutated(monkeypatch, tmp_path, "weight/lookup.h", old, new):
        assert objections(run)
