"""`python -m mlx_rotor.generate`: mlx_lm.generate's flags and defaults, through a compressed KV cache."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from .cli import kv
from .cli.command import run
from .errors import RotorError


def _parser() -> argparse.ArgumentParser:
    from .host.generation import stock_parser

    what = "Generate text with a compressed KV cache. All flags of mlx_lm.generate, and --kv."
    parser = kv.completed(stock_parser(), "generate", what)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.max_tokens == 0:
        raise RotorError("--max-tokens must not be 0 (-1 is no limit)")
    if args.kv_bits is not None and args.draft_model:
        raise RotorError("--kv-bits can't be measured with --draft-model; use --kv, or mlx_lm.generate")
    scheme = kv.scheme_of(args)

    import mlx.core as mx

    from . import attach, load, make_prompt_cache
    from .host import prompting
    from .host.attachment import stock_cache
    from .host.experts import attach_experts, mode_of_draft
    from .host.generation import Stats, stock_sampler, stream
    from .host.prompt_files import fit_prompt_cache, read_prompt_cache
    from .host.report import describe

    if args.seed is not None:
        mx.random.seed(args.seed)
    caches: list[Any] | None = None
    metadata: dict[str, Any] = {}
    if args.prompt_cache_file:
        caches, metadata = read_prompt_cache(args.prompt_cache_file)
        if args.model not in (None, metadata.get("model", args.model)):
            raise RotorError(f"{args.prompt_cache_file} was made with {metadata.get('model')}, not {args.model}")
    tokenizer_config = json.loads(metadata.get("tokenizer_config", "{}")) | {
        "trust_remote_code": args.trust_remote_code
    }
    model, tokenizer, config = load(
        args.model or metadata.get("model"),
        adapter_path=args.adapter_path,
        tokenizer_config=tokenizer_config,
        model_config={"quantize_activations": args.quantize_activations},
        trust_remote_code=args.trust_remote_code,
        return_config=True,
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    draft, draft_tokenizer = load(args.draft_model) if args.draft_model else (None, tokenizer)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise RotorError(
            f"--draft-model {args.draft_model} has {draft_tokenizer.vocab_size} tokens in its vocabulary and the model "
            f"{tokenizer.vocab_size}: a draft model must share the model's tokenizer"
        )
    text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    text = sys.stdin.read() if text == "-" else text
    rendered = tokenizer.has_chat_template and not args.ignore_chat_template
    if rendered:
        text = prompting.render(
            tokenizer,
            text,
            system=args.system_prompt,
            prefill=args.prefill_response,
            template_config=args.chat_template_config,
            after_cache=caches is not None,
        )
    if args.image:
        prompt = prompting.encode_with_images(model, config, tokenizer, text, args.image, rendered=rendered)
    else:
        prompt = prompting.encode(tokenizer, text, rendered=rendered)
    if scheme:
        attach(model, scheme)
    if caches is None:
        caches = make_prompt_cache(model, scheme, max_kv_size=args.max_kv_size)
    else:
        caches = fit_prompt_cache(args.prompt_cache_file, caches, model, scheme, args.max_kv_size)
    draft_caches = stock_cache(draft) if draft is not None else []
    experts = attach_experts(model, args.experts)
    drafts = attach_experts(draft, mode_of_draft(args.experts)) if draft is not None else None
    talk = args.verbose and not args.json
    stats = Stats(scheme.name if scheme else "exact", caches, experts)
    if talk:
        lines = [f"KV cache {stats.kv_scheme}: {describe(caches)}"]
        lines += [f"Experts: {experts.describe()}"] if experts.layers else []
        lines += [f"The draft model's experts: {drafts.describe()}"] if drafts and drafts.layers else []
        print("\n".join([*lines, "=" * 10]), flush=True)
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "sampler": stock_sampler(args, tokenizer),
        "prefill_step_size": args.prefill_step_size,
        # mlx_lm replaces entries of this very list when --kv-bits begins.
        "prompt_cache": caches if draft is None else caches + draft_caches,
    }
    if draft is not None:
        options |= {"draft_model": draft, "num_draft_tokens": args.num_draft_tokens}
    if args.kv_bits is not None:
        options |= {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size}
        options |= {"quantized_kv_start": args.quantized_kv_start}
    for text in stream(model, tokenizer, prompt, stats, progress=talk, **options):
        if not args.json:
            print(text, end="", flush=True)
    if args.json:
        print(json.dumps(stats.to_dict()))
    elif talk:
        print(f"\n{'=' * 10}\n{stats.summary()}")
    else:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
