"""The output of `quantize`. While it works: a bar on a terminal, a line now and then in a log, or JSON lines of events.

What `quantize` prints when it is done: the plan as a table, the result as a few lines, or both as JSON's facts.
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Collection
from typing import Any

from tqdm import tqdm

from ..experts import standalone
from ..host.kv_scales import FILE
from ..quant.events import Event
from ..quant.job import Result
from ..quant.plan import Plan, Row, amount
from ..quant.spec import bits_of
from ..tables import size, text

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


def facts(model: str, plan: Plan, source_bytes: int | None) -> dict[str, Any]:
    """Of a plan, for JSON."""
    return {
        "model": model,
        "policy": plan.policy.name,
        "policy_sha256": plan.policy.digest,
        "layers": plan.layers,
        "parameters": plan.parameters,
        "source_bytes": source_bytes,
        "bytes": plan.nbytes,
        "gb": plan.nbytes / 1e9,
        "gib": plan.nbytes / 2**30,
        "bits_per_weight": plan.bits_per_weight,
        "rows": [
            {
                "role": row.role,
                "layers": row.layers,
                "count": row.count,
                "bits": row.spec.bits if row.spec else None,
                "group_size": row.spec.group_size if row.spec else None,
                "mode": row.spec.mode if row.spec else None,
                "dtype": row.dtype,
                "parameters": row.parameters,
                "bytes": row.nbytes,
            }
            for row in plan.rows()
        ],
    }


def plan_table(plan: Plan, source_bytes: int | None) -> str:
    """One line a role and spec, then the sizes."""
    lines = [f"policy {plan.policy.name}: {plan.policy.description}"] if plan.policy.description else []
    cells = [
        [
            row.role,
            row.layers,
            str(row.count),
            _bits(row),
            str(row.spec.group_size) if row.spec else "",
            f"{row.parameters:,}",
            size(row.nbytes),
            f"{row.nbytes / plan.nbytes:.1%}",
        ]
        for row in plan.rows()
    ]
    cells.append(["total", "", "", "", "", f"{plan.parameters:,}", size(plan.nbytes), ""])
    titles = ["role", "layers", "count", "bits", "group", "weights", "size", "share"]
    lines.append(text(titles, cells, left=(0, 1)) + "\n")
    if source_bytes is not None:
        lines.append(f"source  {amount(source_bytes, plan.parameters)}")
    lines.append(f"output  {plan.total()}")
    if plan.solved is not None:
        by = (
            "the prior" if plan.solved.sensitivities == "prior" else f"what was measured on {plan.solved.sensitivities}"
        )
        lines.append(f"solved  for files of {size(plan.solved.nbytes)}, by {by}")
    return "\n".join(lines)


def _bits(row: Row) -> str:
    """`4`, a mode that isn't affine, with its bits where it may have others; or the dtype where kept."""
    if row.spec is None:
        return row.dtype.lower()
    if row.spec.mode == "affine":
        return str(row.spec.bits)
    return row.spec.mode + (str(row.spec.bits) if len(bits_of(row.spec.mode)) > 1 else "")


def result_lines(result: Result, calibration: dict[str, Any], written: Collection[str] = ()) -> str:
    """What a finished job tells, beside its plan; `calibration` and `written`, its files: of the output's metadata."""
    worst = ", ".join(f"{role} {error:.2%}" for role, error in result.errors.items() if error)
    share = "" if result.measured > 0.9999 else f", on {result.measured:.0%} of the weights"
    lines = [
        f"saved   {1 - result.plan.nbytes / result.source_bytes:.1%} of the source's bytes",
        f"error   |w - stored| / |w| by role{share}: {worst or 'none'}",
    ]
    lines += [f"        ({note})" for note in result.plan.notes]
    for row in calibration.get("folds", ()):
        if "expert" in row:
            done = f"rescaled by 1/{row['rescaled_by']:g}" if row["rescaled_by"] != 1 else "--rescale-overflows helps"
            lines.append(
                f"warning layer {row['layer']}, expert {row['expert']}: down's inputs reach {row['down_input']:.3g},"
                f" more than float16 holds ({done})"
            )
    files = f"{len(result.files)} weight file{'s' * (len(result.files) > 1)}"
    went_on = f", {result.resumed} weights of them by an earlier run" if result.resumed else ""
    lines.append(f"took    {result.seconds:.1f} s, {files} in {result.out}{went_on}")
    if FILE in written:
        lines.append(f"kv      scales of the KV cache in {FILE}: --kv fp8 uses them")
    out = shlex.quote(str(result.out))
    trust = " --trust-remote-code" if standalone.NAME in written else ""
    lines.append(f'\nnext    mlx_lm.generate --model {out}{trust} --prompt "Hello"')
    lines.append(f'        python -m mlx_rotor.generate --model {out} --prompt "Hello"')
    return "\n".join(lines)
