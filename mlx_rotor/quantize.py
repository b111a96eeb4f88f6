"""`python -m mlx_rotor.quantize`: a checkpoint to MLX safetensors under a policy of bits by role and layer."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from . import demo
from .command import run
from .errors import RotorError
from .quant import policy as policies
from .quant.fit import FITS
from .quant.job import SHARD_BYTES, Progress, Result, dry_run, quantize
from .quant.plan import Plan, amount

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="mlx_rotor quantize", description=__doc__.split(": ", 1)[1])
    p.add_argument(
        "--model", default=str(demo.MODEL), help="checkpoint folder or Hugging Face repository (bundled model)"
    )
    p.add_argument("--out", help="folder to make; needed unless --dry-run")
    p.add_argument("--policy", default="config-i", help=f"{', '.join(policies.shipped())}, or a TOML file (config-i)")
    p.add_argument("--fit", choices=FITS, default="search", help="least-squares search, or MLX's own min-max (search)")
    p.add_argument("--shard-size", type=_size, default=SHARD_BYTES, help="largest weight file, e.g. 4GB, 500MB (4GB)")
    p.add_argument("--dry-run", action="store_true", help="print the sizes; needs only config.json")
    p.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    policy = policies.load(args.policy)
    if args.dry_run:
        plan, source_bytes = dry_run(args.model, policy)
        if args.json:
            print(json.dumps(_facts(args, plan, source_bytes), indent=2))
        else:
            _print_plan(plan, source_bytes)
        return 0
    if not args.out:
        raise RotorError("--out DIR says where to write; --dry-run only prints the sizes")
    with tqdm(unit="B", unit_scale=True, disable=True if args.json else None, dynamic_ncols=True) as bar:
        result = quantize(
            args.model, args.out, policy, fit=args.fit, shard_bytes=args.shard_size, progress=progress_on(bar)
        )
    if args.json:
        facts = _facts(args, result.plan, result.source_bytes)
        extra = {"out": str(result.out), "fit": args.fit, "files": list(result.files)}
        print(json.dumps(facts | extra | {"seconds": result.seconds, "relative_error": result.errors}, indent=2))
    else:
        _print_plan(result.plan, result.source_bytes)
        _print_result(result)
    return 0


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GB, 500MB or 2GiB")
    return size


def progress_on(bar: tqdm) -> Progress:
    """A job's progress on a bar of bytes."""

    def update(module: str, done: int, total: int) -> None:
        bar.total = total
        bar.set_description(module.removeprefix("model."), refresh=False)
        bar.update(done - bar.n)

    return update


def _facts(args: argparse.Namespace, plan: Plan, source_bytes: int | None) -> dict[str, Any]:
    return {
        "model": args.model,
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
                "dtype": row.dtype,
                "parameters": row.parameters,
                "bytes": row.nbytes,
            }
            for row in plan.rows()
        ],
    }


def _print_plan(plan: Plan, source_bytes: int | None) -> None:
    rows = plan.rows()
    wide = max(len("layers"), *(len(row.layers) for row in rows))
    print(f"policy {plan.policy.name}: {plan.policy.description}\n" if plan.policy.description else "", end="")
    print(f"{'role':<12} {'layers':<{wide}} {'count':>6} {'bits':>5} {'group':>6} {'weights':>16} {'bytes':>16}  share")
    for row in rows:
        bits, group = (row.spec.bits, row.spec.group_size) if row.spec else (row.dtype.lower(), "")
        print(
            f"{row.role:<12} {row.layers:<{wide}} {row.count:>6} {bits:>5} {group:>6} {row.parameters:>16,}"
            f" {row.nbytes:>16,} {row.nbytes / plan.nbytes:>6.1%}"
        )
    print(f"{'total':<12} {'':<{wide}} {'':>6} {'':>5} {'':>6} {plan.parameters:>16,} {plan.nbytes:>16,}\n")
    if source_bytes is not None:
        print(f"source  {amount(source_bytes, plan.parameters)}")
    print(f"output  {plan.total()}")


def _print_result(result: Result) -> None:
    worst = ", ".join(f"{role} {error:.2%}" for role, error in result.errors.items() if error)
    print(f"saved   {1 - result.plan.nbytes / result.source_bytes:.1%} of the source's bytes")
    print(f"error   |w - stored| / |w| by role: {worst or 'none'}")
    files = f"{len(result.files)} weight file{'s' * (len(result.files) > 1)}"
    print(f"took    {result.seconds:.1f} s, {files} in {result.out}")
    out = shlex.quote(str(result.out))
    print(f'\nnext    mlx_lm.generate --model {out} --prompt "Hello"')
    print(f'        python -m mlx_rotor.generate --model {out} --prompt "Hello"')


if __name__ == "__main__":
    sys.exit(run(main))
