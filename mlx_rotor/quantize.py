"""`python -m mlx_rotor.quantize`: a checkpoint to MLX safetensors, its bits by a policy or for a size; and its card."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .cli.command import finishes, run
from .cli.quantize_flags import BASELINES, check_mode, parser, recipe
from .cli.quantize_output import Bars, facts, plan_table, result_lines
from .errors import RotorError
from .memory.room import Room, missing
from .quant import check, upload
from .quant import policy as policies
from .quant.budget import TooSmall, report
from .quant.job import Result, finished
from .quant.job.manifest import PROVENANCE, digest
from .quant.job.workplace import check_disk, check_out, occupied
from .quant.making import quantize
from .quant.plan import Plan
from .quant.recipe import Recipe, dry_run
from .quant.source import locate

if TYPE_CHECKING:
    from .quality.sample import Domain

REPORTED = ("config-i", "jang-k", "rotor-86", "rotor-79", "rotor-70")


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_mode(args)
    if args.check is not None:
        return _check(args)
    asked, room = recipe(args)
    asked.check_files(measuring=not args.dry_run)
    plan, source_bytes = _planned(args, asked, room)
    if room is not None and not args.json:
        print(room.text())
    if args.dry_run:
        if args.out:
            check_out(args.out, args.resume)
        _dry_run(args, asked, plan, source_bytes)
        return 0
    for note in asked.notes(plan):
        print(f"note: {note}", file=sys.stderr)
    done = _finished(args, asked, plan)
    if done is None:
        _check_place(args, plan)
    texts, baselines = _card_inputs(args, plan) if args.card else ((), [])
    repo = args.upload_repo or ""
    if repo:
        upload.reserve(repo)

    with Bars(args.json) as bars:
        result = done or _job(args, asked, bars)
        evaluation = _evaluated(args, asked, result, texts, baselines, bars) if args.card else None
        made = json.loads((args.out / PROVENANCE).read_text(encoding="utf-8"))
        if args.card or repo:
            _write_card(args, evaluation, repo)
        if repo:
            bars.phase(f"uploading to {repo}")
        url = upload.upload(args.out, repo) if repo else ""
    if args.json:
        told = facts(args.model, result.plan, result.source_bytes)
        told |= {"out": str(result.out), "fit": asked.fit, "files": list(result.files), "resumed": result.resumed}
        told |= {"seconds": result.seconds, "relative_error": result.errors, "budget": made["budget"]}
        told |= {"calibration": made["calibration"], "evaluation": evaluation.to_dict() if evaluation else None}
        bars.result(told | {"url": url})
        return 0
    if done is None:
        print(plan_table(result.plan, result.source_bytes))
        print(result_lines(result, made["calibration"] or {}, made["files"]))
    if args.card:
        print(f"card    {args.out / 'README.md'}")
    if url:
        print(f"online  {url}")
    return 0


def _check(args: argparse.Namespace) -> int:
    found = check.check(args.check)
    print(json.dumps(check.facts(args.check, found), indent=2) if args.json else check.text(args.check, found))
    return check.status(found)


def _planned(args: argparse.Namespace, asked: Recipe, room: Room | None) -> tuple[Plan, int | None]:
    """The plan as it is known before any work: sensitivities that are yet to be measured are the prior's."""
    try:
        return dry_run(args.model, asked)
    except TooSmall as e:
        if room is None:
            raise
        raise RotorError(f"{e}. {missing(room, e.least)}") from e


def _check_place(args: argparse.Namespace, plan: Plan) -> None:
    check_out(args.out, args.resume)
    check_disk(args.out, plan.nbytes - occupied(args.out.glob("*.safetensors*")))


def _finished(args: argparse.Namespace, asked: Recipe, plan: Plan) -> Result | None:
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


def _dry_run(args: argparse.Namespace, asked: Recipe, plan: Plan, source_bytes: int | None) -> None:
    rows, left_out = [], []
    for name in REPORTED if args.report else ():
        other = replace(asked, policy=policies.load(name), budget=None, sensitivities=None)
        try:
            made, _ = dry_run(args.model, other)
        except RotorError as e:
            left_out.append(f"{name}: {str(e).partition(';')[0]}")
        else:
            rows.append(report.summarise(name, made, fit=asked.fit, shard_bytes=asked.shard_bytes))
    if args.report:
        rows.append(report.summarise("asked for", plan, fit=asked.fit, shard_bytes=asked.shard_bytes))
    if args.json:
        told: dict[str, Any] = {"report": [row.facts() for row in rows], "left_out": left_out}
        told["notes"] = asked.notes(plan)
        print(json.dumps(facts(args.model, plan, source_bytes) | told, indent=2))
        return
    print(plan_table(plan, source_bytes))
    for note in asked.notes(plan):
        print(f"note    {note}")
    if rows:
        print(f"\n{report.table(rows)}\n\nerror: relative squared error of Gaussian weights, mean over experts")
        print("".join(f"{note}\n" for note in plan.notes), end="")
        print("".join(f"left out: {line}\n" for line in left_out), end="")


def _card_inputs(args: argparse.Namespace, plan: Plan) -> tuple[tuple[Domain, ...], list[Plan]]:
    """The card's texts, and the plans it compares with; read and tried before hours of work.

    Raises:
        RotorError: a text or a policy that was asked for is no good for this model.
    """
    from .quality.sample import domains
    from .quality.streamed import check_runnable

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
) -> Any:
    from .quality.evaluation import compare_policies, evaluate_checkpoint
    from .quality.streamed import SourceReference

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


def _write_card(args: argparse.Namespace, evaluation: Any, repo: str) -> None:
    from .quality import card

    source = locate(args.model, config_only=True)
    card.write(args.out, card.card_of(args.out, evaluation, name=repo, source=source))


if __name__ == "__main__":
    sys.exit(run(main))
