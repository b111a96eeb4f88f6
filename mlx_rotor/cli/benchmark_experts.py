"""What `python -m mlx_rotor.benchmark kernels` has about experts: which rows there are, and how they look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from ..bench import expert_overhead
from ..bench import expert_traffic as traffic
from ..diagnose.expert_speed import Dims, Triple
from ..experts import formats


def measure(quiet: bool) -> dict[str, Any]:
    """Every row; prints unless `quiet`."""
    jobs: list[Callable[[], list[traffic.ExpertRow]]] = []
    for dims, triples in traffic.TRIPLES.items():
        for triple in triples:
            jobs.append(partial(traffic.fused, dims, triple))
            # MLX has another kernel for the bundled model's few columns.
            if {mode for mode, *_ in triple} == {formats.MLX} and dims.intermediate % traffic.FAST_COLUMNS == 0:
                jobs.append(partial(_stock, dims, triple))
    rows = [row for job in tqdm(jobs, disable=True if quiet else None, dynamic_ncols=True) for row in job()]
    launches = traffic.stock_launches()
    overheads = expert_overhead.measure()
    if not quiet:
        _show(rows, launches)
        _show_overhead(overheads)
    facts = {"experts": [row.facts() for row in rows], "stock_launches": dict(launches)}
    return facts | {"overhead": [row.to_dict() for row in overheads]}


def _stock(dims: Dims, triple: Triple) -> list[traffic.ExpertRow]:
    return [traffic.stock(dims, triple)]


def _show(rows: Sequence[traffic.ExpertRow], launches: dict[str, int]) -> None:
    devices = list(rows[0].predicted)
    wide = max(len(row.weights) for row in rows) + 2
    print(
        f"\n{'experts':<16}{'gate + up + down':<{wide}}{'model':<15}{'MB moved':>10}{'ratio':>7}{'line use':>10}",
        end="",
    )
    print(f"{'launches':>10}{'operations':>12}" + "".join(f"{name + ' µs':>13}" for name in devices))
    for row in rows:
        print(f"{row.kernel:<16}{row.weights:<{wide}}{row.model:<15}{row.moved / 1e6:>10.3f}", end="")
        print(
            f"{row.bytes_ratio:>7.3f}{row.line_use:>10.1%}{row.launches:>10}{sum(row.operations.values()):>12.2f}",
            end="",
        )
        print("".join(f"{1e6 * row.predicted[name]:>13.2f}" for name in devices))
    named = ", ".join(f"{n} {name if len(name) < 20 else 'compiled'}" for name, n in launches.items())
    print(
        "\nOne token through a layer's chosen experts; weights as mode, bits, group size. Counts are of "
        f"{rows[0].run} of them, scaled\n"
        "to all: each costs the same. layer: routing and both launches. ratio: of bytes moved to those that must be:\n"
        "the experts' packed weights, logits, token, output, what is between projections. operations: of a weight,\n"
        "idle lanes included. Under a device: a throughput model of arithmetic and bandwidth, without what a launch\n"
        "costs; no measurement. MLX gather_qmv: MLX's kernel for each projection, every byte once in the model; its\n"
        "launches are those of mlx_lm's block behind the router's matrix, counted in MLX's graph without views:\n"
        f"{named}."
    )


def _show_overhead(rows: Sequence[expert_overhead.ExpertOverhead]) -> None:
    print(f"\n{'graph of a token':<20}{'µs':>8}{'stock':>8}{'ratio':>8}{'nodes':>8}{'stock':>7}{'launches':>10}")
    for r in rows:
        print(f"{r.what:<20}{r.microseconds:>8.1f}{r.stock_microseconds:>8.1f}{r.ratio:>8.2f}", end="")
        print(f"{r.nodes:>8}{r.stock_nodes:>7}{r.launches:>10}")
    print(
        "\nPython's time for a block's router and experts, and for one matrix, nothing evaluated in it. Kernels are\n"
        "stand-ins that make lazy outputs: MLX's own call, some microseconds a launch, is not in it."
    )
