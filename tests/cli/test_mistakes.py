"""What commands do with mistakes and with a stdout that fails: one line, no traceback, a status other than 0."""

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_rotor.__main__ as dispatcher
from mlx_rotor.cli import command

generate, quantize, evaluate, chat, cache_prompt = (
    importlib.import_module(f"mlx_rotor.{name}")
    for name in ("generate", "quantize", "evaluate", "chat", "cache_prompt")
)
PERMISSION = PermissionError(13, "Permission denied")
LEAST = ("--windows", "1", "--window", "16", "--needles", "0", "--chats", "0", "--greedy", "0")


def one_line(capsys):
    """What was written to stderr: a single line that begins with `error: `, and nothing to stdout."""
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("main", "flags", "says"),
    [
        (generate, ["--seed", "-1"], "argument --seed: '-1' is no seed: a whole number from 0, below 2**64"),
        (generate, ["--seed", str(2**64)], "is no seed"),
        (evaluate, ["--seed", "-1"], "is no seed"),
        (generate, ["--temp", "-1"], "argument --temp: '-1' is no number from 0"),
        (generate, ["--temp", "nan"], "argument --temp: 'nan' is no number from 0"),
        (chat, ["--temp", "nan"], "argument --temp: 'nan' is no number from 0"),
        (generate, ["--top-p", "1.5"], "argument --top-p: '1.5' is no number from 0 to 1"),
        (generate, ["--prefill-step-size", "0"], "argument --prefill-step-size: '0' is no whole number from 1"),
        (generate, ["--prompt", "\udcff"], "argument --prompt/-p: '\\udcff' is not UTF-8 text"),
        (generate, ["--tmep", "1"], "unrecognized arguments: --tmep; did you mean --temp?"),
        (chat, ["--system-promt=x"], "unrecognized arguments: --system-promt=x; did you mean --system-prompt?"),
        (quantize, ["--polcy", "x"], "unrecognized arguments: --polcy; did you mean --policy?"),
        (evaluate, ["--zzz"], "unrecognized arguments: --zzz ("),
    ],
)
def test_a_wrong_flag_or_value(main, flags, says, capsys):
    with pytest.raises(SystemExit) as exit:
        command.run(main.main, flags)
    assert exit.value.code == 2 and says in one_line(capsys)


def test_a_wrong_command_or_part(capsys):
    assert dispatcher.main(["quantise"]) == 2
    assert "unknown command 'quantise'; did you mean quantize?" in one_line(capsys)
    assert dispatcher.main(["help", "generat"]) == 2
    assert "did you mean generate?" in one_line(capsys)
    assert dispatcher.main(["xyz"]) == 2 and "did you mean" not in one_line(capsys)
    with pytest.raises(SystemExit):
        dispatcher.main(["benchmark", "cahce"])
    assert "did you mean cache?" in one_line(capsys)


def test_a_token_that_is_none(small, capsys):
    assert command.run(generate.main, ["--model", str(small), "--extra-eos-token", "foo bar"]) == 1
    assert "--extra-eos-token foo bar: no token of this tokenizer" in one_line(capsys)


@pytest.mark.parametrize("main", [generate, cache_prompt])
def test_a_prompt_on_stdin_that_is_not_utf8(main, capsys, monkeypatch, small, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"))
    file = () if main is generate else ("--prompt-cache-file", str(tmp_path / "p"))
    assert command.run(main.main, ["--model", str(small), "--prompt", "-", *file]) == 1
    assert "stdin is not UTF-8 text: invalid start byte at byte 2" in one_line(capsys)


@pytest.mark.parametrize(("content", "says"), [(b"\xff\xfe", "not UTF-8 text"), (b"", "holds no text")])
def test_a_text_that_is_none(content, says, tmp_path, capsys, small):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert command.run(evaluate.main, ["--model", str(small), "--text", str(file)]) == 1
    assert f"--text {file}: {says}" in one_line(capsys)


@pytest.fixture
def broken(small, tmp_path):
    """A copy of the small checkpoint, to damage."""
    return Path(shutil.copytree(small, tmp_path / "broken"))


@pytest.mark.parametrize("template", ["{{ nope.x.y }}", "{% if %}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails(template, broken, capsys):
    (broken / "chat_template.jinja").write_text(template)
    assert command.run(generate.main, ["--model", str(broken)]) == 1
    assert "the chat template of this model fails: " in one_line(capsys)


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (generate, ["-m", "1"]),
        (quantize, ["--dry-run"]),
        (evaluate, LEAST),
    ],
)
def test_a_config_that_is_no_object(main, flags, broken, capsys):
    (broken / "config.json").write_text("[]")
    assert command.run(main.main, ["--model", str(broken), *flags]) == 1
    assert "config.json" in (line := one_line(capsys)) and "object" in line


@pytest.mark.parametrize(("main", "flags"), [(generate, ["-m", "1"]), (quantize, ["--dry-run"]), (evaluate, LEAST)])
def test_a_folder_that_can_not_be_read(main, flags, broken, capsys, monkeypatch):
    real = Path.is_file

    def is_file(path):
        if broken in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)  # root, who may run this, may read everything
    assert command.run(main.main, ["--model", str(broken), *flags]) == 1
    assert "config.json: Permission denied" in one_line(capsys)


def test_causes_of_several_lines_are_shown_whole(broken, capsys):
    config = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 1}
    (broken / "config.json").write_text(json.dumps(config))
    assert command.run(generate.main, ["--model", str(broken)]) == 1
    line = one_line(capsys)
    assert "parameters not in model" in line and "model.layers.1.input_layernorm.weight" in line
    assert "model.layers.1.self_attn.v_proj.weight" in line


class _Main:
    """A command that raises."""

    def __init__(self, error):
        self.error = error

    def __call__(self, argv):
        raise self.error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/some/file"), "error: /some/file: No space left on device\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: text that is not UTF-8: "),
    ],
)
def test_what_the_system_refuses_is_one_line(error, says, capsys):
    assert command.run(_Main(error), []) == 1
    assert says in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(_Main(ZeroDivisionError()), [])


@contextlib.contextmanager
def closed_pipe():
    """stdout whose reader has gone, in place of pytest's."""
    read, write = os.pipe()
    os.close(read)
    before = sys.stdout
    with os.fdopen(write, "w") as stream:
        sys.stdout = stream
        try:
            yield
        finally:
            sys.stdout = before


def test_a_closed_pipe_ends_a_command_quietly(capsys):
    with closed_pipe():
        assert dispatcher.main(["help"]) == 141
    with closed_pipe():
        assert command.run(generate.main, ["--help"]) == 141
    assert capsys.readouterr().err == ""


def test_help_into_a_closed_pipe_from_the_shell():
    line = f"{sys.executable} -m mlx_rotor --help | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0


def test_a_job_whose_output_nobody_reads_is_finished(small, tmp_path):
    out = tmp_path / "out"
    flags = ["--model", str(small), "--out", str(out), "--policy", "uniform-4bit", "--fit", "fast", "--json"]
    with closed_pipe():
        assert command.run(quantize.main, flags) == 0
    assert (out / "config.json").exists() and (out / "model.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert dispatcher.main(["help"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: stdout: No space left on device\n"
