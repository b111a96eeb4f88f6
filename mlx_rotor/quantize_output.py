"""What `quantize` prints when it is done: the plan as a table, the result as a few lines, or both as JSON's facts."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from typing import Any

from .experts import standalone
from .host.kv_scales import FILE
from .quant.fit.lloyd import NOTE
from .quant.job import Result
from .quant.plan import Plan, Row, amount
from .quant.spec import bits_of


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
    cells = [_bits(row) for row in rows]
    broad = max(5, *map(len, cells))
    lines.append(
        f"{'role':<12} {'layers':<{wide}} {'count':>6} {'bits':>{broad}} {'group':>6} {'weights':>16} {'bytes':>16}"
        "  share"
    )
    for row, bits in zip(rows, cells, strict=True):
        group = row.spec.group_size if row.spec else ""
        lines.append(
            f"{row.role:<12} {row.layers:<{wide}} {row.count:>6} {bits:>{broad}} {group:>6} {row.parameters:>16,}"
            f" {row.nbytes:>16,} {row.nbytes / plan.nbytes:>6.1%}"
        )
    lines.append(
        f"{'total':<12} {'':<{wide}} {'':>6} {'':>{broad}} {'':>6} {plan.parameters:>16,} {plan.nbytes:>16,}\n"
    )
    if source_bytes is not None:
        lines.append(f"source  {amount(source_bytes, plan.parameters)}")
    lines.append(f"output  {plan.total()}")
    if plan.solved is not None:
        by = (
            "the prior" if plan.solved.sensitivities == "prior" else f"what was measured on {plan.solved.sensitivities}"
        )
        lines.append(f"solved  for files of {plan.solved.nbytes:,} bytes, by {by}")
    return "\n".join(lines)


def lengthened(plan: Plan) -> bool:
    """Whether errors of its weights need `NOTE`."""
    return any(entry.spec is not None and entry.spec.mode == "lloyd" for entry in plan.entries)


def _bits(row: Row) -> str:
    """`4`, a mode that isn't affine, with its bits where it may have others; or the dtype where kept."""
    if row.spec is None:
        return row.dtype.lower()
    if row.spec.mode == "affine":
        return str(row.spec.bits)
    return row.spec.mode + (str(row.spec.bits) if len(bits_of(row.spec.mode)) > 1 else "")


def result_lines(result: Result, calibration: dict[str, Any], written: Collection[str] = ()) -> str:
    """What a finished job tells, beside its plan; `calibration` and `written`, its files: of the output's metadata."""
    worst = ", ".join(f"{role} {error:.2%}" for role, error in result.errors.items() if error)
    share = "" if result.measured > 0.9999 else f", on {result.measured:.0%} of the weights"
    lines = [
        f"saved   {1 - result.plan.nbytes / result.source_bytes:.1%} of the source's bytes",
        f"error   |w - stored| / |w| by role{share}: {worst or 'none'}",
    ]
    if lengthened(result.plan):
        lines.append(f"        ({NOTE})")
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
    if FILE in written:
        lines.append(f"kv      scales of the KV cache in {FILE}: --kv fp8 uses them")
    out = shlex.quote(str(result.out))
    trust = " --trust-remote-code" if standalone.NAME in written else ""
    lines.append(f'\nnext    mlx_lm.generate --model {out}{trust} --prompt "Hello"')
    lines.append(f'        python -m mlx_rotor.generate --model {out} --prompt "Hello"')
    return "\n".join(lines)
