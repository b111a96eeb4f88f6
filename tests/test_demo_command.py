"""The main job, as one command, on the bundled model."""

import importlib
import json

import pytest
from mlx_lm import generate, load

from mlx_rotor.cli import command

demo = importlib.import_module("mlx_rotor.demo")
SHORT = ["--prompt-tokens", "300", "--max-tokens", "4", "--skip-evaluate"]


def call(*argv):
    return command.run(demo.main, [str(a) for a in argv])


def test_it_quantizes_generates_and_keeps_what_was_asked(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MODEL", small)
    assert call(*SHORT, "--out", tmp_path / "q", "--json", "--policy", "uniform-4bit", "--kv", "turbo3") == 0
    got = json.loads(capsys.readouterr().out)
    exact, packed = got["runs"]
    assert (exact["kv_scheme"], packed["kv_scheme"]) == ("exact", "turbo3")
    assert packed["kv_bytes"] < exact["kv_bytes"] and packed["layers_compressed"] == 2
    assert exact["prompt_tokens"] == packed["prompt_tokens"] == 300
    assert got["bytes"] < got["source_bytes"] and got["evaluate"] is None
    model, tokenizer = load(str(tmp_path / "q"))
    assert generate(model, tokenizer, "import os\n", max_tokens=4)


def test_people_see_the_three_parts(capsys, monkeypatch):
    evaluated = []

    class Report:
        def markdown(self):
            return "the table"

        def to_dict(self):
            return {}

    monkeypatch.setattr(
        "mlx_rotor.quality.compare.compare", lambda models, kv, **_: evaluated.append((models, kv)) or Report()
    )
    assert call("--prompt-tokens", "200", "--max-tokens", "2") == 0
    out = capsys.readouterr().out
    for part in ("1. Quantize", "11.63 MB -> 8.21 MB", "2. Generate", "K trellis3", "3. What it cost", "the table"):
        assert part in out, part
    assert evaluated[0][1] == ["exact", "trellis3"] and len(evaluated[0][0]) == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv", "exact"], "nothing to show"),
        (["--kv", "nope"], "turbo4v2"),
        (["--policy", "nope"], "config-i"),
        (["--prompt-tokens", "3"], "--prompt-tokens"),
        (["--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_mistakes_are_one_line(argv, says, capsys):
    assert call(*argv) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and says in err
