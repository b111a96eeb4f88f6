"""What decode attention moves, against the bytes that must move, and MLX's own attention in the same harness."""

import json

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import needs_simulator
from metal_sim import tools
from mlx_rotor import RotorError, benchmark
from mlx_rotor.bench import kernel_traffic as traffic
from mlx_rotor.kernels import metal

pytestmark = needs_simulator
PAIRS = [
    ("turbo4", "turbo2"),
    ("turbo2", "turbo2"),
    ("trellis3", "trellis3"),
    ("trellis4", "trellis2"),
    ("iso2", "iso2"),
]


@pytest.mark.parametrize(("tokens", "most"), [(4096, 1.20), (16384, 1.10)])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_decode_moves_little_more_than_it_must(pair, tokens, most):
    """One of the eight KV heads with its four query heads: the others move the same."""
    row = traffic.decode(pair, tokens, heads=4, kv_heads=1, model=False)
    assert row.needed < row.moved <= most * row.needed
    assert row.line_use >= 0.9
    assert row.launches == 2


@pytest.mark.parametrize("pair", [("turbo4", "turbo2"), ("trellis3", "trellis3")], ids="-".join)
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_means_cost_little_more_than_their_bytes(tokens, pair):
    bare, centred = (traffic.decode(pair, tokens, heads=4, kv_heads=1, model=False, span=span) for span in (None, 256))
    assert centred.needed == bare.needed + 256 * (tokens // 256 + 1)
    assert centred.bytes_ratio <= 1.005 * bare.bytes_ratio and centred.line_use >= 0.9
    assert centred.launches == 2


def test_segments_move_no_more_than_one_body():
    one, four = (traffic.decode(PAIRS[0], 8192, heads=4, kv_heads=1, model=False, segments=n) for n in (1, 4))
    assert four.needed == one.needed and four.moved <= 1.01 * one.moved
    assert four.launches == 5


def test_eight_heads_move_eight_times_one_heads_bytes():
    one, eight = (traffic.decode(PAIRS[0], 512, heads=4 * n, kv_heads=n, model=False) for n in (1, 8))
    assert (eight.moved, eight.needed) == (8 * one.moved, 8 * one.needed)


def test_mlx_reads_each_key_once_per_query_head():
    row = traffic.stock(2048, heads=4, kv_heads=1, model=False)
    assert 3.9 < row.bytes_ratio < 4.1


def test_a_kernel_that_reads_twice_is_seen():
    with traffic.counted("count") as tally:
        double = metal.kernel(
            "twice", (), ("x",), ("y",), "uint i = thread_position_in_grid.x; y[i] = x[i] + x[(i + 1) % 64];"
        )
        double(
            inputs=[mx.array(np.arange(64, dtype=np.float32))],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )
    assert tally.moved == 3 * 256
    assert tally.line_use < 1


def test_the_command(capsys):
    small = ["--tokens", "256", "--heads", "8", "--part", "attention"]
    assert benchmark.main(["kernels", "--schemes", "turbo4v2", *small, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["kernel"] for row in rows} == {"decode", "sdpa_vector", "encode"}
    ours = next(row for row in rows if row["kernel"] == "decode")
    assert ours["codec"] == "turbo4/turbo2" and ours["tokens"] == 256
    assert ours["bytes_ratio"] == pytest.approx(ours["moved"] / ours["needed"])
    assert 0 < ours["line_use"] <= 1 and all(t > 0 for t in ours["predicted"].values())
    # One query head a KV head: an FMA for its score, one for its output, and those of two levels.
    assert 4 < ours["operations"]["fma"] < 8
    assert benchmark.main(["kernels", "--schemes", "trellis3", *small]) == 0
    printed = capsys.readouterr().out
    assert "No measurement" in printed and "threadgroup" in printed


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--heads", "12"], "multiple of 8"),
        (["--schemes", "exact"], "nothing is packed"),
    ],
)
def test_wrong_arguments(argv, says):
    with pytest.raises(RotorError, match=says):
        benchmark.main(["kernels", *argv])


def test_without_a_source_tree_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(traffic, "TESTS", tmp_path)
    with pytest.raises(RotorError, match="clone the repository"):
        benchmark.main(["kernels"])


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    def missing():
        raise tools.ToolsMissing("pip install ziglang")

    monkeypatch.setattr(tools, "clang", missing)
    with pytest.raises(RotorError, match="pip install ziglang"):
        benchmark.main(["kernels"])
