"""`python -m mlx_rotor.evaluate` as a user runs it, on the bundled model."""

import importlib
import json
import re
import subprocess
import sys

import pytest

from mlx_rotor.cli.command import run

evaluate = importlib.import_module("mlx_rotor.evaluate")  # the command; the package has a function of that name

SMALL = [
    *("--windows", "1", "--window", "192", "--needles", "0"),
    *("--chats", "0", "--greedy", "0"),
]
LEAST = ["--windows", "1", "--window", "192", "--needles", "0", "--chats", "0", "--greedy", "0"]


def test_the_default_configurations(tmp_path, capsys):
    out = tmp_path / "table.md"
    assert run(evaluate.main, [*SMALL, "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    exact, packed = data["rows"]
    assert [(r["label"], r["kv"]) for r in data["rows"]] == [("bundled", "exact"), ("bundled", "trellis3")]
    assert 1 < exact["perplexity"]["value"] < 100
    assert 0 < packed["divergence"]["mean"]["value"] < 0.1
    assert abs(packed["change"]["value"]) < 0.1
    assert packed["kv_memory"]["further"] < exact["kv_memory"]["fp16"] / exact["kv_memory"]["tokens"] / 4
    assert packed["kv_memory"]["layers_compressed"] == packed["kv_memory"]["layers_total"] == 8
    table = out.read_text()
    assert "| bundled | trellis3 |" in table and "1 windows × 192 tokens" in table
    assert "bundled, trellis3" in captured.err, "a progress bar names the configuration"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]


def test_a_text_of_ones_own_and_protection(tmp_path, capsys, small):
    text = tmp_path / "mine.py"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 60)
    arguments = ["--model", f"tiny={small}", "--text", str(text), "--windows", "1", "--window", "128"]
    arguments += ["--needles", "2", "--needle-lengths", "160", "--depths", "0.1,0.9", "--chats", "1", "--greedy", "0"]
    assert run(evaluate.main, [*arguments, "--kv", "turbo2", "--kv-sinks", "0", "--kv-ring", "16"]) == 0
    printed = capsys.readouterr().out
    assert "1 windows × 128 tokens of mine.py" in printed and "sinks 0, ring 16" in printed
    assert printed.count("| tiny  | turbo2 |") == 2 and "| tiny  | exact" not in printed
    assert all(f"| {title} " in printed for title in ("recall", "160 @ 10 %", "160 @ 90 %"))


def test_a_table_that_is_kept_and_drawn(tmp_path, capsys, small):
    pytest.importorskip("matplotlib")
    kept, table, drawing = tmp_path / "quality.json", tmp_path / "table.md", tmp_path / "quality.svg"
    arguments = [*LEAST, "--model", str(small), "--kv", "exact", "--kv", "turbo3", "--json-out", str(kept)]
    assert run(evaluate.main, arguments) == 0
    printed = capsys.readouterr().out
    assert json.loads(kept.read_text())["missing"] == []
    assert run(evaluate.main, ["--from-json", str(kept), "--plot", str(drawing), "--out", str(table)]) == 0
    again = capsys.readouterr().out
    assert again == table.read_text()
    # The time is that of the last row there, and of the whole run here.
    assert re.sub(r"; \d+ s\.", "", again) == re.sub(r"; \d+ s\.", "", printed)
    assert "<svg" in drawing.read_text() and "turbo" in drawing.read_text()
    assert run(evaluate.main, [*arguments, "--window", "200"]) == 1
    assert "another window (192, now 200)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kv", "turbo99"], "turbo99"),
        (["--depths", "2"], "--depths 2: a depth is between 0"),
        (["--model", "/nowhere"], "/nowhere: no config.json there"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt: No such file or directory"),
        (["--window", "9000"], "9000 tokens are more than the model's context of 8192"),
        (["--windows", "1000"], "of 512; 1000 asked for"),
        (["--greedy", "1000"], "prompts of 256 tokens; 1000 asked for"),
        (["--json-out", "/nowhere/q.json"], "--json-out /nowhere/q.json: can't write a file there"),
        (["--plot", "/nowhere/q.svg"], "--plot /nowhere/q.svg: can't write a file there"),
        (["--from-json", "x.json", "--kv", "turbo3", "--needles", "0"], "--kv, --needles: nothing is measured with"),
        (["--from-json", "/nowhere.json"], "/nowhere.json: No such file or directory"),
        (["--out", "/nowhere/table.md"], "--out /nowhere/table.md: can't write a file there"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert run(evaluate.main, arguments) == 1
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert captured.out == "" and says in last and "error: " in last


def test_help_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "mlx_rotor.evaluate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--needle-lengths" in done.stdout
