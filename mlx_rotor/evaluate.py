"""`python -m mlx_rotor.evaluate`: measure what compression cost, one row a model and KV scheme."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import DEFAULT, EXACT
from .cli.arguments import Parser, above_zero, listed, number, replaced_flag, seed, whole
from .cli.command import check_writable, finishes, read_text, run
from .errors import RotorError
from .files import write_text

if TYPE_CHECKING:
    from .quality.report import Report

# What a comparison measures, and on what.
MEASURING = (
    *("model", "kv", "against", "text", "thorough", "windows", "window", "chunk", "needles", "needle_lengths"),
    *("depths", "chats", "greedy", "seed", "kv_sinks", "kv_ring", "kv_protect_layers"),
)


def parser() -> Parser:
    p = Parser(
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
    p.add_argument("--window", type=int, metavar="TOKENS", help="tokens in a window; well over sink tokens + ring")
    p.add_argument(
        "--chunk", type=int, metavar="TOKENS", help="tokens fed at a time, so that later ones meet packed ones"
    )
    p.add_argument("--needles", type=int, metavar="N", help="needle trials, in turn over lengths and depths; 0: none")
    p.add_argument("--needle-lengths", type=listed(whole), metavar="N,N", help="prompt lengths in tokens")
    p.add_argument(
        "--depths", type=listed(number), metavar="X,X", help="where needles are hidden, 0 (start) to 1 (end)"
    )
    p.add_argument(
        "--chats", type=int, metavar="N", help="chats and tool calls; by default only for the bundled model's tokenizer"
    )
    p.add_argument(
        "--greedy",
        type=int,
        metavar="N",
        help="prompts continued for 256 tokens, until they differ from exact KV's; 0: none",
    )
    p.add_argument("--seed", type=seed, metavar="N", help="of needles and chats (default 0)")
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
    c.add_argument(
        "--calibrate-kv",
        type=Path,
        metavar="FILE.json",
        help="with --kv fp8: scales of each layer's K and V; with --target-bits: each layer's codecs for the least KL",
    )
    c.add_argument("--target-bits", type=above_zero, metavar="X", help="stored bits an element, on average")
    c.add_argument(
        "--candidates", metavar="CODECS", help="comma-separated, for --target-bits (trellis2,trellis3,trellis4)"
    )
    replaced_flag(p, "--kv-calibrate", "--calibrate-kv FILE.json --target-bits X")
    return p


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    for flag, file in (("--out", a.out), ("--json-out", a.json_out), ("--plot", a.plot)):
        if file:
            check_writable(flag, file)
    if a.calibrate_kv:
        return _calibrate(a)
    if a.target_bits is not None or a.candidates:
        raise RotorError("--target-bits and --candidates are for --calibrate-kv FILE.json")
    from .quality import plot, record

    if a.from_json and (unused := _given(a, *MEASURING, "json_out")):
        raise RotorError(f"{', '.join(unused)}: nothing is measured with --from-json; leave it out")
    if a.plot:
        plot.available()
    report = record.read(a.from_json) if a.from_json else _measured(a)
    tables = report.markdown()
    if a.out:
        write_text(a.out, tables)
    if a.plot:
        write_text(a.plot, plot.quality(report))
    print(json.dumps(report.to_dict(), indent=1) if a.json else tables, end="\n" if a.json else "")
    return 0


def _given(a: argparse.Namespace, *names: str) -> list[str]:
    """Those of the flags `names` that were given."""
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if (value := getattr(a, name)) is not None and value is not False
    ]


def _calibrate(a: argparse.Namespace) -> int:
    """Measures a KV scheme for one model and writes it to --calibrate-kv's file."""
    comparing = [name for name in MEASURING if name not in ("model", "kv", "text", "windows", "window", "chunk")]
    if unused := _given(a, *comparing, "out", "plot", "json_out", "from_json"):
        raise RotorError(f"{', '.join(unused)}: not of use in calibrating; evaluate the scheme afterwards")
    scales = a.kv == ["fp8"]
    if a.kv and not scales:
        raise RotorError(f"--calibrate-kv measures scales for --kv fp8, or codecs by --target-bits; not --kv {a.kv[0]}")
    if scales == (a.target_bits is not None or a.candidates is not None):
        raise RotorError(
            "--calibrate-kv takes either --kv fp8 (a scale for each layer's K and V) or --target-bits X (each layer's"
            " codecs)"
        )
    if a.target_bits is None and not scales:
        raise RotorError("--candidates is for --target-bits X")
    if len(a.model or []) > 1:
        raise RotorError("a scheme is calibrated for one --model")
    file = a.calibrate_kv
    if file.suffix != ".json":
        raise RotorError(f"--calibrate-kv {file}: a scheme's file must end in .json, which is how --kv knows it")
    check_writable("--calibrate-kv", file)
    from . import calibration

    asked = {n: v for n in ("windows", "window", "chunk") if (v := getattr(a, n)) is not None}
    if a.text:
        asked |= {"text": read_text("--text", a.text), "text_name": a.text.name}
    reading = dataclasses.replace(calibration.MAXIMA if scales else calibration.SEARCH, **asked)
    model = a.model[0] if a.model else None
    if scales:
        scheme, found = calibration.fp8(file, model, reading, progress=True), None
    else:
        candidates = a.candidates.split(",") if a.candidates else calibration.CANDIDATES
        found = calibration.bits(file, model, a.target_bits, candidates, reading, progress=True)
        scheme = found.scheme
    facts: dict[str, Any] = {"file": str(file), "layers": scheme.layers}
    if found is not None:
        facts |= {"bits": found.bits, "predicted_kl": found.predicted, "measured_kl": found.measured}
        facts["alone"] = [{"layer": i, "side": s, "codec": c, "kl": x} for (i, s, c), x in found.alone.items()]
    if a.json:
        print(json.dumps(facts, indent=1))
        return 0
    for nth, (k, v) in enumerate(scheme.layers):
        print(f"layer {nth}: K {k}, V {v}")
    if found is not None:
        print(
            f"{found.bits:.3f} bits an element, KL {found.measured:.2g} nats a token with nothing protected"
            f" ({found.predicted:.2g} as a sum of each alone)"
        )
    print(f"written to {file}; use it as --kv {file}")
    return 0


def _measured(a: argparse.Namespace) -> Report:
    text = read_text("--text", a.text) if a.text else None
    from .api import evaluate
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
    return evaluate(
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
