"""A job that is killed, at any point, and resumed leaves the files of one that wasn't."""

import multiprocessing
import random
import signal
import sys

import killed
from quantizing import quantize

from mlx_rotor.quant.policy import load

POINTS = 20
OPTIONS = {"fit": "fast", "shard_bytes": 60_000}


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def die(folder, out, at, **options):
    """Runs a job in a process that is killed at its `at`-th tick; whether it was."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["mlx_rotor.quant.job"])
    child = context.Process(target=killed.job, args=(folder, out, OPTIONS | options, at))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def points(kinds):
    """Ticks to be killed at: one of every kind there is, the last of all, and random ones up to POINTS."""
    rng = random.Random(5)
    chosen = {len(kinds)}
    for kind in sorted(set(kinds)):
        chosen.add(rng.choice([i for i, k in enumerate(kinds, 1) if k == kind]))
    while len(chosen) < POINTS:
        chosen.add(rng.randint(1, len(kinds)))
    return sorted(chosen)


def test_killed_anywhere_and_resumed_the_files_are_the_same(checkpoint, tmp_path):
    folder, _ = checkpoint()
    ticks = killed.Ticks()
    killed.watched(
        ticks, lambda progress: quantize(folder, tmp_path / "whole", load("config-i"), progress=progress, **OPTIONS)
    )
    whole, died, skipped = files(tmp_path / "whole"), 0, 0
    assert len(ticks.kinds) > 300 and {"pwrite", "fsync", "replace", "write", "unit_done"} <= set(ticks.kinds)
    for number, at in enumerate(points(ticks.kinds)):
        out = tmp_path / f"out{at}"
        died += die(folder, out, at, workers=1 + number % 3)
        assert (out / "config.json").exists() <= (at > len(ticks.kinds) - 12)
        if number % 3 == 0:  # and killed again while it resumes
            die(folder, out, 1 + at // 2, workers=2, resume=True)
        if (out / "config.json").exists() and not (out / ".mlx_rotor-job").exists():
            assert files(out) == whole  # the second kill came after the end
            continue
        result = quantize(folder, out, load("config-i"), resume=True, workers=1 + number % 2, **OPTIONS)
        skipped += result.resumed
        assert files(out) == whole, f"killed at {at}, a {ticks.kinds[at - 1]}"
        assert not (out / ".mlx_rotor-job").exists()
    assert died >= POINTS - 2 and skipped > 100
