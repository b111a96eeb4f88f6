"""The server command as a user types it."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from mlx_rotor.cli import command
from mlx_rotor.server.running import stock_parser

server = importlib.import_module("mlx_rotor.server.__main__")


def call(*argv):
    return command.run(server.main, [str(a) for a in argv])


@pytest.fixture(autouse=True)
def signals():
    """The command takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_flags_and_defaults_are_mlx_lms_and_the_schemes_are_generates():
    theirs, ours = vars(stock_parser().parse_args([])), vars(server._parser().parse_args([]))
    assert theirs["port"] == 8080 and theirs["decode_concurrency"] == 32
    assert {k: ours[k] for k in theirs} == theirs
    generates = vars(importlib.import_module("mlx_rotor.generate")._parser().parse_args([]))
    flags = [k for k in generates if k.startswith(("kv", "cache_type"))]
    assert {"kv", "cache_type_k", "kv_ring"} < set(flags) and set(flags) <= set(ours)


def test_mlx_lms_main_is_as_it_was_after_its_flags_were_read(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx_lm.server", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("mlx_lm.server").main()
    assert "--prompt-cache-bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv", "nope"], "turbo4v2"),
        (["--kv", "turbo4", "--kv-bits", "4"], "--kv-bits"),
        (["--kv-ring", "-1"], "ring"),
        (["--cache-type-k", "turbo4"], "both"),
        (["--port", "0", "--model", "/no/such/folder"], "does not exist"),
        (["--port", "70000"], "70000"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_mistakes_are_one_line(argv, says, capsys):
    assert call(*argv) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and says in err and "\n" not in err


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    assert call("--port", 0, "--model", tmp_path) == 1
    assert "config.json" in capsys.readouterr().err


def test_a_port_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call("--port", port) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and str(port) in err and "in use" in err and "\n" not in err


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_it_says_what_it_serves_and_stops_when_told_to(signal_sent):
    argv = [sys.executable, "-m", "mlx_rotor", "server", "--port", "0", "--kv", "turbo4v2", "--log-level", "ERROR"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    line = process.stdout.readline()
    layers = "layers 2-5: K turbo4, V turbo2"
    for part in ("http://127.0.0.1:", "bundled/model", "turbo4v2", layers, "reference", "batch"):
        assert part in line, line
    url = line.split(": ")[0]
    assert urllib.request.urlopen(f"{url}/models").status == 200
    # In the middle of an answer.
    body = b'{"prompt": "import", "max_tokens": 2000, "stream": true}'
    answer = urllib.request.urlopen(f"{url}/completions", body)
    assert answer.read(1)
    began = time.monotonic()
    process.send_signal(signal_sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err + out and "stopped" in err, err
    assert time.monotonic() - began < 20
