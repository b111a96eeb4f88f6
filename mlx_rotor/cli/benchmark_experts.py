"""The part of `benchmark` that is about expert layers: Python's time for a token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..tables import text

if TYPE_CHECKING:
    from ..bench.expert_overhead import ExpertOverhead


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
    from ..bench import expert_overhead

    rows = expert_overhead.measure_expert_overhead()
    if not args.json:
        _show_overhead(rows)
    return {"overhead": [row.to_dict() for row in rows]}


def _show_overhead(rows: Sequence[ExpertOverhead]) -> None:
    titles = ["graph of a token", "µs", "stock", "ratio", "nodes", "stock", "launches"]
    cells = []
    for r in rows:
        times = [f"{r.microseconds:.1f}", f"{r.stock_microseconds:.1f}", f"{r.ratio:.2f}"]
        cells.append([r.what, *times, str(r.nodes), str(r.stock_nodes), str(r.launches)])
    print(text(titles, cells))
    print(
        "\nPython's time for a block's router and experts, and for one matrix. Nothing is evaluated in it. Kernels\n"
        "are stand-ins that make lazy outputs, without MLX's own call of some microseconds a launch."
    )
