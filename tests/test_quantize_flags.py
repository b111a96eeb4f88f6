"""`mlx_rotor quantize`: what each flag does, and that none is ignored."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import small_checkpoint
from mlx_rotor.cli import command, quantize_flags
from mlx_rotor.quant.job import start
from mlx_rotor.tables import size as size_of

quantize = importlib.import_module("mlx_rotor.quantize")  # the command; the package has a function of that name

ROOT = Path(__file__).parents[1]
M27 = ROOT / "examples" / "minimax_m27"
TEXT = "\n\n".join(f"def step_{i}(x, y={i}):\n    return x * {i} + y  # and so on" for i in range(60))
SHORT = ("--calibration-sequences", "4", "--calibration-length", "64")


def run(*argv):
    return command.run(quantize.main, [str(a) for a in argv])


def made(folder):
    return json.loads((folder / "mlx_rotor.json").read_text())


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "code.txt"
    path.write_text(TEXT)
    return path


# Sizes


def test_the_published_table(capsys):
    assert run("--model", M27, "--dry-run", "--report", "--target-size", "92.87GB") == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: re.split(r"  +", line) for line in printed.splitlines()}
    assert rows["plan"][5:7] == ["error, fast", "error, search"]
    assert rows["config-i"][1:4] == ["92.871", "86.49", "3.2488"]
    assert float(rows["config-i"][5]) == pytest.approx(0.108, abs=5e-4)
    ours = rows["asked for"]
    assert float(ours[1]) <= 92.870 and float(ours[6]) <= 0.040
    assert {"jang-k", "rotor-86", "rotor-79", "rotor-70"} <= rows.keys()


def test_policies_that_a_model_can_not_have_are_left_out_of_the_table(small, capsys):
    assert run("--model", small, "--dry-run", "--report", "--target-bpw", 6) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^left out: rotor-70: 0\.\d+ MB is too small: policy rotor-70 needs 0\.\d+ MB", printed, re.M)
    assert re.search(r"^config-i +0\.\d{3} +0\.\d\d ", printed, re.M) and re.search(
        r"^plan +MB +MiB +bits", printed, re.M
    )


@pytest.mark.parametrize("flags", [("--target-size", "600KB"), ("--target-bpw", "6"), ("--policy", "rotor-86")])
def test_files_have_the_size_that_was_asked_for(small, tmp_path, capsys, flags):
    if "rotor-86" in flags:
        assert run("--model", small, "--out", tmp_path / "out", *flags) == 1
        assert "is too small: policy rotor-86 needs" in capsys.readouterr().err
        return
    assert run("--model", small, "--out", tmp_path / "out", "--fit", "fast", *flags) == 0
    parameters = 821_256
    target = 600_000 if "--target-size" in flags else int(6 * parameters / 8)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.93 * target < size <= target
    budget = made(tmp_path / "out")["budget"]
    assert budget["bytes"] == target and budget["sensitivities"]["source"] == "prior"
    assert re.fullmatch("[0-9a-f]{64}", budget["sensitivities"]["sha256"])
    assert f"solved  for files of {size_of(target)}, by the prior" in capsys.readouterr().out


def test_the_room_of_a_mac(capsys):
    assert run("--model", M27, "--dry-run", "--memory", "128GB", "--context", "64K", "--kv", "turbo4v2") == 0
    wide = capsys.readouterr().out
    assert "for weights: the GPU may have 103.08 GB of 128 GiB, less" in wide and "at 65,536 tokens" in wide
    size = float(re.search(r"^output  ([\d.]+) GB", wide, re.M)[1])
    room = float(wide.split()[0])
    assert 0.995 * room < size <= room + 0.005, "printed to 0.01"
    flags = ["--model", str(M27), "--memory", "128GB", "--wired-limit", "120GB", "--kv", "exact"]
    _, found = quantize_flags.recipe(quantize.parser().parse_args(flags))
    assert "the GPU may have 120.00 GB of 128 GiB, less 8.32 GB of KV cache at 32,768 tokens" in found.text()


def test_a_mac_that_is_too_small_is_told_what_would_do(capsys):
    assert run("--model", M27, "--dry-run", "--memory", "32GB") == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("18.83 GB for weights") == 1
    assert re.search(r"policy rotor needs 65\.\d+ GB .* are needed at the least: a Mac with 87 GiB", printed.err)


def test_memory_sets_the_size_and_fit_the_method(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--model", small, "--out", out, "--memory", "16GB", "--fit", "fast", "--json") == 0
    told = result(capsys)
    assert told["fit"] == "fast" and told["policy"] == "rotor" and told["budget"]["bytes"] > 8e9
    assert {row["bits"] for row in told["rows"] if row["bits"]} == {8}


# Calibration


def test_sensitivities_are_measured_once_and_read_after(small, tmp_path, text, capsys):
    file, out = tmp_path / "costs.json", tmp_path / "out"
    flags = ("--model", small, "--target-bpw", 5, "--fit", "fast", "--sensitivities", file)
    assert run(*flags, "--out", out, "--calibration", text, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert any(e["event"] == "step" and e["name"].startswith("measuring sensitivities, layer 1") for e in lines)
    measured = json.loads(file.read_text())
    assert lines[-1]["budget"]["sensitivities"] == {"source": "code.txt", "sha256": measured["sha256"]}
    again = tmp_path / "again"
    assert run(*flags, "--out", again) == 0
    assert "by what was measured on code.txt" in capsys.readouterr().out
    assert contents(again) == contents(out)
    assert run("--dry-run", "--target-bpw", 5, "--sensitivities", file) == 1
    assert "model of other dimensions" in capsys.readouterr().err


def test_a_text_and_its_lines_calibrate_alike_and_better_than_none(small, tmp_path, text, capsys):
    lines = tmp_path / "code.jsonl"
    lines.write_text("\n".join(json.dumps({"text": part}) for part in TEXT.split("\n\n")))
    flags = ("--model", small, "--policy", "uniform-3bit")
    for name, more in (
        ("plain", ()),
        ("text", ("--calibration", text, *SHORT)),
        ("lines", ("--calibration", lines, *SHORT)),
    ):
        assert run(*flags, "--out", tmp_path / name, *more) == 0
    assert contents(tmp_path / "text") == contents(tmp_path / "lines")
    with_text, without = made(tmp_path / "text"), made(tmp_path / "plain")
    assert without["calibration"] is None
    assert (with_text["calibration"]["sequences"], with_text["calibration"]["length"]) == (4, 64)
    assert with_text["calibration"]["expert_rows"]["experts"] == 8
    assert with_text["relative_error"]["attn.q"] > without["relative_error"]["attn.q"], (
        "error moves to inputs that matter less"
    )


def test_the_bundled_text_is_what_calibration_takes_without_a_file(small, tmp_path):
    out = tmp_path / "out"
    assert run("--model", small, "--out", out, "--policy", "uniform-3bit", "--calibration", *SHORT) == 0
    assert made(out)["calibration"]["sequences"] == 4 and made(out)["calibration"]["length"] == 64


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "", "empty.txt: holds no text"),
        ("short.txt", "Hello", "tokens, too few for one sequence of 64"),
        ("gone.txt", None, "gone.txt: not readable as UTF-8 text"),
        ("odd.jsonl", '{"text": "a"}\n{"words": "b"}', 'odd.jsonl, line 2: expected a JSON object with a "text"'),
    ],
)
def test_texts_that_are_no_good(small, tmp_path, capsys, name, content, says):
    file, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        file.write_text(content)
    assert run("--model", small, "--out", out, "--calibration", file, *SHORT) == 1
    assert says in capsys.readouterr().err and not out.exists()


def test_an_imatrix(small, tmp_path, capsys):
    file = tmp_path / "imatrix.gguf"
    writer, rng = gguf.GGUFWriter(str(file), "imatrix"), np.random.default_rng(1)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    kinds = {"attn_q": (1, 128), "attn_output": (1, 128), "ffn_up_exps": (4, 128), "ffn_down_exps": (4, 64)}
    for layer in range(2):
        for kind, (matrices, inputs) in kinds.items():
            sums = rng.uniform(0.01, 9, (matrices, inputs)).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{kind}.weight.in_sum2", sums)
            writer.add_tensor(f"blk.{layer}.{kind}.weight.counts", np.full((matrices, 1), 8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    flags = ("--model", small, "--policy", "uniform-3bit", "--imatrix", file)
    assert run(*flags, "--out", tmp_path / "plain") == 0
    assert run(*flags, "--out", tmp_path / "folded", "--fold", "norms") == 0
    assert made(tmp_path / "plain")["calibration"] and contents(tmp_path / "plain") != contents(tmp_path / "folded")
    assert "folds" in made(tmp_path / "folded")["calibration"]
    capsys.readouterr()
    assert run("--model", small, "--out", tmp_path / "x", "--imatrix", tmp_path / "none.gguf") == 1
    assert "none.gguf: no such file" in capsys.readouterr().err


def test_what_is_folded(small, tmp_path, text):
    def folds(*given):
        args = quantize.parser().parse_args(["--calibration", *given])
        return quantize_flags.recipe(args)[0].scale_folding

    assert folds() == folds("--fold", "none") == () and folds("--fold", "norms") == ("norms",)
    assert folds("--fold", "all") == folds("--fold", "norms,downs") == ("norms", "downs")
    out = tmp_path / "out"
    flags = ("--model", small, "--policy", "uniform-3bit", "--calibration", text, *SHORT)
    assert run(*flags, "--out", out, "--fold", "downs") == 0
    assert {row["fold"].rpartition(".")[2] for row in made(out)["calibration"]["folds"]} == {"down_proj"}


def test_overflows_are_told_and_rescaled_if_asked(tmp_path, text, capsys):
    source = small_checkpoint.write(tmp_path / "source", overflow=True)
    flags = ("--model", source, "--policy", "uniform-4bit", "--calibration", text, *SHORT)
    assert run(*flags, "--out", tmp_path / "told", "--fold", "downs") == 0
    assert re.search(r"warning layer 1, expert 2: .* \(--rescale-overflows helps\)", capsys.readouterr().out)
    assert run(*flags, "--out", tmp_path / "done", "--rescale-overflows") == 0
    assert re.search(r"warning layer 1, expert 2: .* \(rescaled by 1/\d+\)", capsys.readouterr().out)
    rows = made(tmp_path / "done")["calibration"]["folds"]
    assert [(r["layer"], r["expert"]) for r in rows if "expert" in r] == [(1, 2)] and rows[0]["rescaled_by"] >= 8


# Stopping and going on


@pytest.mark.nightly
def test_killed_and_resumed_with_all_there_is_the_files_are_the_same(small, tmp_path, text, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = [*("--model", small, "--target-bpw", 5, "--fold", "all", "--shard-size", "100KB"), "--calibration", text]
    flags = [str(flag) for flag in (*flags, *SHORT)]
    run_it = (
        "import importlib, mlx.core as mx; mx.set_default_device(mx.cpu);"
        "importlib.import_module('mlx_rotor.quantize').main()"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", run_it, *flags, "--out", out, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in job.stdout:
        if json.loads(line).get("units_done") == 15:
            break
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL and not (out / "config.json").exists()
    assert run(*flags, "--out", out, "--resume", "--target-bpw", 6) == 1
    assert "another job's unfinished work" in capsys.readouterr().err
    assert run(*flags, "--out", out, "--resume", "--workers", 2, "--json") == 0
    assert result(capsys)["resumed"] > 0
    assert run(*flags, "--out", whole, "--workers", 1) == 0
    assert contents(out) == contents(whole)
    facts = made(out)
    assert (
        facts["budget"]["bytes"] == 513_285
        and facts["calibration"]["sequences"] == 4
        and "folds" in facts["calibration"]
    )


def test_workers_are_what_was_asked_for(small, tmp_path, monkeypatch):
    counts = []
    real = start.Run.all
    monkeypatch.setattr(start.Run, "all", lambda self, count: counts.append(count) or real(self, count))
    for number in (1, 3):
        assert run("--model", small, "--out", tmp_path / str(number), "--fit", "fast", "--workers", number) == 0
    assert counts == [1, 3] and contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_dry_run_looks_at_the_folder_and_needs_no_disk(small, tmp_path, capsys, monkeypatch):
    (tmp_path / "note").write_text("mine")
    assert run("--model", small, "--dry-run", "--out", tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run("--model", small, "--dry-run", "--out", tmp_path / "out") == 0
    assert "output" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert run("--model", small, "--out", tmp_path / "out") == 1
    assert "not enough disk for --out" in capsys.readouterr().err
