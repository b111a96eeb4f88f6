"""The parts of `benchmark` that are about weights: fits, quantize jobs, policies."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .. import bundled
from ..errors import RotorError
from ..files import write_text
from ..tables import text
from .arguments import positive
from .command import check_writable

if TYPE_CHECKING:
    from ..bench.jobs import Calibrated, Speed

POLICIES = "uniform-2bit,uniform-3bit,uniform-4bit,config-i,jang-k"
METHODS = "fast,search,calibrated"


def add(parts: Any) -> None:
    """Adds them to the benchmark's sub-commands; each sets `measure`, which returns what --json prints."""
    f = parts.add_parser("fit", help="error and time of every weight fit, beside mx.quantize")
    f.add_argument("--json", action="store_true", help="print one JSON object")
    f.set_defaults(measure=_fit)
    q = parts.add_parser(
        "quantize",
        help="speed and peak memory of a quantize job, a bare loop over mx.quantize beside it",
        description="Writes a synthetic FP8 checkpoint with one layer of MiniMax-M2.7's dimensions (3.7 GB, and as much"
        " again for the outputs at most) into a temporary folder, and quantizes it in fresh processes. With"
        " --calibrated the layer has few experts, as computing is what takes the time then.",
    )
    q.add_argument("--where", type=Path, help="folder for the temporary files (the system's)")
    q.add_argument("--dimensions", choices=("minimax", "small"), default="minimax", help="of the layer (minimax)")
    q.add_argument("--fits", help="comma-separated: fast, search, best (fast; calibrated: search)")
    q.add_argument("--calibrated", action="store_true", help="peak memory of a job that calibrates, instead")
    q.add_argument("--experts", type=positive, action="append", help="with --calibrated; repeatable (8 and 16)")
    q.add_argument("--workers", type=positive, default=0, help="threads of the job (by the machine)")
    q.add_argument("--json", action="store_true", help="print one JSON object")
    q.set_defaults(measure=_quantize)
    w = parts.add_parser(
        "weights",
        help="quality against size of policies and fits: each is made, measured against its source and deleted",
        description="KL divergence, top-1 agreement and perplexity on code and prose. Rows that --json-out has already"
        " are not measured again: an interrupted run goes on.",
    )
    w.add_argument("--model", default=str(bundled.MODEL), help="the source (bundled model)")
    w.add_argument("--policies", default=POLICIES, help=f"comma-separated ({POLICIES})")
    w.add_argument("--fits", default=METHODS, help=f"comma-separated ({METHODS})")
    w.add_argument("--listed-only", action="store_true", help="leave out the solved policy at the size of each")
    w.add_argument("--windows", type=positive, default=12, help="of each text (12)")
    w.add_argument("--window", type=positive, default=384, help="tokens in each (384)")
    w.add_argument("--json-out", type=Path, required=True, metavar="FILE", help="where rows are kept")
    w.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against size, SVG (matplotlib)")
    w.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    w.set_defaults(measure=_weights)


def _fit(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import fits as fit_cost

    costs, layers = list(fit_cost.measure_fits()), list(fit_cost.measure_layers())
    if not args.json:
        print("\n".join(fit_cost.lines(costs, layers)))
    return {"fits": [c.to_dict() for c in costs], "layers": [x.to_dict() for x in layers]}


def _quantize(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import jobs
    from ..quant.fit import FITS

    fits = (args.fits or ("search" if args.calibrated else "fast")).split(",")
    if unknown := sorted(set(fits) - set(FITS)):
        raise RotorError(f"--fits {unknown[0]}: there is {', '.join(FITS)}")
    if args.experts and not args.calibrated:
        raise RotorError("--experts is for --calibrated: speed is measured on all of them")
    if args.calibrated and (len(fits) > 1 or fits == ["fast"]):
        raise RotorError("--calibrated takes one of --fits: search or best")
    with tempfile.TemporaryDirectory(prefix="mlx_rotor-", dir=args.where) as where:
        if args.calibrated:
            experts = args.experts or jobs.EXPERTS
            rows = jobs.measure_calibrated(Path(where), args.dimensions, experts, fits[0], args.workers)
            if not args.json:
                _print_calibrated(rows)
            return {"dimensions": args.dimensions, "calibrated": [asdict(row) for row in rows]}
        speed = jobs.measure_job(Path(where), args.dimensions, fits, args.workers)
    if not args.json:
        _print_speed(speed)
    return jobs.facts(speed)


def _weights(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import weights
    from ..quality.sample import Size, bundled

    for file in (f for f in (args.json_out, args.plot) if f is not None):
        check_writable("--json-out or --plot", file)
    methods = args.fits.split(",")
    if unknown := sorted(set(methods) - set(weights.METHODS)):
        raise RotorError(f"--fits {unknown[0]}: there is {', '.join(weights.METHODS)}")
    solved = "" if args.listed_only else weights.SOLVED
    wanted = weights.ways(args.policies.split(","), methods, solved)
    size = Size(args.windows, args.window, needles=0, lengths=(), depths=(), chats=0)
    with tqdm(total=len(wanted), disable=True if args.json else None, dynamic_ncols=True) as bar:

        def told(what: str, done: int, total: int) -> None:
            bar.set_description(f"{what}, {done} of {total}")

        table, impossible = weights.measure_policies(
            args.model, wanted, bundled(), size, args.json_out, told, lambda: bar.update()
        )
    if args.plot:
        write_text(args.plot, weights.drawing(table))
    if not args.json:
        print(weights.markdown(table))
        print("".join(f"left out: {line}\n" for line in impossible), end="")
    return {**table.facts(), "left_out": impossible}


def _print_speed(speed: Speed) -> None:
    titles = ["run", "MB/s", "of bare", "seconds", "CPU s", "of bare", "peak MB"]
    cells = []
    for row in (speed.bare, *speed.jobs):
        times = [f"{row.mb_per_second:.1f}", f"{speed.ratio(row):.0%}", f"{row.seconds:.1f}"]
        cells.append(
            [row.what, *times, f"{row.cpu_seconds:.1f}", f"{speed.cpu_ratio(row):.0%}", f"{row.peak_bytes / 1e6:.0f}"]
        )
    print(text(titles, cells))
    print(
        f"\n{speed.source_bytes / 1e9:.2f} GB of FP8 weights, one layer of {speed.dimensions} dimensions. The first row"
        " only reads, dequantizes\nby FP8's factors, calls mx.quantize and writes, expert by expert; jobs do all that"
        " makes a checkpoint.\nof bare: the first row's time over a job's. Other work on the machine slows a job on"
        " several cores more,\nin seconds but not in CPU seconds. peak: resident memory of the whole process."
    )


def _print_calibrated(rows: Sequence[Calibrated]) -> None:
    titles = ["experts", "chosen", "tokens", "seconds", "CPU s", "text GB", "peak GB", "disk GB"]
    cells = []
    for row in rows:
        counts = [str(row.experts), str(row.chosen), str(row.tokens), f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}"]
        cells.append([*counts, *(f"{n / 1e9:.2f}" for n in (row.text_peak_bytes, row.peak_bytes, row.work_bytes))])
    print(text(titles, cells, left=()))
    print(
        "\nA whole calibrated job on one layer, each token to `chosen` of its experts. text: most resident memory while"
        "\nthe text was run; peak: in the whole job. Experts are read one by one, so that their number costs no memory."
        "\nMore tokens run in chunks of this many: they take disk (work files: inputs of the layer, of the next, and"
        "\nof its experts), not memory."
    )
