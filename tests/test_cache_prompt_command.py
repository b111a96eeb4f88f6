"""The cache_prompt command as a user types it, on a two-layer checkpoint, and its files in the generate command."""

import importlib
import json

import pytest

from mlx_rotor.cli import command

cache_prompt = importlib.import_module("mlx_rotor.cache_prompt")
generate = importlib.import_module("mlx_rotor.generate")
LONG = "import os\n" * 60


@pytest.fixture(scope="module")
def files(tmp_path_factory, small):
    """A compressed file, a plain one, and a plain one of at most 600 tokens."""
    folder = tmp_path_factory.mktemp("prompts")
    flags = {"packed": ["--kv", "turbo4"], "plain": ["--kv", "exact"]}
    flags["limited"] = [*flags["plain"], "--max-kv-size", "600"]
    for name, given in flags.items():
        arguments = ["--model", str(small), "--prompt-cache-file", str(folder / name), "--prompt", LONG, *given]
        assert command.run(cache_prompt.main, arguments) == 0
    return {name: folder / name for name in flags}


def go_on(file, *flags):
    arguments = ["--prompt-cache-file", str(file), "-p", "hi", "-m", "2", "--json", *flags]
    return command.run(generate.main, arguments)


def test_flags_and_defaults_are_mlx_lms_but_for_the_model():
    theirs = vars(
        importlib.import_module("mlx_lm.cache_prompt")
        .setup_arg_parser()
        .parse_args(["--prompt", "x", "--prompt-cache-file", "y"])
    )
    ours = vars(cache_prompt._parser().parse_args(["--prompt", "x", "--prompt-cache-file", "y"]))
    assert {k: ours[k] for k in theirs} == theirs | {"model": None}


def test_one_name_is_one_file_for_both_commands(files):
    assert not files["packed"].exists() and files["packed"].with_name("packed.safetensors").exists()
    assert go_on(files["packed"], "--kv", "turbo4") == go_on(f"{files['packed']}.safetensors", "--kv", "turbo4") == 0


def test_what_it_says(small, tmp_path, capsys):
    arguments = ["--model", str(small), "--prompt-cache-file", str(tmp_path / "p"), "--prompt", "hi"]
    assert command.run(cache_prompt.main, arguments) == 0
    assert "K trellis4" in (out := capsys.readouterr().out) and f"{tmp_path / 'p.safetensors'}: " in out
    assert command.run(cache_prompt.main, [*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kv_bytes_fp16"] == 2 * 2 * 64 * 2 * said["tokens"]
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]


def test_generate_goes_on_from_each(files, capsys):
    said = {}
    flags = {
        "packed": ["--kv", "turbo4"],
        "plain": ["--kv", "exact"],
        "limited": ["--kv", "exact", "--max-kv-size", "600"],
    }
    for name, given in flags.items():
        assert go_on(files[name], *given) == 0
        said[name] = json.loads(capsys.readouterr().out)
    assert said["plain"]["text"] == said["limited"]["text"]
    assert said["packed"]["layers_compressed"] == 2 and said["plain"]["layers_compressed"] == 0
    assert go_on(files["limited"], "--max-kv-size", "600") == 0
    assert json.loads(capsys.readouterr().out)["layers_compressed"] == 2


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("packed", ["--kv", "exact"], "is compressed; --kv exact, --kv-bits and a --max-kv-size below 512"),
        ("packed", ["--kv-bits", "4"], "is compressed"),
        ("packed", ["--max-kv-size", "64"], "is compressed"),
        ("packed", ["--kv", "turbo4", "--max-kv-size", "600"], "window 596: ask for what it was made with"),
        ("plain", ["--max-kv-size", "600"], "was not made with --max-kv-size 600"),
        ("plain", ["--kv", "exact", "--max-kv-size", "600"], "was not made with --max-kv-size 600"),
        ("limited", ["--max-kv-size", "700"], "was not made with --max-kv-size 700"),
    ],
)
def test_files_that_are_not_what_is_asked_for(files, capsys, name, flags, says):
    assert go_on(files[name], *flags) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and says in err and "\n" not in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt-cache-file", "/nowhere/p"], "--prompt-cache-file /nowhere/p.safetensors: can't write a file there"),
        (["--prompt-cache-file", "p", "--kv-bits", "4"], "--kv-bits is mlx_lm's own cache"),
        (["--prompt-cache-file", "p", "--kv", "nope"], "unknown KV scheme 'nope'"),
        (["--prompt-cache-file", "p", "--max-kv-size", "0"], "--max-kv-size 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(small, flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.run(cache_prompt.main, ["--model", str(small), "--prompt", "hi", *flags]) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and says in err and "\n" not in err and list(tmp_path.iterdir()) == []


def test_experts_run_as_asked_or_not_at_all(small, tmp_path, capsys):
    file = tmp_path / "prompt.safetensors"
    arguments = ["--model", str(small), "--prompt-cache-file", str(file), "--prompt", "hi", "--kv", "exact"]
    assert command.run(cache_prompt.main, [*arguments, "--experts", "fused"]) == 1
    assert "--experts fused can't be done" in capsys.readouterr().err and not file.exists()
    assert command.run(cache_prompt.main, [*arguments, "--experts", "stock"]) == 0
    assert "Experts: 2 layers left to mlx_lm (--experts stock)" in capsys.readouterr().out
