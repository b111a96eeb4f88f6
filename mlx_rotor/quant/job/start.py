"""A quantize job: check everything that can be checked cheaply, stream, and survive whatever stops it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ...errors import RotorError
from ..fit import FITS
from ..guide import Guide
from ..plan import Plan, read_config
from ..policy import Policy
from ..source import Checkpoint, has_weights, hub, is_repository, locate
from ..source.origin import Folder, Origin
from . import journal, manifest, workplace
from .run import GuideFactory, PlanFactory, Result, Run, planned, source_name
from .stream import SHARD_BYTES
from .workers import Progress, Reporter, usual
from .workplace import Workplace

__all__ = ["SHARD_BYTES", "GuideFactory", "PlanFactory", "Result", "dry_run", "finished", "quantize"]


def dry_run(
    model: str | Path, plan: Plan | Policy | PlanFactory, *, fit: str = "search", shard_bytes: int = SHARD_BYTES
) -> tuple[Plan, int | None]:
    """The plan for a model, and the source's bytes where its weights are in a local folder (they are then checked).

    `fit` and `shard_bytes` count where a policy's budget is solved for.

    Raises:
        RotorError: as `budget.planned`, `Checkpoint.open` and `Checkpoint.verify`.
    """
    folder = locate(model, config_only=True)
    config = read_config(folder)
    if is_repository(model) or not has_weights(folder):
        return planned(plan, config, None, fit, shard_bytes), None
    stats = {path.name: path.stat() for path in folder.iterdir()}
    checkpoint = _opened(folder, tuple(sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())))
    made = planned(plan, config, checkpoint.dtypes, fit, shard_bytes)
    checkpoint.verify(made)
    return made, checkpoint.nbytes


@lru_cache(maxsize=1)
def _opened(folder: Path, _: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    """With files of these names, sizes and times. Kept, as several plans are made for one model: 96,000 tensors in 130
    files take two seconds to open."""
    return Checkpoint.open(folder, read_config(folder))


def quantize(
    model: str | Path,
    out: str | Path,
    plan: Plan | Policy | PlanFactory,
    *,
    fit: str = "search",
    guide: Guide | GuideFactory | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    resume: bool = False,
    stream_source: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantizes a checkpoint folder or Hugging Face repository into the new or empty folder `out`.

    Memory is bounded by one piece of one tensor a worker, not by the model. Files appear under temporary names and
    config.json last. Whatever stops the job, `resume` goes on after the last finished units, to files that are equal
    to the byte to those of a job that nothing stopped; a job that stops before it has finished anything leaves
    nothing. `stream_source`: fetch a repository's files one at a time and delete each after its last use.

    Raises:
        RotorError: bad input, no room, a file that can't be read or written, a source that changed, or with
            `resume` a job that isn't this one.
    """
    reporter, out = Reporter(progress), Path(out)
    if fit not in FITS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(FITS)}")
    if shard_bytes < 1:
        raise RotorError(f"a shard of {shard_bytes} bytes holds nothing")
    if workers is not None and workers < 1:
        raise RotorError(f"{workers} workers do nothing; at least 1 is needed")
    if stream_source and not is_repository(model):
        raise RotorError(f"--stream-source deletes what it has fetched; {model} is a local folder, which is kept")
    workplace.check_out(out, resume)
    if is_repository(model):
        # Sizes follow from config.json alone: a full disk shows before the weights are fetched.
        config = read_config(locate(model, config_only=True))
        early = planned(plan, config, None, fit, shard_bytes)
        workplace.check_disk(out, early.nbytes - workplace.occupied(out.glob("*.safetensors*")))
    place = Workplace(out)
    try:
        with workplace.working(place):
            origin = _origin(model, place, stream_source, reporter)
            try:
                run = Run(model, place, origin, plan, fit, guide, shard_bytes, reporter)
                return run.all(workers or usual())
            finally:
                origin.close()
    except KeyboardInterrupt:
        reporter.tell("note", text=place.left)
        raise


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


def _origin(model: str | Path, place: Workplace, stream_source: bool, reporter: Reporter) -> Origin:
    if stream_source:
        known = journal.described(place.work / journal.NAME) or {}
        return hub.open_repository(str(model), place, known.get("source", {}).get("commit"), reporter)
    folder = locate(model)
    return Folder(folder, Checkpoint.open(folder, read_config(folder)))
