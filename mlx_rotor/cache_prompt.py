"""`python -m mlx_rotor.cache_prompt`: mlx_lm.cache_prompt's flags, into a compressed prompt-cache file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .cli import kv
from .cli.command import check_writable, run
from .errors import RotorError


def _parser() -> argparse.ArgumentParser:
    from .host.generation import stock_cache_parser

    what = "Run a prompt and keep its KV cache, compressed, in a file for --prompt-cache-file of generate."
    parser = kv.completed(stock_cache_parser(), "cache_prompt", what)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.kv_bits is not None:
        raise RotorError("--kv-bits is mlx_lm's own cache: use mlx_lm.cache_prompt for it, or --kv here")
    scheme = kv.scheme_of(args)

    from . import load, make_prompt_cache
    from .host import prompting, report
    from .host.experts import attach_experts
    from .host.generation import fill
    from .host.prompt_files import save_prompt_cache, written_path

    check_writable("--prompt-cache-file", written_path(args.prompt_cache_file))

    config = {"trust_remote_code": args.trust_remote_code}
    if args.eos_token is not None:
        config["eos_token"] = args.eos_token
    model, tokenizer = load(
        args.model, adapter_path=args.adapter_path, tokenizer_config=config, trust_remote_code=args.trust_remote_code
    )
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    else:
        tokens = prompting.encode(tokenizer, text, rendered=False).tokens
    caches = make_prompt_cache(model, scheme, max_kv_size=args.max_kv_size)
    experts = attach_experts(model, args.experts)
    if not args.json:
        print(f"KV cache {scheme.name if scheme else 'exact'}: {report.describe(caches)}", flush=True)
        if experts.layers:
            print(f"Experts: {experts.describe()}", flush=True)
    fill(model, tokens, caches, progress=not args.json)
    metadata = {"tokenizer_config": json.dumps(config)}
    if args.model is not None:  # The bundled model is where the package is: another place on another machine.
        metadata["model"] = args.model
    path = save_prompt_cache(args.prompt_cache_file, caches, metadata)
    held, fp16 = report.kv_bytes(caches), report.kv_bytes_fp16(caches)
    if args.json:
        print(json.dumps({"file": str(path), "tokens": len(tokens), "kv_bytes": held, "kv_bytes_fp16": fp16}))
    else:
        print(f"{path}: {len(tokens)} tokens, {held / 1e6:.3f} MB of KV; in fp16: {fp16 / 1e6:.3f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
