"""A comparison that is interrupted goes on from its file, and only where the file is about the same."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_rotor.bundled import held_out_text
from mlx_rotor.errors import RotorError
from mlx_rotor.quality import compare as module
from mlx_rotor.quality import record
from mlx_rotor.quality.compare import compare
from mlx_rotor.quality.sample import Size

SIZE = Size(windows=2, window=160, needles=1, lengths=(160,), depths=(0.1,), chats=0, greedy=0)
KEPT = {"sinks": 0, "ring": 32, "protect_layers": 0}
SCHEMES = ("exact", "turbo2", "turbo4")
TEXT = held_out_text()[:6000]


class Stop(Exception):
    pass


@pytest.fixture
def counted(monkeypatch):
    """Schemes whose windows were read, in order; `counted.stop` is one to be interrupted at."""

    class Ran(list):
        stop = None

    ran = Ran()
    predictions = module.score.predictions

    def watched(model, caches, sample, chunk):
        if caches._kv == ran.stop:
            raise Stop
        ran.append(caches._kv)
        return predictions(model, caches, sample, chunk)

    monkeypatch.setattr(module.score, "predictions", watched)
    return ran


def measure(folder, file, schemes=SCHEMES, size=SIZE, text=TEXT, protection=KEPT, **more):
    return compare([f"m={folder}"], schemes, size=size, protection=protection, file=file, text=text, **more)


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):
    """(report, its file) of all three schemes."""
    file = tmp_path_factory.mktemp("whole") / "table.json"
    return measure(checkpoints["a"], file), file


def figures(report):
    return [(r.label, r.kv, r.perplexity, r.change, r.divergence, r.needles, r.footprint) for r in report.rows]


def test_an_interrupted_table_goes_on(checkpoints, tmp_path, counted, whole):
    file, (whole, _) = tmp_path / "table.json", whole
    counted.stop = "turbo4"
    with pytest.raises(Stop):
        measure(checkpoints["a"], file)
    held = json.loads(file.read_text())
    assert [r["kv"] for r in held["rows"]] == ["exact", "turbo2"] and held["missing"] == ["m turbo4"]
    assert "Not measured yet: m turbo4." in record.read(file).markdown()
    counted.clear()
    counted.stop = None
    resumed = measure(checkpoints["a"], file)
    assert counted == ["exact", "turbo4"], "the reference's windows again, and the row that is missing"
    assert figures(resumed) == figures(whole) and resumed.conditions == whole.conditions and resumed.missing == ()
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    counted.clear()
    assert figures(measure(checkpoints["a"], file)) == figures(whole) and counted == []


def test_reading_gives_what_was_written(checkpoints, tmp_path):
    file = tmp_path / "table.json"
    report = measure(checkpoints["a"], file, SCHEMES[:2], SIZE.with_(greedy=1))
    read = record.read(file)
    assert read.rows == report.rows and read.conditions == report.conditions
    assert read.rows[1].greedy is not None
    again = read.markdown().splitlines()
    assert again[:-1] == report.markdown().splitlines()[:-1], "all but the line with the seconds"


def test_rows_that_are_not_asked_for_stay(checkpoints, tmp_path, whole):
    file = Path(shutil.copy(whole[1], tmp_path))
    report = measure(checkpoints["a"], file, ("turbo3",))
    assert [r.kv for r in report.rows] == ["turbo3"]
    assert [r["kv"] for r in json.loads(file.read_text())["rows"]] == ["turbo3", *SCHEMES]


def test_other_conditions_are_refused(checkpoints, tmp_path, whole):
    file = Path(shutil.copy(whole[1], tmp_path))
    before = file.read_text()
    with pytest.raises(RotorError, match=r"rows measured with another windows \(2, now 3\)"):
        measure(checkpoints["a"], file, size=SIZE.with_(windows=3))
    with pytest.raises(RotorError, match="another text"):
        measure(checkpoints["a"], file, text="def f(): pass\n" * 400)
    with pytest.raises(RotorError, match="another reference path"):
        measure(checkpoints["b"], file)
    with pytest.raises(RotorError, match="another protection"):
        measure(checkpoints["a"], file, ("turbo2",), protection=None)
    data = json.loads(before)
    data["machine"]["mlx"] = "0.0.1"
    file.write_text(json.dumps(data))
    with pytest.raises(RotorError, match=r"another mlx \('0.0.1', now"):
        measure(checkpoints["a"], file, ("turbo2",))


def test_a_changed_model_is_measured_again(checkpoints, tmp_path, counted):
    file, folder = tmp_path / "table.json", tmp_path / "model"
    shutil.copytree(checkpoints["a"], folder)
    measure(folder, file, ("turbo2",), against=str(checkpoints["b"]))
    counted.clear()
    measure(folder, file, ("turbo2",), against=str(checkpoints["b"]))
    assert counted == []
    shutil.copy(checkpoints["b"] / "model.safetensors", folder)
    measure(folder, file, ("turbo2",), against=str(checkpoints["b"]))
    assert counted == ["exact", "turbo2"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a JSON file"),
        ('{"rows": []}', "not written by this version"),
        ('{"format": "mlx_rotor evaluation", "version": 1, "basis": {}}', "damaged"),
    ],
)
def test_what_is_no_record(tmp_path, text, says):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(RotorError, match=says):
        record.read(file)
    with pytest.raises(RotorError, match="No such file"):
        record.read(tmp_path / "none.json")
