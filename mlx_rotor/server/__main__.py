"""`python -m mlx_rotor.server`: serve OpenAI's API through compressed KV caches, with mlx_lm.server's flags."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from ..cli import kv
from ..cli.command import run


def _parser() -> argparse.ArgumentParser:
    from .running import stock_parser

    what = "Serve OpenAI's API with a compressed KV cache. All flags of mlx_lm.server, and --kv."
    return kv.completed(stock_parser(), "server", what)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    scheme = kv.choice_of(args).scheme

    from ..bundled import MODEL
    from .running import start

    args.model = args.model or str(MODEL)
    # A service manager's way to say Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start(args, scheme, lambda line: print(line, flush=True))
    print("stopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
