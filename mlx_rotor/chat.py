"""`python -m mlx_rotor.chat`: chat with a model through a compressed KV cache, with mlx_lm.chat's flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli import kv
from .cli.arguments import Parser
from .cli.command import run


def _parser() -> Parser:
    from .host.generation import stock_parser_of

    what = "Chat with a model through a compressed KV cache. All flags of mlx_lm.chat, and --kv."
    return kv.completed(stock_parser_of("chat"), "chat", what)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    choice = kv.choice_of(args)
    from .host.chat import chat

    chat(args, choice.scheme, choice.name, choice.why)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
