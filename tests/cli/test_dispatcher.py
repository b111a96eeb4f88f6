"""`mlx_rotor`: its list of commands, help, and names of the same command."""

import subprocess
import sys

import pytest

import mlx_rotor.__main__ as dispatcher

COMMANDS = ["benchmark", "cache_prompt", "chat", "demo", "doctor", "evaluate", "generate", "quantize", "server"]


def test_commands_are_found_with_a_line_each():
    found = dispatcher.commands()
    assert list(found) == COMMANDS
    assert all(told and not told.endswith(".") and len(told) < 100 for _, told in found.values())


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"]])
def test_the_list(argv, capsys):
    assert dispatcher.main(argv) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == [*COMMANDS, "serve", "help"]


@pytest.mark.parametrize("argv", [["help", "doctor"], ["doctor", "--help"]])
def test_help_of_a_command(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        dispatcher.main(argv)
    assert ended.value.code == 0 and "usage: mlx_rotor doctor" in capsys.readouterr().out


def test_serve_is_server(capsys):
    with pytest.raises(SystemExit):
        dispatcher.main(["serve", "--help"])
    assert "usage: mlx_rotor server" in capsys.readouterr().out


def test_help_waits_for_no_model():
    code = (
        "import sys, mlx_rotor.__main__ as m\n"
        "m.main(['help'])\n"
        "for name in ('quantize', 'evaluate', 'doctor', 'demo', 'benchmark'):\n"
        "    try: m.main([name, '--help'])\n"
        "    except SystemExit as e: assert e.code == 0, name\n"
        "assert 'mlx_lm' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
