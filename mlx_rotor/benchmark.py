"""`python -m mlx_rotor.benchmark`: measure parts: codecs, caches, experts, weight fits, quantize jobs, policies."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from .cli import benchmark_cache, benchmark_codecs, benchmark_experts, benchmark_weights
from .cli.arguments import Parser
from .cli.command import finishes, run
from .quality.machine import machine


def parser() -> Parser:
    p = Parser(prog="mlx_rotor benchmark", description="Measures one part of the package.")
    parts = p.add_subparsers(dest="part", required=True, metavar="PART")
    for module in (benchmark_codecs, benchmark_cache, benchmark_experts, benchmark_weights):
        module.add(parts)
    return p


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    found = args.measure(args)
    if args.json:
        print(json.dumps(found | {"machine": machine()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
