"""`python -m mlx_rotor.cache_prompt`: keep a prompt's KV cache, compressed, in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from .cli import kv
from .cli.arguments import Parser
from .cli.command import check_writable, finishes, read_stdin, run
from .errors import RotorError


def _parser() -> Parser:
    from .host.generation import stock_parser_of

    what = "Run a prompt and keep its KV cache, compressed, in a file for --prompt-cache-file of generate."
    parser = kv.completed(stock_parser_of("cache_prompt"), "cache_prompt", what)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.kv_bits is not None:
        raise RotorError("--kv-bits is mlx_lm's own cache: use mlx_lm.cache_prompt for it, or --kv here")
    choice = kv.choice_of(args)
    from .host.cached_prompt import cached_prompt
    from .host.prompt_files import written_path

    check_writable("--prompt-cache-file", written_path(args.prompt_cache_file))
    text = read_stdin() if args.prompt == "-" else args.prompt
    made = cached_prompt(args, text, choice.scheme)
    if not args.json:
        print(made.headline(choice.name, choice.why), flush=True)
    file = made.write(progress=not args.json)
    held, fp16 = made.nbytes
    if args.json:
        print(json.dumps({"file": str(file), "tokens": len(made.tokens), "kv_bytes": held, "kv_bytes_fp16": fp16}))
    else:
        print(f"{file}: {len(made.tokens)} tokens, {held / 1e6:.3f} MB of KV; in fp16: {fp16 / 1e6:.3f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
