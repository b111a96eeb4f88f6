"""`python -m mlx_rotor.doctor`: show versions, device and backends; with --kernels, check and time every kernel."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import tables
from .cli.arguments import Parser
from .cli.command import check_writable, finishes, run
from .errors import RotorError

if TYPE_CHECKING:
    from .diagnose.attention_speed import AttentionTiming
    from .diagnose.checking import Outcome
    from .diagnose.expert_speed import ExpertTiming
    from .diagnose.installation import Diagnosis

OUTPUT = Path("doctor.json")
SIMULATOR = (
    "What only a Mac's GPU can show: that Apple's compiler takes the kernels, how it rounds, how fast they are.\n"
    "The test suite runs the same kernels in a simulator, on x86-64 Linux"
)


def parser() -> Parser:
    p = Parser(
        prog="mlx_rotor doctor",
        description="Versions, device, and which backend each operation uses and why. Exit status 1 if something must "
        "be done.",
    )
    p.add_argument(
        "--kernels",
        action="store_true",
        help="compile kernels on this GPU, check each against its reference, time attention against fp16 and experts "
        "against mlx_lm's; a kernel that fails is refused from then on, and --experts auto leaves out what was slower",
    )
    p.add_argument(
        "--thorough", action="store_true", help="with --kernels: every codec, head dimension, weight format and dtype"
    )
    p.add_argument("--no-timing", action="store_true", help="with --kernels: only check")
    p.add_argument(
        "--output", type=Path, metavar="FILE", help=f"write all that was found as JSON (with --kernels: {OUTPUT})"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    if not a.kernels and (a.thorough or a.no_timing):
        raise RotorError("--thorough and --no-timing are about --kernels")
    output = a.output or (OUTPUT if a.kernels else None)
    if output:
        check_writable("--output", output)
    from .diagnose.installation import diagnose, why_no_kernels
    from .files import write_text

    found = diagnose()
    if not a.json:
        _print_machine(found)
    kernels: dict[str, Any] = {}
    if a.kernels:
        if why := why_no_kernels():
            kernels, output = {"why_not": why}, a.output
            if not a.json:
                print(f"\nNo kernel is checked: {why}.\n{SIMULATOR}")
        else:
            kernels = _kernels(a)
            found = diagnose()
    if not a.json:
        _print_findings(found)
    facts = found.to_dict() | ({"kernels": kernels} if kernels else {})
    if a.json:
        print(json.dumps(facts, indent=1))
    if output:
        write_text(output, json.dumps(facts, indent=1) + "\n")
        if not a.json:
            print(f"\n{output} holds all of this, to attach to a report.")
    return 0 if found.ok else 1


def _kernels(a: argparse.Namespace) -> dict[str, Any]:
    """Checks, times, stores the results of both."""
    from .diagnose import attention_check, attention_speed, checking, expert_check, expert_speed
    from .kernels import check_results

    check_results.failures()  # a file that can't be read is better known before minutes of checks
    every = [*attention_check.every(), *expert_check.every()]
    plan = every if a.thorough else [*attention_check.quick(), *expert_check.quick()]
    outcomes: list[Outcome] = []
    with tqdm(plan, unit="kernel", dynamic_ncols=True) as bar:
        for check in bar:
            bar.set_description(check.name)
            of_experts = isinstance(check, expert_check.ExpertCheck)
            outcomes.append(expert_check.run(check) if of_experts else attention_check.run(check))
    checking.record(outcomes)
    if not a.json:
        _print_checks(outcomes, len(every))
    timings: list[AttentionTiming] = []
    expert_timings: list[ExpertTiming] = []
    if not a.no_timing:
        with tqdm(attention_speed.cells(), unit="length", dynamic_ncols=True) as bar:
            for scheme, heads, tokens in bar:
                bar.set_description(f"{scheme}, {heads} heads, {tokens} tokens")
                timings.append(attention_speed.measure_attention(scheme, heads, tokens))
        with tqdm(expert_speed.cells(), unit="layer", dynamic_ncols=True) as layers:
            for model, triple in layers:
                layers.set_description(f"experts of {model.name}")
                expert_timings += expert_speed.measure_experts(model, triple)
        expert_speed.record(expert_timings)
        if not a.json:
            _print_timings(timings)
            _print_experts(expert_timings)
    return {
        "checked": len(outcomes),
        "of": len(every),
        "failed": sum(not o.passed for o in outcomes),
        "checks": [o.to_dict() for o in outcomes],
        "timings": [t.to_dict() for t in timings],
        "expert_timings": [t.to_dict() for t in expert_timings],
    }


def _print_machine(d: Diagnosis) -> None:
    v = d.versions
    print(f"mlx_rotor {v['mlx_rotor']}, mlx {v['mlx']}, mlx_lm {v['mlx_lm']}, Python {v['python']}, {v['os']}")
    line = f"{d.device}, {d.memory / 2**30:.1f} GiB of memory"
    if d.working_set is not None:
        line += f", of which MLX recommends to use {d.working_set / 2**30:.1f} GiB"
    print(f"{line}; MLX's default device: {v['device']}", flush=True)


def _print_findings(d: Diagnosis) -> None:
    print()
    rows = [[o.name, o.backend, o.why] for o in d.operations]
    print(tables.markdown(["operation", "backend", "why"], rows, left=(0, 1, 2)))
    print()
    width = max(len(f.name) for f in d.findings)
    for f in d.findings:
        print(f"{'ok   ' if f.ok else 'WRONG'} {f.name:<{width}}  {f.text}")


def _print_checks(outcomes: Sequence[Outcome], every: int) -> None:
    """A row for each kind of check, a line for each kernel that failed or has something to say."""
    print(f"\n{len(outcomes)} of {every} kernels checked{'' if len(outcomes) == every else ' (--thorough: all)'}")
    kinds = dict.fromkeys(o.check.kind for o in outcomes)
    rows = []
    for kind in kinds:
        mine = [o for o in outcomes if o.check.kind == kind]
        share = [o.error / o.tolerance for o in mine if o.error is not None and o.tolerance]
        worst = f"{100 * max(share):.0f} %" if share else "none"
        rows.append([kind, f"{sum(o.passed for o in mine)}/{len(mine)}", worst])
    print(tables.markdown(["kernel", "passed", "largest error, of what is allowed"], rows))
    for o in outcomes:
        if not o.passed or o.note:
            error = "" if o.error is None else f", error {o.error:.2g} of {o.tolerance:.2g} allowed"
            print(f"{'passed' if o.passed else 'FAILED'} {o.check.name}{error}{': ' if o.note else ''}{o.note}")
    sys.stdout.flush()


def _print_timings(timings: Sequence[AttentionTiming]) -> None:
    print("\nOne attention of one new token: 8 KV heads of 128, fp16, medians")
    rows = []
    for t in timings:
        row = [t.scheme, str(t.query_heads), f"{t.tokens:,}"]
        if t.fp16_ms is None or t.ours_ms is None or t.ratio is None:
            rows.append([*row, "skipped:", t.skipped, ""])
        else:
            rows.append([*row, f"{t.fp16_ms:.3f}", f"{t.ours_ms:.3f}", f"{t.ratio:.2f}"])
    print(tables.markdown(["scheme", "query heads", "tokens", "fp16 ms", "ours ms", "fp16 / ours"], rows))


def _print_experts(timings: Sequence[ExpertTiming]) -> None:
    print("\nA layer's experts for so many new tokens, bf16, medians; gate + up + down, hidden x intermediate size")
    rows = []
    for t in timings:
        row = [t.model, t.key, str(t.rows)]
        if t.stock_ms is None or t.fused_ms is None or t.ratio is None:
            rows.append([*row, "skipped:", t.skipped, ""])
        else:
            rows.append([*row, f"{t.stock_ms:.3f}", f"{t.fused_ms:.3f}", f"{t.ratio:.2f}"])
    print(tables.markdown(["model", "weights", "tokens", "stock ms", "fused ms", "stock / fused"], rows))


if __name__ == "__main__":
    sys.exit(run(main))
