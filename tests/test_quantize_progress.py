"""What `mlx_rotor quantize` shows while it works: on a terminal, in a log, as JSON lines."""

import fcntl
import importlib
import json
import os
import pty
import re
import struct
import sys
import termios
import threading

from tqdm import tqdm

from mlx_rotor.cli import command, quantize_output
from mlx_rotor.cli.quantize_output import Bars
from mlx_rotor.quant.events import Event

quantize = importlib.import_module("mlx_rotor.quantize")  # the command; the package has a function of that name


class Terminal:
    """A pseudo-terminal in place of stderr; `shown()` closes it and returns what reached the screen."""

    def __init__(self, monkeypatch):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        self.file, self._data = os.fdopen(slave, "w"), b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        monkeypatch.setattr(sys, "stderr", self.file)

    def _read(self):
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            self._data += data

    def shown(self):
        self.file.close()
        self._reader.join()
        os.close(self._master)
        return self._data.decode()


def event(kind, done, seconds=0.0, name=""):
    return Event(kind, done, 1000_000_000, 0, 10, seconds, name)


class Eager(tqdm):
    """Draws a job of less than a second, too."""

    def __init__(self, **options):
        super().__init__(**options | {"delay": 0, "mininterval": 0, "miniters": 1})


def test_a_terminal_shows_a_bar_with_tensor_and_time_left(monkeypatch, small, tmp_path, capsys):
    terminal = Terminal(monkeypatch)
    monkeypatch.setattr(quantize_output, "tqdm", Eager)
    assert command.run(quantize.main, ["--model", str(small), "--out", str(tmp_path / "out")]) == 0
    shown = terminal.shown()
    frames = shown.split("\r")
    assert len(frames) > 4 and re.search(r"layers\.\d\.\S+:  *\d+%\|", shown)
    assert re.search(r"/\d+\.?\d*[kM] \[\d\d:\d\d<\d\d:\d\d, ", shown), "bytes done, time gone, time left"
    assert "100%" in frames[-1] or "100%" in frames[-2]
    assert shown.count("\n") <= 1, "one line, redrawn"
    assert "policy config-i" in capsys.readouterr().out


def test_phases_are_visible_on_a_terminal(monkeypatch):
    terminal = Terminal(monkeypatch)
    with Bars() as bars:
        bars._bar.delay = 0
        bars.steps("calibrating, layer 3", 1, 2)
        bars.phase("uploading to org/name")
        bars.event(event("note", 0))
        bars.event(event("start", 0))
        bars.event(event("bytes", 500_000_000, 2.0, "model.layers.1.x"))
    shown = terminal.shown()
    assert "calibrating, layer 3, 1 of 2" in shown and "uploading to org/name" in shown
    assert re.search(r"layers\.1\.x: +50%\|", shown) and "\n\n" not in shown


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(quantize_output, "EVERY", 0.0)
    with Bars() as bars:
        bars.steps("calibrating, layer 3", 1, 2)
        bars.event(event("start", 0))
        bars.event(event("resumed", 200_000_000, 0.0))
        bars.event(event("bytes", 400_000_000, 100.0, "model.layers.1.x"))
        bars.event(event("fetch", 400_000_000, 100.0, "model-1.safetensors"))
    assert capsys.readouterr().err.splitlines() == [
        "calibrating, layer 3, 1 of 2",
        "0.40 of 1.00 GB, 40%, 0:05:00 left, model.layers.1.x",
        "0.40 of 1.00 GB, 40%, 0:05:00 left, fetching model-1.safetensors",
    ]


def test_a_short_job_writes_nothing_to_a_log(capsys):
    with Bars() as bars:
        bars.event(event("start", 0))
        bars.event(event("bytes", 10**9, 1.0, "x"))
        bars.event(event("done", 10**9))
    assert capsys.readouterr().err == ""


def test_json_lines_have_an_event_each_and_bytes_now_and_then(capsys, monkeypatch):
    with Bars(True) as bars:
        for done in range(100):
            bars.event(event("bytes", done))
        bars.event(event("unit", 100, name="x"))
        bars.steps("calibrating", 1, 2)
        bars.phase("card")
        bars.result({"bytes": 3})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["unit", "step", "phase", "result"]
    assert lines[1] == {"event": "step", "name": "calibrating", "done": 1, "total": 2} and lines[3]["bytes"] == 3
    monkeypatch.setattr(quantize_output, "OFTEN", 0.0)
    with Bars(True) as bars:
        bars.event(event("bytes", 5))
    assert json.loads(capsys.readouterr().out)["done"] == 5
