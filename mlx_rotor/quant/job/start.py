"""Starting a quantize job on an opened source: checks what is cheap to check, then runs what is left of the plan."""

from __future__ import annotations

from pathlib import Path

from ...errors import RotorError
from ...fit import FITS
from ..events import Progress, Reporter
from ..plan import Plan
from ..shards import SHARD_BYTES
from ..source import Source, source_name
from . import journal, manifest, workplace
from .run import GuideFactory, Result, Run
from .workers import usual
from .workplace import Workplace


def execute(
    source: Source,
    out: str | Path,
    plan: Plan,
    *,
    fit: str = "search",
    guide: GuideFactory | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantizes an opened source into the new or empty folder `out`, as the plan says.

    Memory is bounded by one piece of one tensor a worker, not by the model. Files appear under temporary names and
    config.json last. Whatever stops the job, `resume` goes on after the last finished units, to files that are equal
    to the byte to those of a job that nothing stopped; a job that stops before it has finished anything leaves
    nothing.

    Args:
        source: of `source.open_folder` or `source.hub.open_repository`; closed when the job ends.
        plan: of `Recipe.resolve` for this source.
        guide: makes what a fit goes by beside the weights; see `Recipe.guide`.
        shard_bytes: of a weight file at most.
        workers: threads; by the machine where none are given.
        progress: called with every event, one at a time.

    Raises:
        RotorError: bad input, no room, a file that can't be read or written, a source that changed, or with
            `resume` a job that isn't this one.
    """
    try:
        check(out, fit, shard_bytes, workers, resume)
        reporter, place = Reporter(progress), Workplace(Path(out))
        try:
            with workplace.working(place):
                run = Run(source, place, plan, fit, guide, shard_bytes, reporter)
                try:
                    return run.all(workers or usual())
                finally:
                    source.close()  # before `working` removes what was fetched
        except KeyboardInterrupt:
            reporter.tell("note", text=place.left)
            raise
    finally:
        source.close()


def check(out: str | Path, fit: str, shard_bytes: int, workers: int | None, resume: bool) -> None:
    """RotorError for what can be known to be wrong before a source is opened."""
    if fit not in FITS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(FITS)}")
    if shard_bytes < 1:
        raise RotorError(f"a shard of {shard_bytes} bytes holds nothing")
    if workers is not None and workers < 1:
        raise RotorError(f"{workers} workers do nothing; at least 1 is needed")
    workplace.check_out(Path(out), resume)


def commit_of(out: Path) -> str | None:
    """The commit of a repository that an unfinished job in `out` began with; None where there is no such job."""
    found = journal.described(out / workplace.WORK / journal.NAME) or {}
    commit: str | None = found.get("source", {}).get("commit")
    return commit


def finished(model: str | Path, out: Path, plan: Plan, fit: str, *, guided: bool) -> Result | None:
    """What an earlier job of this model, policy, budget and fit, guided or not, made in `out`; None where no finished
    job's is there.

    Raises:
        RotorError: what is there was made otherwise.
    """
    if not (out / "config.json").exists() or (out / workplace.WORK).exists():
        return None
    facts = manifest.facts(out)
    wrong = [
        what
        for what, same in (
            ("source", facts["source"] == source_name(model)),
            ("policy", facts["policy"] == manifest.policy(plan)),
            ("size", facts["budget"] == manifest.budget(plan)),
            ("fit", facts["fit"] == fit),
            ("calibration", (facts["calibration"] is not None) == guided),
        )
        if not same
    ]
    if wrong:
        raise RotorError(f"--out {out} holds a checkpoint of another {wrong[0]}; give the flags it was made with")
    size = sum(row["bytes"] for row in facts["source_files"]["files"].values())
    files = tuple(name for name in facts["files"] if name.endswith(".safetensors"))
    outcome = manifest.read(out)
    return Result(plan, out, files, size, 0.0, outcome.errors, outcome.measured, len(plan.entries))
