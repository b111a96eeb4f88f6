"""`python -m mlx_rotor.quantize`: turn a checkpoint into MLX safetensors, bits by policy or for a size; check one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cli.command import finishes, run
from .cli.quantize_flags import check_mode, parser, recipe

if TYPE_CHECKING:
    from .quant.plan import Plan
    from .quant.recipe import Recipe


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_mode(args)
    if args.check is not None:
        return _check(args)
    from .cli.quantize_steps import planned

    asked, room = recipe(args)
    asked.check_files(measuring=not args.dry_run)
    plan, source_bytes = planned(args, asked, room)
    if room is not None and not args.json:
        print(room.text())
    if args.dry_run:
        _dry_run(args, asked, plan, source_bytes)
    else:
        _make(args, asked, plan)
    return 0


def _check(args: argparse.Namespace) -> int:
    from .quant import check

    found = check.check(args.check)
    print(json.dumps(check.facts(args.check, found), indent=2) if args.json else check.text(args.check, found))
    return check.status(found)


def _dry_run(args: argparse.Namespace, asked: Recipe, plan: Plan, source_bytes: int | None) -> None:
    from .cli.quantize_output import facts, plan_table
    from .cli.quantize_steps import summaries
    from .quant.budget import report
    from .quant.job.workplace import check_out

    if args.out:
        check_out(args.out, args.resume)
    rows, left_out = summaries(args, asked, plan) if args.report else ([], [])
    notes = asked.notes(plan)
    if args.json:
        told = {"report": [row.facts() for row in rows], "left_out": left_out, "notes": notes}
        print(json.dumps(facts(args.model, plan, source_bytes) | told, indent=2))
        return
    print(plan_table(plan, source_bytes))
    print("".join(f"note    {note}\n" for note in notes), end="")
    if rows:
        print(f"\n{report.table(rows)}\n\nerror: relative squared error of Gaussian weights, mean over experts")
        print("".join(f"{note}\n" for note in plan.notes), end="")
        print("".join(f"left out: {line}\n" for line in left_out), end="")


def _make(args: argparse.Namespace, asked: Recipe, plan: Plan) -> None:
    from .cli.quantize_output import Bars, facts, plan_table, result_lines
    from .cli.quantize_steps import make
    from .quant.job.manifest import PROVENANCE

    print("".join(f"note: {note}\n" for note in asked.notes(plan)), end="", file=sys.stderr)
    with Bars(args.json) as bars:
        done = make(args, asked, plan, bars)
    result = done.result
    made = json.loads((args.out / PROVENANCE).read_text(encoding="utf-8"))
    if args.json:
        told = facts(args.model, result.plan, result.source_bytes)
        told |= {"out": str(result.out), "fit": asked.fit, "files": list(result.files), "resumed": result.resumed}
        told |= {"seconds": result.seconds, "relative_error": result.errors, "budget": made["budget"]}
        told |= {"calibration": made["calibration"], "url": done.url}
        bars.result(told | {"evaluation": done.evaluation.to_dict() if done.evaluation else None})
        return
    if not done.again:
        print(plan_table(result.plan, result.source_bytes))
        print(result_lines(result, made["calibration"] or {}, made["files"]))
    print(f"card    {args.out / 'README.md'}\n" if args.card else "", end="")
    print(f"online  {done.url}\n" if done.url else "", end="")


if __name__ == "__main__":
    sys.exit(run(main))
