"""One dispatch of a compiled kernel, in a process of its own: buffers in, outputs and a report out."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from . import build
from .report import Label, Report, make_report

WORKER = Path(__file__).with_name("worker.py")
ORDERS = ("forward", "reverse", "random")
MAX_THREADS = 1024
ONE_AT_A_TIME = threading.Lock()
Size = tuple[int, int, int]


class KernelError(Exception):
    """The kernel did something it must not: what, where, which thread."""


@dataclass(frozen=True)
class Options:
    """How to run.

    `mode` is one of build.MODES. `order` is the order in which threadgroups, simdgroups and lanes take their turns,
    one of ORDERS; `seed` is for the random one. `offsets` are bytes past a 256-byte boundary at which a buffer starts,
    as a slice of an array does. `timeout` is in seconds, for the run alone. Without `lint` the rules of lint.py aren't
    looked at, which saves a third of a compilation.
    """

    mode: str = "check"
    order: str = "forward"
    seed: int = 0
    flush_denormals: bool = False
    offsets: Mapping[str, int] = field(default_factory=dict)
    timeout: float = 120.0
    lint: bool = True


@dataclass(frozen=True)
class Buffer:
    """An argument: bits of `array` (bfloat16 as uint16). `written`: its contents count as set before the run."""

    name: str
    array: np.ndarray
    writable: bool = False
    written: bool = True


def dispatch(
    library: Path, buffers: Sequence[Buffer], grid: Size, threadgroup: Size, options: Options, label: Label
) -> tuple[list[np.ndarray], Report]:
    """Runs `library`; returns the writable buffers' arrays and the report. `grid` counts threads, as MLX does.

    Raises KernelError if the run does not end or its process dies, ValueError for sizes that Metal refuses.
    """
    if np.prod(threadgroup) > MAX_THREADS:
        raise ValueError(f"threadgroup {threadgroup} has more than {MAX_THREADS} threads")
    if options.mode not in build.MODES or options.order not in ORDERS:
        raise ValueError(f"no mode {options.mode} with order {options.order}: {list(build.MODES)}, {ORDERS}")
    job = {
        "runtime": str(build.runtime()),
        "kernel": str(library),
        "buffers": [_packed(b, options.offsets.get(b.name, 0)) for b in buffers],
        "blocks": options.mode == "arithmetic",
        "launch": {
            "grid": tuple(grid),
            "threadgroup": tuple(min(pair) for pair in zip(threadgroup, grid, strict=True)),
            "order": ORDERS.index(options.order),
            "seed": options.seed,
            "check": options.mode == "check",
            "count": options.mode in ("count", "check"),
            "flush_denormals": options.flush_denormals,
        },
    }
    happened = _in_process(job, options)
    outputs = [
        np.frombuffer(data, b.array.dtype).reshape(b.array.shape)
        for data, b in zip(happened["outputs"], [b for b in buffers if b.writable], strict=True)
    ]
    return outputs, make_report(happened, library, [(b.name, b.array.nbytes) for b in buffers], label)


def _packed(b: Buffer, offset: int) -> tuple[str, int, bytes | None, bool, int, int]:
    known = not b.writable or b.written
    return b.name, b.array.nbytes, b.array.tobytes() if known else None, b.writable, b.array.itemsize, offset


def _in_process(job: dict, options: Options) -> dict:
    worker = _worker()
    with ONE_AT_A_TIME:
        pickle.dump(job | {"timeout": options.timeout}, worker.stdin)
        worker.stdin.flush()
        outcome, what = pickle.load(worker.stdout)
    if outcome == "late":
        raise KernelError(f"no end after {options.timeout:g} s: an endless loop?")
    if outcome == "died":
        hint = "; run it in mode check to see where" if options.mode != "check" else ""
        raise KernelError(f"the kernel's process died of {signal.Signals(what).name} in mode {options.mode}{hint}")
    if outcome == "failed":
        raise RuntimeError(what)
    return what


@cache
def _worker() -> subprocess.Popen:
    """The process that runs this one's jobs one after another; it ends when its standard input does."""
    command = [sys.executable, "-I", "-S", str(WORKER)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
