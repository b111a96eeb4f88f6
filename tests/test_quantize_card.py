"""`mlx_rotor quantize` from a checkpoint, here or on a hub, to a card, here or on a hub; and its checker."""

import importlib
import json
import re
import sys
from pathlib import Path

import huggingface_hub
import mlx_lm
import pytest
from huggingface_hub import ModelCard
from huggingface_hub import constants as hub_constants

import small_checkpoint
from mlx_rotor.bundled import held_out_prose, held_out_text
from mlx_rotor.cli import command
from mlx_rotor.quality.card import pm
from mlx_rotor.quality.metrics import Estimate

sys.path += [str(Path(__file__).parent / "quant"), str(Path(__file__).parent / "quant" / "job")]
from fake_hub import FakeHub
from upload_hub import UploadHub

quantize = importlib.import_module("mlx_rotor.quantize")  # the command; the package has a function of that name


def run(*argv):
    return command.run(quantize.main, [str(a) for a in argv])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = small_checkpoint.write(tmp_path_factory.mktemp("small") / "source")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# source\n")
    return folder


@pytest.fixture
def texts(tmp_path):
    flags = []
    for name, text in (("code", held_out_text()), ("prose", held_out_prose())):
        (tmp_path / f"{name}.txt").write_text(text[20_000:23_400])
        flags += ["--text", f"{name}={tmp_path / name}.txt"]
    return flags


@pytest.fixture
def uploads(monkeypatch):
    hub = UploadHub()
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    yield hub
    hub.close()


@pytest.fixture
def downloads(small, tmp_path, monkeypatch):
    hub = FakeHub(small)
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def test_from_an_fp8_folder_to_a_published_card_in_one_command(small, tmp_path, texts, uploads, capsys):
    out = tmp_path / "out"
    flags = ["--model", small, "--target-bpw", 5, "--out", out, "--fit", "fast", "--card", *texts]
    assert run(*flags, "--upload-repo", "org/small-5bit") == 0
    printed = capsys.readouterr().out
    assert f"card    {out / 'README.md'}" in printed and f"online  {uploads.url}/org/small-5bit" in printed
    files = uploads.files["org/small-5bit"]
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    card, made = files["README.md"].decode(), json.loads(files["mlx_rotor.json"])
    assert ModelCard(card).data.license == "mit" and card.count("org/small-5bit") >= 4
    assert f"{made['total_size'] / 1e9:.6f} GB = " in card and "policy `rotor`" in card
    assert "513,285 bytes of weight files, by sensitivities: prior" in card
    measured = made["evaluation"]
    assert [q["domain"] for q in measured["row"]["quality"]] == ["code", "prose"]
    assert [row["name"] for row in measured["others"]] == ["config-i", "jang-k"]
    for row in (measured["row"], *measured["others"]):
        for quality in row["quality"]:
            mean = Estimate(**quality["divergence"]["mean"])
            assert mean.value > 0 and f"| {pm(mean)} |" in card
    assert run(*flags, "--upload-repo", "org/small-5bit") == 1
    assert f"--out {out} holds a checkpoint already" in capsys.readouterr().err
    assert mlx_lm.load(str(out))


def test_a_card_and_an_upload_can_be_made_later(small, tmp_path, texts, uploads, capsys):
    out = tmp_path / "out"
    flags = ["--model", small, "--policy", "uniform-4bit", "--out", out, "--fit", "fast"]
    assert run(*flags) == 0
    weights = (out / "model.safetensors").read_bytes()
    more = ["--resume", "--card", *texts, "--baseline", "none", "--json"]
    capsys.readouterr()
    assert run(*flags, *more) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["evaluation"]["others"] == [] and told["files"] == ["model.safetensors"]
    assert "## Other policies by the same tool\n\nNot measured." in (out / "README.md").read_text()
    assert (out / "model.safetensors").read_bytes() == weights
    assert run(*flags, "--resume", "--upload-repo", "org/later") == 0
    assert "## Quality against the source\n\n| text" in uploads.files["org/later"]["README.md"].decode()
    for other, what in (
        (["--policy", "uniform-5bit"], "policy"),
        (["--fit", "search"], "fit"),
        (["--target-bpw", "6"], "size"),
    ):
        capsys.readouterr()
        changed = [flag for flag in flags if other[0] != "--fit" or flag not in ("--fit", "fast")]
        assert run(*changed, *other, "--resume", "--card") == 1
        assert f"holds a checkpoint of another {what}; give the flags it was made with" in capsys.readouterr().err


def test_a_mistake_about_the_hub_shows_before_the_work(small, tmp_path, uploads, capsys, monkeypatch):
    out, flags = tmp_path / "out", ["--model", small, "--out", tmp_path / "out", "--upload-repo"]
    uploads.refuse = 403
    assert run(*flags, "org/other") == 1
    assert "--upload-repo org/other: the token may not write there" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run(*flags, "org/other") == 1
    assert "no Hugging Face token here; run `hf auth login`" in capsys.readouterr().err
    assert not out.exists() and not uploads.commits


def test_a_repository_fetched_file_by_file_or_whole_gives_what_its_folder_gives(small, tmp_path, downloads, capsys):
    flags = ["--policy", "uniform-4bit", "--fit", "fast"]
    assert run("--model", small, *flags, "--out", tmp_path / "local") == 0
    assert run("--model", "org/model", *flags, "--out", tmp_path / "streamed", "--stream-source", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert sum(line["event"] == "fetched" for line in lines) == 3
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert run("--model", "org/model", *flags, "--out", tmp_path / "whole") == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        found = {(tmp_path / how / name).read_bytes() for how in ("local", "streamed", "whole")}
        assert len(found) == 1, name
    assert json.loads((tmp_path / "whole" / "mlx_rotor.json").read_text())["source"] == "org/model"


def test_the_checker_as_a_command(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--model", small, "--out", out, "--policy", "uniform-4bit", "--fit", "fast") == 0
    capsys.readouterr()
    assert run("--check", out) == 0
    assert capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    config["quantization"]["bits"] = 8
    (out / "config.json").write_text(json.dumps(config))
    assert run("--check", out) == 1
    assert re.search(r"bits", capsys.readouterr().out)
    assert run("--check", out, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert any(finding["severity"] == "error" for finding in told["findings"])
    assert run("--check", tmp_path / "none") == 1
