"""The tables that `python -m tests.metal_sim.bench` prints, and what it says when it can't."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import metal_sim
from metal_sim import tools
from metal_sim.bench import __main__ as bench
from metal_sim.bench import expert_traffic
from mlx_rotor.diagnose.expert_speed import Dims
from mlx_rotor.errors import RotorError

pytestmark = pytest.mark.skipif(not metal_sim.SUPPORTED, reason=metal_sim.UNSUPPORTED)
SMALL = Dims("small", 512, 512, 16, 4)
MIXED = (("affine", 2, 64), ("affine", 2, 64), ("affine", 3, 64))


def test_it_runs_from_a_clone():
    command = [sys.executable, "-m", "tests.metal_sim.bench", "--schemes", "exact", "--part", "attention"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: exact: nothing is packed"), done.stderr


@pytest.mark.nightly
def test_the_table_of_experts(monkeypatch, capsys):
    monkeypatch.setattr(expert_traffic, "TRIPLES", {SMALL: (MIXED, (("lloyd", 2, 64),) * 3)})
    assert bench.main(["--part", "experts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "rows" not in found and found["stock_launches"]["GatherQMM"] == 3
    kernels = [(row["kernel"], row["weights"].partition("+")[0]) for row in found["experts"]]
    names = ["gate_up", "down", "layer"]
    assert kernels == [
        *((name, "affine2:64") for name in [*names, "MLX gather_qmv"]),
        *((name, "lloyd2:64") for name in names),
    ]
    assert bench.main(["--part", "experts"]) == 0
    printed = capsys.readouterr().out
    assert "no measurement" in printed and "3 GatherQMM" in printed and "M4 Max µs" in printed


@pytest.mark.nightly
def test_the_table_of_attention(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ENCODED", ("turbo2",))
    small = ["--tokens", "256", "--heads", "8", "--part", "attention"]
    assert bench.main(["--schemes", "turbo4v2", *small, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["kernel"] for row in rows} == {"decode", "sdpa_vector", "encode"}
    ours = next(row for row in rows if row["kernel"] == "decode")
    assert ours["codec"] == "turbo4/turbo2" and ours["tokens"] == 256
    assert ours["bytes_ratio"] == pytest.approx(ours["moved"] / ours["needed"])
    assert 0 < ours["line_use"] <= 1 and all(t > 0 for t in ours["predicted"].values())
    # One query head a KV head: an FMA for its score, one for its output, and those of two levels.
    assert 4 < ours["operations"]["fma"] < 8
    assert bench.main(["--schemes", "turbo4v2", *small]) == 0
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
        bench.main(argv)


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    def missing():
        raise tools.ToolsMissing("pip install ziglang")

    monkeypatch.setattr(tools, "clang", missing)
    with pytest.raises(RotorError, match="pip install ziglang"):
        bench.main([])
