"""`python -m mlx_rotor.evaluate`: what compression cost, one row a configuration (model × KV scheme)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import DEFAULT, EXACT
from .cli.command import check_writable, run
from .errors import RotorError
from .files import write_text

if TYPE_CHECKING:
    from .quality.report import Report

# What a comparison measures, and on what.
MEASURING = (
    *("model", "kv", "against", "text", "thorough", "windows", "window", "chunk", "needles", "needle_lengths"),
    *("depths", "chats", "greedy", "seed", "kv_sinks", "kv_ring", "kv_protect_layers"),
)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="mlx_rotor evaluate",
        description="Perplexity, KL divergence, top-1 agreement, greedy divergence, needle retrieval, chats and KV "
        "memory of models under KV schemes, one row a configuration.",
        epilog="The default sample takes under two minutes a configuration of the bundled model on a CPU core, "
        "--thorough about four.",
    )
    p.add_argument(
        "--model", action="append", metavar="[NAME=]MODEL", help="folder, repository or `bundled` (default); repeatable"
    )
    p.add_argument(
        "--kv",
        action="append",
        metavar="SCHEME",
        help=f"KV scheme, `{EXACT}` is stock; repeatable (default: {EXACT}, {DEFAULT})",
    )
    p.add_argument("--against", metavar="MODEL", help="reference model, with exact KV (default: the first --model)")
    p.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: held-out text of the bundled model)")
    p.add_argument("--thorough", action="store_true", help="a larger sample, and needles up to 2048 tokens deep")
    p.add_argument("--windows", type=int, metavar="N", help="windows of text for perplexity and divergence")
    p.add_argument("--window", type=int, metavar="TOKENS", help="tokens in a window; well over sinks + ring")
    p.add_argument(
        "--chunk", type=int, metavar="TOKENS", help="tokens fed at a time, so that later ones meet packed ones"
    )
    p.add_argument("--needles", type=int, metavar="N", help="needle trials, in turn over lengths and depths; 0: none")
    p.add_argument("--needle-lengths", type=integers, metavar="N,N", help="prompt lengths in tokens")
    p.add_argument("--depths", type=numbers, metavar="X,X", help="where needles are hidden, 0 (start) to 1 (end)")
    p.add_argument(
        "--chats", type=int, metavar="N", help="chats and tool calls; by default only for the bundled model's tokenizer"
    )
    p.add_argument(
        "--greedy",
        type=int,
        metavar="N",
        help="prompts continued for 256 tokens, until they differ from exact KV's; 0: none",
    )
    p.add_argument("--seed", type=int, metavar="N", help="of needles and chats (default 0)")
    for part in ("sinks", "ring", "protect-layers"):
        p.add_argument(
            f"--kv-{part}", type=int, metavar="N", help=f"{part.replace('-', ' ')} of every scheme but exact"
        )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the tables to this Markdown file")
    p.add_argument(
        "--json-out",
        type=Path,
        metavar="FILE",
        help="keep finished rows here, as JSON, after each one; rows that are there already are not measured again",
    )
    p.add_argument(
        "--from-json", type=Path, metavar="FILE", help="measure nothing: tables (and --plot) of a --json-out file"
    )
    p.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.svg",
        help="also draw KL divergence against bits an element (needs matplotlib)",
    )
    c = p.add_argument_group("schemes measured for one model", "written as JSON, for --kv FILE.json of every command")
    c.add_argument("--calibrate-kv", type=Path, metavar="FILE.json", help="fp8 with a scale for each layer's K and V")
    c.add_argument(
        "--kv-calibrate", type=Path, metavar="FILE.json", help="each layer's codecs, for the least KL at --target-bits"
    )
    c.add_argument("--target-bits", type=float, metavar="X", help="stored bits an element, on average (3)")
    c.add_argument("--candidates", metavar="CODECS", help="comma-separated (trellis2,trellis3,trellis4)")
    return p


def main(argv: Sequence[str] | None = None) -> int | None:
    a = parser().parse_args(argv)
    for flag, file in (("--out", a.out), ("--json-out", a.json_out), ("--plot", a.plot)):
        if file:
            check_writable(flag, file)
    if a.calibrate_kv or a.kv_calibrate:
        return _calibrate(a)
    if a.target_bits is not None or a.candidates:
        raise RotorError("--target-bits and --candidates are for --kv-calibrate FILE.json")
    from .quality import plot, record

    if a.from_json and (unused := _given(a, *MEASURING, "json_out")):
        raise RotorError(f"{', '.join(unused)}: nothing is measured with --from-json; leave it out")
    if a.plot:
        plot.available()
    report = record.read(a.from_json) if a.from_json else _measured(a)
    tables = report.markdown()
    print(json.dumps(report.to_dict(), indent=1) if a.json else tables, end="\n" if a.json else "")
    if a.out:
        write_text(a.out, tables)
    if a.plot:
        write_text(a.plot, plot.quality(report))
    return 0


def _given(a: argparse.Namespace, *names: str) -> list[str]:
    """Those of the flags `names` that were given."""
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if (value := getattr(a, name)) is not None and value is not False
    ]


def _text(a: argparse.Namespace) -> str | None:
    try:
        return a.text.read_text("utf-8") if a.text else None
    except (OSError, UnicodeDecodeError) as e:
        raise RotorError(f"--text {a.text}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from e


def _calibrate(a: argparse.Namespace) -> int:
    comparing = [name for name in MEASURING if name not in ("model", "text", "windows", "window", "chunk")]
    if unused := _given(a, *comparing, "out", "plot", "json_out", "from_json"):
        raise RotorError(f"{', '.join(unused)}: not of use in calibrating; evaluate the scheme afterwards")
    if a.calibrate_kv and a.kv_calibrate:
        raise RotorError("--calibrate-kv (fp8's scales) and --kv-calibrate (every layer's codecs) write one file each")
    if len(a.model or []) > 1:
        raise RotorError("a scheme is calibrated for one --model")
    flag = "--calibrate-kv" if a.calibrate_kv else "--kv-calibrate"
    file = a.calibrate_kv or a.kv_calibrate
    if file.suffix != ".json":
        raise RotorError(f"{flag} {file}: a scheme's file must end in .json, which is how --kv knows it")
    check_writable(flag, file)
    from . import calibration

    preset = calibration.MAXIMA if a.calibrate_kv else calibration.SEARCH
    asked = {n: v for n in ("windows", "window", "chunk") if (v := getattr(a, n)) is not None}
    if a.text:
        asked |= {"text": _text(a), "text_name": a.text.name}
    reading, model = dataclasses.replace(preset, **asked), a.model[0] if a.model else None
    if a.calibrate_kv:
        if a.target_bits is not None or a.candidates:
            raise RotorError("--target-bits and --candidates are for --kv-calibrate FILE.json")
        scheme = calibration.fp8(file, model, reading, progress=True)
        facts: dict[str, Any] = {"file": str(file), "layers": scheme.layers}
    else:
        candidates = a.candidates.split(",") if a.candidates else calibration.CANDIDATES
        target = 3.0 if a.target_bits is None else a.target_bits
        if not (math.isfinite(target) and target > 0):
            raise RotorError(f"--target-bits {target:g}: must be a number above 0")
        found = calibration.bits(file, model, target, candidates, reading, progress=True)
        scheme = found.scheme
        facts = {"file": str(file), "layers": scheme.layers, "bits": found.bits}
        facts |= {"predicted_kl": found.predicted, "measured_kl": found.measured}
        facts["alone"] = [{"layer": i, "side": s, "codec": c, "kl": x} for (i, s, c), x in found.alone.items()]
    if a.json:
        print(json.dumps(facts, indent=1))
        return 0
    for nth, (k, v) in enumerate(scheme.layers):
        print(f"layer {nth}: K {k}, V {v}")
    if "bits" in facts:
        print(
            f"{facts['bits']:.3f} bits an element, KL {facts['measured_kl']:.2g} nats a token with nothing protected",
            end="",
        )
        print(f" ({facts['predicted_kl']:.2g} as a sum of each alone)")
    print(f"written to {file}; use it as --kv {file}")
    return 0


def _measured(a: argparse.Namespace) -> Report:
    text = _text(a)
    from .quality.compare import compare
    from .quality.sample import QUICK, THOROUGH

    size = (THOROUGH if a.thorough else QUICK).with_(
        windows=a.windows,
        window=a.window,
        chunk=a.chunk,
        needles=a.needles,
        lengths=a.needle_lengths,
        depths=a.depths,
        chats=a.chats,
        greedy=a.greedy,
        seed=a.seed,
    )
    parts = {"sinks": a.kv_sinks, "ring": a.kv_ring, "protect_layers": a.kv_protect_layers}
    return compare(
        a.model or ["bundled"],
        a.kv or [EXACT, DEFAULT],
        against=a.against,
        text=text,
        text_name=a.text.name if a.text else "",
        size=size,
        protection={k: v for k, v in parts.items() if v is not None},
        file=a.json_out,
        progress=True,
    )


if __name__ == "__main__":
    sys.exit(run(main))
