"""What `quantize` shows while it works: a bar on a terminal, a line now and then in a log, or JSON lines of events."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from tqdm import tqdm

from .quant.job.events import Event

EVERY = 30.0  # seconds between lines of a log
OFTEN = 1.0  # and between JSON lines that only count bytes


class Bars:
    """Progress of a job, and of what comes before and after it. A context manager: the bar ends with it.

    JSON lines go to stdout and each has an "event"; all else goes to stderr.
    """

    def __init__(self, lines: bool = False) -> None:
        self._lines, self._terminal = lines, sys.stderr.isatty()
        self._lock = threading.Lock()
        self._said = time.monotonic()
        self._running = False
        self._rate: tuple[float, int] | None = None  # when, and of how many bytes, this run began
        shown = self._terminal and not lines
        self._bar = tqdm(unit="B", unit_scale=True, disable=not shown, dynamic_ncols=True, delay=1, smoothing=0)

    def event(self, event: Event) -> None:
        """Of the job itself."""
        if self._lines:
            if event.kind != "bytes" or self._due(OFTEN):
                self._json(event.kind, event.as_json())
        elif event.kind == "note":
            if event.text:
                tqdm.write(event.text, file=sys.stderr)
        elif self._terminal:
            self._draw(event)
        else:
            self._log(event)

    def steps(self, what: str, done: int, total: int) -> None:
        """Of calibration and measuring: `done` of `total` steps of what is named."""
        if self._lines:
            self._json("step", {"name": what, "done": done, "total": total})
        elif self._terminal:
            self._bar.set_description(f"{what}, {done} of {total}")
        elif self._due(EVERY):
            self._print(f"{what}, {done} of {total}")

    def phase(self, what: str) -> None:
        """What is done next, of unknown length."""
        if self._lines:
            self._json("phase", {"name": what})
        elif self._terminal:
            self._bar.set_description(what)
        elif self._due(EVERY):
            self._print(what)

    def result(self, facts: dict[str, Any]) -> None:
        """The last JSON line, and the only one with this event."""
        self._json("result", facts)

    def _draw(self, event: Event) -> None:
        bar = self._bar
        if event.kind == "start":
            bar.reset(event.total)  # what was measured before takes no part in the rate
        elif event.kind == "resumed":
            bar.initial = event.done  # a rate and an ETA of this run alone
        if event.kind == "fetch":
            bar.set_description(f"fetching {event.name}", refresh=False)
        elif event.name:
            bar.set_description(event.name.removeprefix("model."), refresh=False)
        bar.update(event.done - bar.n)

    def _log(self, event: Event) -> None:
        if event.kind in ("start", "resumed"):
            self._rate = (event.seconds, event.done)
        elif self._rate is not None and event.total and self._due(EVERY):
            began, before = self._rate
            speed = (event.done - before) / max(event.seconds - began, 1e-9)
            left = f", {_clock((event.total - event.done) / speed)} left" if speed else ""
            name = f"fetching {event.name}" if event.kind == "fetch" else event.name
            share = f"{event.done / 1e9:.2f} of {event.total / 1e9:.2f} GB, {event.done / event.total:.0%}"
            self._print(f"{share}{left}{f', {name}' if name else ''}")

    def _due(self, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._said < seconds:
            return False
        self._said = now
        return True

    def _json(self, kind: str, facts: dict[str, Any]) -> None:
        line = json.dumps({"event": kind} | {k: v for k, v in facts.items() if k != "kind"})
        with self._lock:  # events come from several threads
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60}:{minutes % 60:02}:{int(seconds) % 60:02}"
