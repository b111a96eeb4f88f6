"""Policies and fits side by side: rows that a file keeps, as a table and as a drawing."""

import json
import re
from dataclasses import replace

import pytest

from mlx_rotor import benchmark
from mlx_rotor.bench import weights
from mlx_rotor.bench.weights import Table, Way
from mlx_rotor.bundled import MODEL
from mlx_rotor.cli.command import run
from mlx_rotor.errors import RotorError
from mlx_rotor.quality.sample import Size, bundled
from mlx_rotor.quant.spec import BUNDLED

SIZE = Size(2, 16, needles=0, lengths=(), depths=(), chats=0)
WAYS = [Way("uniform-4bit", "fast"), Way("rotor", "fast", "uniform-4bit"), Way("rotor", "fast", "uniform-2bit")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    done = []
    table, impossible = weights.measure_policies(
        MODEL, WAYS, bundled(), SIZE, file, row_done=lambda: done.append(len(file.read_text()) if file.exists() else 0)
    )
    return file, table, impossible, done


def test_rows_are_kept_as_they_come_and_impossible_sizes_told(measured):
    file, table, impossible, done = measured
    assert list(table.rows) == WAYS[:2] and done[0] < done[1] == done[2]
    (line,) = impossible
    assert re.match(r"rotor at uniform-2bit's size, fast: \d\.\d+ MB is too small: policy rotor needs 4\.307 MB", line)
    plain, solved = table.rows.values()
    assert (plain.name, solved.name) == ("uniform-4bit", "rotor at uniform-4bit's size")
    assert 0.98 * plain.nbytes < solved.nbytes <= plain.nbytes
    for row in (plain, solved):
        assert [q.domain for q in row.quality] == ["code", "prose"] and row.fit == "fast" and not row.calibrated
    assert weights.read(file) == table


def test_what_a_file_has_is_not_measured_again(measured, monkeypatch):
    file, table, _, _ = measured
    monkeypatch.setattr(weights, "SourceReference", None)
    before, done = file.read_bytes(), []
    again, impossible = weights.measure_policies(
        MODEL, WAYS[:2], bundled(), SIZE, file, row_done=lambda: done.append(1)
    )
    assert again == table and impossible == [] and len(done) == 2 and file.read_bytes() == before


def test_a_file_of_something_else_is_refused(measured, tmp_path, monkeypatch):
    file, table, _, _ = measured
    monkeypatch.setattr(weights, "SourceReference", None)
    with pytest.raises(RotorError, match="holds rows of another size"):
        weights.measure_policies(MODEL, WAYS, bundled(), replace(SIZE, windows=3), file)
    with pytest.raises(RotorError, match="holds rows of another texts"):
        weights.measure_policies(MODEL, WAYS, bundled()[:1], SIZE, file)
    moved = tmp_path / "moved.json"
    replace(table, machine={**table.machine, "mlx": "0"}).write(moved)
    with pytest.raises(RotorError, match="holds rows of another machine"):
        weights.measure_policies(MODEL, WAYS, bundled(), SIZE, moved)
    replace(table, machine={**table.machine, "date": "2000-01-01"}).write(moved)
    assert weights.measure_policies(MODEL, WAYS[:2], bundled(), SIZE, moved)[0].rows == table.rows
    other = tmp_path / "model"
    with pytest.raises(RotorError, match="holds rows of another source"):
        weights.measure_policies(other / "b", WAYS, bundled(), SIZE, file)
    for content in ("", "[]", '{"format": "x"}', json.dumps(table.facts() | {"version": 99})):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(RotorError, match=r"odd\.json: not a file of weight quality"):
            weights.read(tmp_path / "odd.json")


def test_ways_are_policies_by_methods_and_the_solved_one_at_each_size():
    found = weights.ways(["config-i"], ["fast", "calibrated"])
    assert found == [
        Way("config-i", "fast"),
        Way("rotor", "fast", "config-i"),
        Way("config-i", "calibrated"),
        Way("rotor", "calibrated", "config-i"),
    ]
    recipe = found[3].recipe(MODEL, "s.json")
    assert recipe.fit == "search" and recipe.calibration == BUNDLED and recipe.sensitivities == "s.json"
    assert recipe.budget.nbytes == found[1].recipe(MODEL, "s.json").budget.nbytes > 8_214_000
    assert found[1].recipe(MODEL, "s.json").sensitivities is None


def test_the_table_and_the_drawing_are_the_same_every_time(measured):
    file, table, _, _ = measured
    text = weights.markdown(table)
    lines = text.splitlines()
    assert lines[0] == "| policy | MB | bits a weight | KL, code: fast | KL, prose: fast |"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| uniform-4bit", "| rotor at uniform-4bit's size"]
    row = table.rows[WAYS[0]]
    cells = lines[2].split(" | ")
    assert cells[1] == f"{row.nbytes / 1e6:.2f}"
    assert float(cells[3].split()[0]) == pytest.approx(row.quality[0].divergence.mean.value, rel=0.01)
    assert lines[5].startswith("| policy | fit | bytes | KL, code | same top-1, code | perplexity, code | KL, prose |")
    assert f"{row.nbytes:,}" in lines[7] and len(lines) == 13 and "2 windows of 16 tokens" in text
    pytest.importorskip("matplotlib")
    drawn = weights.drawing(table)
    assert drawn == weights.drawing(weights.read(file)) and text == weights.markdown(weights.read(file))
    assert drawn.startswith("<?xml") and "uniform-4bit" in drawn and "solved, fast" in drawn
    with pytest.raises(RotorError, match="no row was measured"):
        weights.drawing(Table(table.source, table.texts, table.size, table.machine, {}))


def test_as_a_command(measured, tmp_path, capsys):
    file = measured[0]
    flags = ["weights", "--policies", "uniform-4bit", "--fits", "fast", "--windows", "2", "--window", "16"]
    flags += ["--json-out", str(file)]
    assert run(benchmark.main, [*flags, "--plot", str(tmp_path / "kl.svg")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n| ") >= 2 and (tmp_path / "kl.svg").read_text().startswith("<?xml")
    assert run(benchmark.main, [*flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["way"]["policy"] for row in told["rows"]] == ["uniform-4bit", "rotor"] and told["left_out"] == []
    assert run(benchmark.main, [*flags, "--fits", "slow"]) == 1
    assert "--fits slow: there is fast, search, calibrated" in capsys.readouterr().err
    assert run(benchmark.main, [*flags, "--policies", "nope"]) == 1
    assert "unknown policy 'nope'" in capsys.readouterr().err
    assert run(benchmark.main, [*flags, "--json-out", str(tmp_path / "none" / "rows.json")]) == 1
    assert "can't write a file there" in capsys.readouterr().err
