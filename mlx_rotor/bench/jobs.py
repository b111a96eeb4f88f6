"""Speed and memory of a quantize job, beside a loop that only reads, quantizes and writes; and memory of calibration.

The source is synthetic: one layer with the dimensions of MiniMax-M2 (3.6 GB of FP8), the vocabulary cut down. Each job
is a process of its own, so that its peak is its own. A calibrated job is measured on few experts, so that it ends on a
CPU: as many tokens at once as always, each to as many experts as always.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import RotorError
from ..quant import Recipe, quantize
from ..quant.calibrate import Calibration
from ..quant.calibrate.calibration import CHUNK
from ..quant.calibrate.text import LENGTH
from ..quant.job.workers import usual
from ..quant.plan import Plan, read_config
from ..quant.policy import Policy, parse
from ..quant.safetensors_io import read_header
from ..quant.source import Checkpoint, has_weights
from .synthetic_layer import BLOCK, CHOSEN, DIMENSIONS, make_checkpoint, tensors

EXPERTS = (8, 16)  # of the calibrated runs: memory is to be the same

# Config-I's bits for layers in the middle of a model; by its own rules a single layer is at an end.
POLICY = """
description = "config-i's middle layers"
[[rule]]
roles = ["norm", "router", "router.bias"]
keep = true
[[rule]]
roles = ["embed", "head"]
bits = 8
[[rule]]
roles = ["attn.*"]
bits = 4
[[rule]]
roles = ["expert.gate", "expert.up"]
bits = 2
[[rule]]
roles = ["expert.down"]
bits = 3
"""
BITS = {"w1": 2, "w2": 3, "w3": 2}


@dataclass(frozen=True)
class Run:
    """One process's work: wall and CPU seconds without its start, peak resident bytes, source bytes a second in MB."""

    what: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    mb_per_second: float


@dataclass(frozen=True)
class Speed:
    """`bare` and the `jobs` beside it, on `source_bytes` of weights."""

    dimensions: str
    source_bytes: int
    bare: Run
    jobs: tuple[Run, ...]

    def ratio(self, job: Run) -> float:
        """The job's throughput over the bare loop's."""
        return job.mb_per_second / self.bare.mb_per_second

    def cpu_ratio(self, job: Run) -> float:
        """The same by CPU seconds, which don't depend on other work on the machine."""
        return self.bare.cpu_seconds / job.cpu_seconds


@dataclass(frozen=True)
class Calibrated:
    """A calibrated job on a layer of `experts`, of which each token goes to `chosen`.

    Wall and CPU seconds of the whole job, peak resident bytes after the text was run and at the end, and the largest
    size of the work files.
    """

    experts: int
    chosen: int
    tokens: int
    seconds: float
    cpu_seconds: float
    text_peak_bytes: int
    peak_bytes: int
    work_bytes: int


def policy() -> Policy:
    return parse(POLICY, "config-i-middle")


def measure_job(where: Path, dimensions: str = "minimax", fits: Sequence[str] = ("fast",), workers: int = 0) -> Speed:
    """Makes the checkpoint in `where` / "source" unless it is there, and runs the loop and a job for each of `fits`.

    `workers` 0: as many as a job has by itself; a job with one worker is measured too. Outputs are deleted.

    Raises:
        RotorError: no room, or a run that failed.
    """
    source = where / "source"
    if not has_weights(source):
        make_checkpoint(source, dimensions)
    total = sum(t.nbytes for t in tensors(DIMENSIONS[dimensions]))
    bare = _run(where, total, "bare", "fast", 1)
    jobs = [_run(where, total, "job", "fast", 1)] if "fast" in fits and workers != 1 else []
    jobs += [_run(where, total, "job", fit, workers) for fit in fits]
    return Speed(dimensions, total, bare, tuple(jobs))


def measure_calibrated(
    where: Path,
    dimensions: str = "minimax",
    experts: Sequence[int] = EXPERTS,
    fit: str = "search",
    workers: int = 0,
    *,
    tokens: int = CHUNK,
    length: int = LENGTH,
) -> tuple[Calibrated, ...]:
    """A calibrated job on each number of experts, on `tokens` random tokens in sequences of `length`.

    Raises:
        RotorError: no room, or a run that failed.
    """
    rows = []
    for count in experts:
        source = where / "source"
        make_checkpoint(source, dimensions, count)
        try:
            found = _process(where, "calibrated", fit, workers, str(tokens), str(length))
        finally:
            shutil.rmtree(source, ignore_errors=True)
        seconds, cpu, peak, _, text_peak, work = found
        chosen = min(CHOSEN, count)
        rows.append(Calibrated(count, chosen, tokens, seconds, cpu, int(text_peak), int(peak), int(work)))
    return tuple(rows)


