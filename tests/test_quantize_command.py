"""`mlx_rotor quantize` as a user types it."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_rotor.bundled import MODEL
from mlx_rotor.cli import command
from mlx_rotor.cli.quantize_output import Bars
from mlx_rotor.quant.job import journal, stream

quantize = importlib.import_module("mlx_rotor.quantize")  # the command; the package has a function of that name

ROOT = Path(__file__).parents[1]
M27 = json.loads((ROOT / "examples" / "minimax_m27" / "config.json").read_text())


def run(*argv):
    return command.run(quantize.main, [str(a) for a in argv])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def m27(tmp_path):
    folder = tmp_path / "m27"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(M27))
    return folder


@pytest.fixture
def broken(tmp_path):
    """A copy of the bundled model to damage."""
    return Path(shutil.copytree(MODEL, tmp_path / "broken"))


def test_a_dry_run_of_the_published_model_prints_the_published_size(m27, capsys):
    assert run("--model", m27, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "output  92.871 GB = 86.49 GiB, 3.2488 bits a weight" in printed
    assert re.search(r"^expert\.down +2-59 +58 +3 +64 +70,061,654,016 +30\.652 GB +33\.0%$", printed, re.M)
    assert re.search(r"^router +0-61 +62 +bf16 ", printed, re.M)
    assert "source" not in printed


def test_a_dry_run_with_an_output_folder_needs_no_disk(m27, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert run("--model", m27, "--out", tmp_path / "o", "--dry-run") == 0
    assert "92.871 GB" in capsys.readouterr().out and not (tmp_path / "o").exists()


def test_a_dry_run_as_json(m27, capsys):
    assert run("--model", m27, "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == 92_871_229_440 and facts["parameters"] == 228_689_764_864
    assert facts["bits_per_weight"] == pytest.approx(3.24881, abs=1e-5) and facts["source_bytes"] is None
    assert sum(row["bytes"] for row in facts["rows"]) == facts["bytes"]
    gate = [row for row in facts["rows"] if row["role"] == "expert.gate"]
    assert [(row["layers"], row["count"], row["bits"]) for row in gate] == [("0-1, 60-61", 4, 8), ("2-59", 58, 2)]


def test_the_bundled_model_is_the_default(tmp_path, capsys):
    out = tmp_path / "out dir"
    assert run("--out", out) == 0
    printed = capsys.readouterr()
    assert re.search(r"^source  1\d\.\d{3} MB = ", printed.out, re.M) and re.search(
        r"^output  8\.\d{3} MB", printed.out, re.M
    )
    assert re.search(r"^saved   \d\d\.\d% of the source's bytes$", printed.out, re.M)
    assert re.search(r"expert\.gate \d+\.\d\d%, expert\.up", printed.out)
    assert f"mlx_lm.generate --model '{out}' --prompt" in printed.out
    assert f"python -m mlx_rotor.generate --model '{out}' --prompt" in printed.out
    assert json.loads((out / "mlx_rotor.json").read_text())["fit"] == "search"
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "mlx_rotor.json", "model.safetensors"} <= {
        p.name for p in out.iterdir()
    }


def test_json_prints_events_and_the_result_last(tmp_path, capfd):
    out = tmp_path / "out"
    assert run("--out", out, "--policy", "uniform-3bit", "--fit", "fast", "--shard-size", "2MB", "--json") == 0
    printed = capfd.readouterr()
    *events, facts = map(json.loads, printed.out.splitlines())
    assert printed.err == ""
    kinds = [event["event"] for event in events]
    assert facts["event"] == "result" and "result" not in kinds
    assert kinds[0] == "start" and kinds[-1] == "done" and kinds.count("unit_done") == events[0]["units"] == 107
    assert [e["done"] for e in events] == sorted(e["done"] for e in events)
    assert facts["policy"] == "uniform-3bit" and facts["fit"] == "fast" and facts["out"] == str(out)
    assert facts["files"] == sorted(p.name for p in out.glob("*.safetensors")) and len(facts["files"]) > 1
    assert facts["source_bytes"] > 2 * facts["bytes"] and facts["seconds"] > 0
    assert 0.15 < facts["relative_error"]["expert.up"] < 0.25 and facts["relative_error"]["router"] == 0
    assert facts["budget"] is None and facts["calibration"] is None and facts["evaluation"] is None


def test_a_policy_file_of_ones_own(small, tmp_path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text('[[rule]]\nroles = ["expert.*"]\nbits = 5\n[[rule]]\nroles = ["*"]\nkeep = true\n')
    flags = ("--model", small, "--policy", mine, "--fit", "fast")
    assert run("--out", tmp_path / "out", *flags, "--json") == 0
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert section == {"group_size": 64, "bits": 5, "mode": "affine"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["policy"] == "mine"


def test_module_and_console_command_reach_it():
    for entry in (["-m", "mlx_rotor.quantize"], ["-m", "mlx_rotor", "quantize"]):
        done = subprocess.run([sys.executable, *entry, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage: mlx_rotor quantize " in done.stdout, done.stderr


# Bad input: what is done to a copy of the bundled model, the options, and the error.
def unknown_tensor(folder):
    damaged(folder, lambda name: name.replace("layers.7.input_layernorm", "layers.7.inputs_layernorm"))


def damaged(folder, rename):
    """Renames tensors in the headers, the index left out."""
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = rename(data[8 : 8 + length].decode()).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncated(folder):
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def not_finite(folder):
    from mlx_rotor.quant.safetensors_io import read_header

    file = folder / "model-00003-of-00003.safetensors"
    info = read_header(file)["model.layers.6.block_sparse_moe.experts.3.w1.weight"]
    with open(file, "r+b") as handle:
        handle.seek(info.start + 77)
        handle.write(b"\xff")


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "mamba"}')


def no_config(folder):
    (folder / "config.json").unlink()


def odd_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))


def nothing(folder):
    pass


TOML = '[[rule]]\nroles = ["{}"]\nbits = 4\n'


@pytest.mark.parametrize(
    ("harm", "policy", "message"),
    [
        (unknown_tensor, "", "broken: unknown tensor: model.layers.7.inputs_layernorm.weight; not a checkpoint"),
        (missing_shard, "", "broken: missing shard: model-00002-of-00003.safetensors; download it again"),
        (truncated, "", "model-00003-of-00003.safetensors: truncated, "),
        (other_model, "", "unsupported model_type 'mamba' in config.json; supported: "),
        (no_config, "", "broken has no config.json: not a checkpoint folder"),
        (odd_width, "", "switch_mlp.down_proj.weight: group_size 64 does not divide its 80 input dimensions"),
        (nothing, "config-2", "unknown policy 'config-2'; shipped: config-i, config-i-hybrid, "),
        (nothing, TOML.format("attention"), "rule 1: unknown role 'attention'; roles: embed, head, norm, bias, attn.q"),
        (nothing, TOML.format("attn.*"), "no rule covers role 'embed' (model.embed_tokens); role 'expert.gate'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(broken, tmp_path, capsys, harm, policy, message):
    harm(broken)
    out = tmp_path / "out"
    options = ["--fit", "fast"]
    if policy.startswith("[["):
        (tmp_path / "p.toml").write_text(policy)
        options += ["--policy", tmp_path / "p.toml"]
    elif policy:
        options += ["--policy", policy]
    assert run("--model", broken, "--out", out, *options) == 1
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in printed.err and printed.out == ""
    assert not out.exists()


def test_what_is_done_before_a_damaged_weight_is_met_is_kept(broken, tmp_path, capsys):
    not_finite(broken)
    out = tmp_path / "out"
    assert run("--model", broken, "--out", out, "--fit", "fast", "--workers", "1") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: model.layers.6.block_sparse_moe.experts.3.w1.weight: holds NaN or infinite values")
    assert f"with --resume to go on, or delete {out} to start again" in last
    assert not (out / "config.json").exists() and (out / ".mlx_rotor-job" / journal.NAME).stat().st_size > 0


def test_an_output_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "note").write_text("mine")
    assert run("--out", tmp_path) == 1
    assert f"error: --out {tmp_path} is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["note"]
    assert run("--out", tmp_path / "note") == 1
    assert "is a file" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_known_at_once(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(stream, "Fitting", None)
    assert run("--out", tmp_path / "out") == 1
    assert "error: not enough disk for --out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_traceback(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "out"
    flags = ["--model", small, "--shard-size", "100KB"]
    told = Bars.event

    def interrupted(bars, event):
        told(bars, event)
        if event.units_done == 8:
            signal.raise_signal(signal.SIGINT)

    # A shell may start background jobs with SIGINT ignored; a terminal never does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Bars, "event", interrupted)
            assert run("--out", out, *flags, "--json", "--workers", 1) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr()
    assert printed.err.strip() == "interrupted"
    last = json.loads(printed.out.splitlines()[-1])
    assert last["event"] == "note" and "give the same command with --resume to go on" in last["text"]
    assert not (out / "config.json").exists()
    assert run("--out", out, *flags) == 1
    assert "holds an unfinished job; add --resume to go on with it, or delete" in capsys.readouterr().err
    assert run("--out", out, *flags, "--resume") == 0
    assert re.search(r"took .* in .*, \d+ weights of them by an earlier run", capsys.readouterr().out)
    assert run("--out", tmp_path / "whole", *flags) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_out_is_needed_unless_dry(capsys):
    assert run() == 1
    assert capsys.readouterr().err.startswith("error: --out DIR says where to write")


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8)])
def test_sizes(text, size):
    assert quantize.parser().parse_args(["--shard-size", text]).shard_size == size


@pytest.mark.parametrize("text", ["", "4XB", "-1GB", "0GB", "GB"])
def test_bad_sizes(text, capsys):
    with pytest.raises(SystemExit):
        quantize.parser().parse_args([f"--shard-size={text}"])
    assert "is not a size such as 86.2GB" in capsys.readouterr().err
