"""`python -m mlx_rotor <command>`, also installed as `mlx_rotor <command>`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "generate": "generate text through a compressed KV cache",
    "server": "an OpenAI-compatible server whose models run through compressed KV caches",
    "cache_prompt": "keep a prompt's compressed KV cache in a file",
    "quantize": "turn a checkpoint into MLX safetensors, bits by policy or for a size; check one; write its card",
    "evaluate": "what compression cost: perplexity, KL divergence, needle retrieval",
    "doctor": "versions, device, backends and why; on a Mac, checks and times every kernel",
    "benchmark": "parts measured: codecs, caches, experts; weight fits, quantize jobs, policies",
    "demo": "quantize the bundled model, run it through a compressed KV cache, show saving and cost",
}


def main() -> int:
    argv = sys.argv[1:]
    if argv and argv[0] in ("-V", "--version"):
        from . import __version__

        print(f"mlx_rotor {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: mlx_rotor <command> [options]\n\ncommands:")
        print("\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()))
        print("\n`mlx_rotor <command> --help` lists a command's options.")
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from .cli.command import run

    sys.argv[0] = f"mlx_rotor {argv[0]}"
    module = importlib.import_module(f".{argv[0]}" + (".__main__" if argv[0] == "server" else ""), __package__)
    return run(module.main, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
