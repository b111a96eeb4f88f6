"""For a person with an NVIDIA GPU: do our kernels give the right values there, and how fast are they.

    python tests/gpu/run.py --json out.json [--time] [--sanitize] [--only EXPRESSION]

Where clang and MLX are on one machine and the GPU is in another: `--save FOLDER` here, `--saved FOLDER` there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from gpu import cuda, parity, timing, toolkit  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck")
FAILED = 9  # the status of a process in which compute-sanitizer found something


def main() -> int:
    arguments = parse()
    if arguments.save:
        return save(arguments.save, arguments.arch, arguments.only, arguments.time)
    if reason := cuda.unavailable():
        print(f"No kernel can run here. {reason}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"machine": machine(), "parity": [], "time": [], "sanitizer": []}
    for name, wrong in saved_cases(arguments.saved) if arguments.saved else cases(arguments.only):
        print(f"{'ok   ' if not wrong else 'WRONG'} {name} {wrong}", flush=True)
        report["parity"].append({"case": name, "wrong": wrong})
    if arguments.time:
        for row in times(arguments.saved):
            print(json.dumps(row), flush=True)
            report["time"].append(row)
    if arguments.sanitize:
        report["sanitizer"] = [sanitized(tool, arguments) for tool in TOOLS]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [row for row in report["parity"] if row["wrong"]]
    found = [row for row in report["sanitizer"] if row["status"]]
    print(f"{len(report['parity'])} cases, {len(wrong)} wrong; {len(found)} of {len(report['sanitizer'])} tools object")
    return int(bool(wrong or found or not report["parity"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--time", action="store_true", help="time decode attention beside PyTorch's fp16 attention")
    parser.add_argument("--sanitize", action="store_true", help=f"run the cases again under {', '.join(TOOLS)}")
    parser.add_argument("--only", default="", help="of the kernels' tests, those that pytest's -k selects")
    parser.add_argument(
        "--arch", default="sm_80", help="with --save: the GPU to compile for (default: sm_80 and later)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--save", type=Path, help="write launches and the simulator's results to this folder")
    where.add_argument("--saved", type=Path, help="take them from this folder: needs NumPy and CuPy alone")
    return parser.parse_args()


def cases(only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, what is wrong) of the small kernels, and of every test of the kernels that launches one."""
    kernel_tests, launch, samples = (
        importlib.import_module(f"gpu.{name}") for name in ("kernel_tests", "launch", "samples")
    )
    arch = importlib.import_module("gpu.ptx").architecture(*cuda.device()["capability"])
    recorder = launch.Recorder(arch)
    for sample in samples.samples():
        sample.run(recorder)
        yield f"sample {sample.name}", recorder.launches.pop().apart()
    for test, (outcome, said) in kernel_tests.run(launch.PtxKernel, only).items():
        yield test, {} if outcome == "passed" else {outcome: said}


def saved_cases(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, what is wrong) of the launches in `folder`."""
    for path in sorted(folder.glob("case-*.npz")):
        launch = cuda.Launch.load(path)
        yield f"{path.name} {launch.name}", launch.apart()


def times(folder: Path | None) -> Iterator[dict[str, Any]]:
    """A row a pair of codecs and length."""
    for tokens in timing.LENGTHS:
        stock = timing.torch_seconds(tokens)
        for pair in timing.PAIRS:
            if folder:
                files = sorted(folder.glob(f"{time_name(pair, tokens)}*.npz"))
                launches = [cuda.Launch.load(path) for path in files]
            else:
                arch = importlib.import_module("gpu.ptx").architecture(*cuda.device()["capability"])
                launches = timing.launches(pair, tokens, arch)
            if not launches:
                raise FileNotFoundError(f"{folder} has no {time_name(pair, tokens)}*.npz: --save it with --time")
            ours = cuda.seconds(launches)
            yield {
                "tokens": tokens,
                "codecs": "/".join(pair),
                "microseconds": {"ours": round(1e6 * ours, 2), "torch": round(1e6 * stock, 2)},
                "megabytes": {"ours": round(sum(launch.nbytes for launch in launches) / 1e6, 2),
                              "torch": round(timing.torch_bytes(tokens) / 1e6, 2)},
                "times_as_fast": round(stock / ours, 3),
            }  # fmt: skip


def time_name(pair: tuple[str, str], tokens: int) -> str:
    return f"time-{'-'.join(pair)}-{tokens}-"


def save(folder: Path, arch: str, only: str, with_times: bool) -> int:
    """Writes the launches of all cases, and of the timed steps, to `folder`. Needs clang, not a GPU."""
    kernel_tests, launch, samples = (
        importlib.import_module(f"gpu.{name}") for name in ("kernel_tests", "launch", "samples")
    )
    folder.mkdir(parents=True, exist_ok=True)
    recorder = launch.Recorder(arch)
    for sample in samples.samples():
        sample.run(recorder)
    outcomes = kernel_tests.run(recorder, only)
    for i, one in enumerate(recorder.launches):
        one.save(folder / f"case-{i:04}.npz")
    if with_times:
        for tokens in timing.LENGTHS:
            for pair in timing.PAIRS:
                for i, one in enumerate(timing.launches(pair, tokens, arch)):
                    one.save(folder / f"{time_name(pair, tokens)}{i}.npz")
    failed = [f"{test}: {said}" for test, (outcome, said) in outcomes.items() if outcome != "passed"]
    print(f"{len(recorder.launches)} launches of {len(outcomes)} tests in {folder}", *failed, sep="\n")
    return int(bool(failed))


def sanitized(tool: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The cases once more, watched by compute-sanitizer."""
    if not (program := toolkit.sanitizer()):
        raise SystemExit(f"no compute-sanitizer: {toolkit.INSTALL}")
    options = [*(["--saved", str(arguments.saved)] if arguments.saved else []), "--only", arguments.only]
    command = [
        *(str(program), "--tool", tool, "--error-exitcode", str(FAILED), "--target-processes", "application-only"),
        *(sys.executable, __file__, *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if re.match(r"=+ ", line)]
    print(f"{tool}: status {done.returncode}", *lines[-3:], sep="\n  ", flush=True)
    return {"tool": tool, "status": done.returncode, "said": lines[:200], "end": done.stdout.splitlines()[-1:]}


def machine() -> dict[str, Any]:
    """The GPU, and what drives it."""
    found = cuda.device()
    for name in ("torch", "mlx.core"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = None
    return {**found, "limits": parity.LIMITS}


if __name__ == "__main__":
    raise SystemExit(main())
