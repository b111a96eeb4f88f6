"""`python -m mlx_rotor.generate`: generate text through a compressed KV cache, with mlx_lm.generate's flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from .cli import kv
from .cli.arguments import Parser
from .cli.command import read_stdin, run
from .errors import RotorError


def _parser() -> Parser:
    from .host.generation import stock_parser_of

    what = "Generate text with a compressed KV cache. All flags of mlx_lm.generate, and --kv."
    parser = kv.completed(stock_parser_of("generate"), "generate", what)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.max_tokens == 0:
        raise RotorError("--max-tokens must not be 0 (-1 is no limit)")
    if args.kv_bits is not None and args.draft_model:
        raise RotorError("--kv-bits can't be measured with --draft-model; use --kv, or mlx_lm.generate")
    choice = kv.choice_of(args)
    text = read_stdin() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    from .host.session import session

    made = session(args, text, choice.scheme, choice.name)
    talk = args.verbose and not args.json
    if talk:
        print(f"{made.headline(choice.why)}\n{'=' * 10}", flush=True)
    for piece in made.text(progress=talk):
        if not args.json:
            print(piece, end="", flush=True)
    if args.json:
        print(json.dumps(made.stats.to_dict()))
    else:
        print(f"\n{'=' * 10}\n{made.stats.summary()}" if talk else "")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
