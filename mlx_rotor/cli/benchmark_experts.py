"""The part of `benchmark` that is about expert layers: Python's time for a token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench import expert_overhead


def add(parts: Any) -> None:
    """Adds it to the benchmark's sub-commands; it sets `measure`, which returns what --json prints."""
    e = parts.add_parser(
        "experts",
        help="what fused experts and packed matrices cost in Python, mlx_lm's own layers beside them",
        description="Time to build the graph of one token through a router with its experts and through one matrix.",
    )
    e.add_argument("--json", action="store_true", help="print one JSON object")
    e.set_defaults(measure=_experts)


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    rows = expert_overhead.measure()
    if not args.json:
        _show_overhead(rows)
    return {"overhead": [row.to_dict() for row in rows]}


def _show_overhead(rows: Sequence[expert_overhead.ExpertOverhead]) -> None:
    print(f"{'graph of a token':<20}{'µs':>8}{'stock':>8}{'ratio':>8}{'nodes':>8}{'stock':>7}{'launches':>10}")
    for r in rows:
        print(f"{r.what:<20}{r.microseconds:>8.1f}{r.stock_microseconds:>8.1f}{r.ratio:>8.2f}", end="")
        print(f"{r.nodes:>8}{r.stock_nodes:>7}{r.launches:>10}")
    print(
        "\nPython's time for a block's router and experts, and for one matrix, nothing evaluated in it. Kernels are\n"
        "stand-ins that make lazy outputs: MLX's own call, some microseconds a launch, is not in it."
    )
