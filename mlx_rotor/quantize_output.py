"""What `quantize` prints when it is done: the plan as a table, the result as a few lines, or both as JSON's facts."""

from __future__ import annotations

import shlex
from typing import Any

from .quant.job import Result
from .quant.plan import Plan, amount


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
    rows = plan.rows()
    wide = max(len("layers"), *(len(row.layers) for row in rows))
    lines = [f"policy {plan.policy.name}: {plan.policy.description}"] if plan.policy.description else []
    lines.append(
        f"{'role':<12} {'layers':<{wide}} {'count':>6} {'bits':>5} {'group':>6} {'weights':>16} {'bytes':>16}  share"
    )
    for row in rows:
        bits, group = (row.spec.bits, row.spec.group_size) if row.spec else (row.dtype.lower(), "")
        if row.spec is not None and row.spec.mode != "affine":
            bits = row.spec.mode
        lines.append(
            f"{row.role:<12} {row.layers:<{wide}} {row.count:>6} {bits:>5} {group:>6} {row.parameters:>16,}"
            f" {row.nbytes:>16,} {row.nbytes / plan.nbytes:>6.1%}"
        )
    lines.append(f"{'total':<12} {'':<{wide}} {'':>6} {'':>5} {'':>6} {plan.parameters:>16,} {plan.nbytes:>16,}\n")
    if source_bytes is not None:
        lines.append(f"source  {amount(source_bytes, plan.parameters)}")
    lines.append(f"output  {plan.total()}")
    if plan.solved is not None:
        by = (
            "the prior" if plan.solved.sensitivities == "prior" else f"what was measured on {plan.solved.sensitivities}"
        )
        lines.append(f"solved  for files of {plan.solved.nbytes:,} bytes, by {by}")
    return "\n".join(lines)


def result_lines(result: Result, calibration: dict[str, Any]) -> str:
    """What a finished job tells, beside its plan; `calibration`: of the output's metadata."""
    worst = ", ".join(f"{role} {error:.2%}" for role, error in result.errors.items() if error)
    share = "" if result.measured > 0.9999 else f", on {result.measured:.0%} of the weights"
    lines = [
        f"saved   {1 - result.plan.nbytes / result.source_bytes:.1%} of the source's bytes",
        f"error   |w - stored| / |w| by role{share}: {worst or 'none'}",
    ]
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
    out = shlex.quote(str(result.out))
    lines.append(f'\nnext    mlx_lm.generate --model {out} --prompt "Hello"')
    lines.append(f'        python -m mlx_rotor.generate --model {out} --prompt "Hello"')
    return "\n".join(lines)
