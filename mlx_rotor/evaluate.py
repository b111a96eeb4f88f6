"""`python -m mlx_rotor.evaluate`: what compression cost, one row a configuration (model × KV scheme)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .cache import DEFAULT, EXACT
from .command import run
from .errors import RotorError


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="mlx_rotor evaluate",
        description="Perplexity, KL divergence, top-1 agreement, needle retrieval, chats and KV memory of models under "
        "KV schemes, one row a configuration.",
        epilog="The default sample takes about three minutes a configuration of the bundled model on two CPU "
        "cores, --thorough about seven.",
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
    p.add_argument("--thorough", action="store_true", help="a sample four times as large")
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
    p.add_argument("--seed", type=int, metavar="N", help="of needles and chats (default 0)")
    for part in ("sinks", "ring", "protect-layers"):
        p.add_argument(
            f"--kv-{part}", type=int, metavar="N", help=f"{part.replace('-', ' ')} of every scheme but exact"
        )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the tables to this Markdown file")
    return p


def main(argv: Sequence[str] | None = None) -> int | None:
    a = parser().parse_args(argv)
    if a.out and (a.out.is_dir() or not os.access(a.out.absolute().parent, os.W_OK)):
        raise RotorError(f"--out {a.out}: can't write a file there")
    try:
        text = a.text.read_text("utf-8") if a.text else None
    except (OSError, UnicodeDecodeError) as e:
        raise RotorError(f"--text {a.text}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from e
    from .evals.compare import compare
    from .evals.size import QUICK, THOROUGH

    size = (THOROUGH if a.thorough else QUICK).with_(
        windows=a.windows,
        window=a.window,
        chunk=a.chunk,
        needles=a.needles,
        lengths=a.needle_lengths,
        depths=a.depths,
        chats=a.chats,
        seed=a.seed,
    )
    parts = {"sinks": a.kv_sinks, "ring": a.kv_ring, "protect_layers": a.kv_protect_layers}
    report = compare(
        a.model or ["bundled"],
        a.kv or [EXACT, DEFAULT],
        against=a.against,
        text=text,
        text_name=a.text.name if a.text else "",
        size=size,
        protection={k: v for k, v in parts.items() if v is not None},
        progress=True,
    )
    tables = report.markdown()
    print(json.dumps(report.to_dict(), indent=1) if a.json else tables, end="\n" if a.json else "")
    if a.out:
        temporary = a.out.with_name(a.out.name + ".tmp")
        temporary.write_text(tables, "utf-8")
        os.replace(temporary, a.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
