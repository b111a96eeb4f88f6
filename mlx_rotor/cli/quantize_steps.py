"""The steps of `quantize` on its parsed flags: plan, folder, job, card, upload. Each checks before hours of work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import RotorError
from ..memory.room import Room, missing
from ..quality import card
from ..quality.evaluation import Evaluation, compare_policies, evaluate_checkpoint
from ..quality.sample import Domain, domains
from ..quality.streamed import SourceReference, check_runnable
from ..quant import policy as policies
from ..quant import upload
from ..quant.budget import TooSmall, report
from ..quant.budget.report import Summary
from ..quant.job import Result, finished
from ..quant.job.manifest import digest
from ..quant.job.workplace import check_disk, check_out, occupied
from ..quant.making import quantize
from ..quant.plan import Plan
from ..quant.recipe import Recipe, dry_run
from ..quant.source import locate
from .quantize_flags import BASELINES
from .quantize_output import Bars

REPORTED = ("config-i", "jang-k", "rotor-86", "rotor-79", "rotor-70")


def planned(args: argparse.Namespace, asked: Recipe, room: Room | None) -> tuple[Plan, int | None]:
    """The plan as it is known before any work: sensitivities that are yet to be measured are the prior's."""
    try:
        return dry_run(args.model, asked)
    except TooSmall as e:
        if room is None:
            raise
        raise RotorError(f"{e}. {missing(room, e.least)}") from e


def summaries(args: argparse.Namespace, asked: Recipe, plan: Plan) -> tuple[list[Summary], list[str]]:
    """Other policies' sizes and errors, `plan` last; and a line on each policy that this model can't have."""
    rows, left_out = [], []
    for name in REPORTED:
        other = replace(asked, policy=policies.load(name), budget=None, sensitivities=None)
        try:
            made, _ = dry_run(args.model, other)
        except RotorError as e:
            left_out.append(f"{name}: {str(e).partition(';')[0]}")
        else:
            rows.append(report.summarise(name, made, fit=asked.fit, shard_bytes=asked.shard_bytes))
    rows.append(report.summarise("asked for", plan, fit=asked.fit, shard_bytes=asked.shard_bytes))
    return rows, left_out


@dataclass(frozen=True)
class Made:
    """What `make` did. `result` is of an earlier job where `again`; `url` is "" without an upload."""

    result: Result
    again: bool
    evaluation: Evaluation | None
    url: str


def make(args: argparse.Namespace, asked: Recipe, plan: Plan, bars: Bars) -> Made:
    """Runs the job, measures and writes the card, uploads: as far as the flags ask for them.

    Raises:
        RotorError: no room, a card or an upload that can't be made, before the job; as `quantize` and `upload`.
    """
    done = finished_before(args, asked, plan)
    if done is None:
        check_place(args, plan)
    texts, baselines = card_inputs(args, plan) if args.card else ((), [])
    repo = args.upload_repo or ""
    if repo:
        upload.reserve(repo)
    result = done or _job(args, asked, bars)
    evaluation = _evaluated(args, asked, result, texts, baselines, bars) if args.card else None
    if args.card or repo:
        source = locate(args.model, config_only=True)
        card.write(args.out, card.card_of(args.out, evaluation, name=repo, source=source))
    if repo:
        bars.phase(f"uploading to {repo}")
    return Made(result, done is not None, evaluation, upload.upload(args.out, repo) if repo else "")


def check_place(args: argparse.Namespace, plan: Plan) -> None:
    """Raises RotorError where --out can't take the files of `plan`."""
    check_out(args.out, args.resume)
    check_disk(args.out, plan.nbytes - occupied(args.out.glob("*.safetensors*")))


def finished_before(args: argparse.Namespace, asked: Recipe, plan: Plan) -> Result | None:
    """The checkpoint in --out where there is one by these flags, and a card or an upload is what is missing."""
    if not (args.resume and (args.card or args.upload_repo)):
        return None
    done = finished(args.model, args.out, plan, asked.fit, guided=asked.guided)
    if done is not None and args.card:
        plan, _ = dry_run(locate(args.model), asked)  # of a repository, with the dtypes its headers have
        done = replace(done, plan=plan)
    return done


def _job(args: argparse.Namespace, asked: Recipe, bars: Bars) -> Result:
    return quantize(
        args.model,
        args.out,
        asked,
        workers=args.workers,
        resume=args.resume,
        stream_source=args.stream_source,
        progress=bars.event,
        steps=bars.steps,
    )


def card_inputs(args: argparse.Namespace, plan: Plan) -> tuple[tuple[Domain, ...], list[Plan]]:
    """The card's texts, and the plans it compares with; read and tried before hours of work.

    Raises:
        RotorError: a text or a policy that was asked for is no good for this model.
    """
    texts = domains(args.text or ())
    source = locate(args.model)
    check_runnable(source, texts)
    plans = []
    for name in args.baseline or BASELINES:
        if name == "none":
            continue
        try:
            other, _ = dry_run(source, Recipe(policies.load(name)))
        except RotorError as e:
            if args.baseline:
                raise RotorError(f"--baseline {name}: {e}") from e
            print(f"not in the card: {name} ({e})", file=sys.stderr)
            continue
        if digest(other) != digest(plan):
            plans.append(other)
        elif args.baseline:
            raise RotorError(f"--baseline {name}: that is what is made; leave it out, or compare with another policy")
    return texts, plans


def _evaluated(
    args: argparse.Namespace,
    asked: Recipe,
    result: Result,
    texts: Sequence[Domain],
    baselines: Sequence[Plan],
    bars: Bars,
) -> Evaluation:
    source = locate(args.model)
    fit, guided = asked.fit, asked.guided
    with SourceReference(source, texts, progress=lambda what, *n: bars.steps(f"card: running {what}", *n)) as reference:
        others = compare_policies(
            reference,
            baselines,
            fit=fit,
            guide=asked.guide(bars.steps),
            folder=args.out.absolute().parent,
            progress=lambda what: bars.phase(f"card: {what}"),
        )
        return evaluate_checkpoint(reference, args.out, result.plan, fit=fit, calibrated=guided, others=others)