def facts(speed: Speed) -> dict[str, Any]:
    """The measurement as JSON."""
    rows = [asdict(job) | {"of_bare": speed.ratio(job), "of_bare_cpu": speed.cpu_ratio(job)} for job in speed.jobs]
    return {
        "dimensions": speed.dimensions,
        "source_bytes": speed.source_bytes,
        "bare": asdict(speed.bare),
        "jobs": rows,
    }


def _run(where: Path, total: int, what: str, fit: str, workers: int) -> Run:
    seconds, cpu, peak, used = _process(where, what, fit, workers)
    name = "read, quantize, write" if what == "bare" else f"job, {fit}, {used} worker{'s' * (used > 1)}"
    return Run(name, seconds, cpu, int(peak), total / seconds / 1e6)


def _process(where: Path, what: str, fit: str, workers: int, *more: str) -> list[float]:
    """Runs one of the functions below in a process of its own; returns the numbers that it prints."""
    out = where / "out"
    code = f"from {__name__} import _{what} as run; run()"
    device = mx.default_device().type.name
    command = [sys.executable, "-c", code, str(where / "source"), str(out), fit, str(workers), device, *more]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise RotorError(f"the run of {what} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _job() -> None:
    """A whole job, in its own process."""
    source, out, fit, workers, device = sys.argv[1:]
    mx.set_default_device(getattr(mx, device))
    count = int(workers) or usual()
    started = time.monotonic()
    quantize(source, out, Recipe(policy(), fit=fit), workers=count)
    _say(started, count)


def _calibrated() -> None:
    """A whole job that calibrates, in its own process."""
    source, out, fit, workers, device, tokens, length = sys.argv[1:]
    mx.set_default_device(getattr(mx, device))
    count = int(workers) or usual()
    vocabulary = read_config(Path(source))["vocab_size"]
    text = np.random.default_rng(0).integers(0, vocabulary, (int(tokens) // int(length), int(length)), np.int32)
    folder = Path(out)
    peak = work = 0

    def seen(_: str, done: int, total: int) -> None:
        nonlocal peak, work
        peak = _peak()
        work = max(work, sum(path.stat().st_size for path in folder.iterdir()))

    def guide(checkpoint: Checkpoint, plan: Plan, where: Path) -> Calibration:
        nonlocal folder
        folder = where / "calibration"
        return Calibration(read_config(checkpoint.folder), checkpoint, plan, text, folder, progress=seen)

    started = time.monotonic()
    quantize(source, out, Recipe(policy(), fit=fit), guide=guide, workers=count)
    _say(started, count, peak, work)


def _bare() -> None:
    """Reads, dequantizes, quantizes and writes every expert, one after the other, and nothing else."""
    source, out, _, _, device = sys.argv[1:]
    mx.set_default_device(getattr(mx, device))
    Path(out).mkdir()
    found = {name: info for path in Path(source).glob("*.safetensors") for name, info in read_header(path).items()}
    started = time.monotonic()
    with open(Path(out) / "codes", "wb") as file:
        for name, info in found.items():
            if info.dtype != "F8_E4M3":
                if not name.endswith("_scale_inv"):
                    file.write(info.read())
                continue
            rows, columns = info.shape
            codes = mx.array(np.frombuffer(info.read(), np.uint8).reshape(rows, columns))
            scales = np.frombuffer(found[f"{name}_scale_inv"].read(), np.float32).reshape(rows // BLOCK, 1, -1)
            factors = mx.repeat(mx.array(scales), BLOCK, axis=2)
            weight = (mx.from_fp8(codes, mx.float32).reshape(-1, BLOCK, columns) * factors).reshape(rows, columns)
            bits = BITS.get(name.split(".")[-2], 4)
            for values in mx.quantize(weight.astype(mx.bfloat16), 64, bits):
                file.write(memoryview(values if values.dtype == mx.uint32 else values.view(mx.uint16)))  # type: ignore[arg-type]
    _say(started, 1)


def _say(started: float, workers: int, *more: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([time.monotonic() - started, used.ru_utime + used.ru_stime, _peak(), workers, *more]))


def _peak() -> int:
    """The peak of this process's resident bytes so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts what the process was before it became this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
