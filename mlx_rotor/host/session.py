"""A model opened by mlx_lm's flags, with its caches, experts and prompt, ready to generate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..cache import Scheme
from ..errors import RotorError
from . import prompting
from .attachment import attach, make_prompt_cache, stock_cache
from .experts import attach_experts, mode_of_draft
from .generation import Stats, stock_sampler, stream
from .loading import load
from .prompt_files import fit_prompt_cache, read_prompt_cache
from .prompting import Prompt
from .report import ExpertReport, describe


@dataclass
class Session:
    """One prompt and all that continues it; `text` runs it, `stats` fills meanwhile.

    Attributes:
        options: keyword arguments of `mlx_lm.stream_generate`.
        drafts: what became of the draft model's experts; None without a draft model.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt
    stats: Stats
    options: dict[str, Any]
    drafts: ExpertReport | None = None

    def text(self, progress: bool = False) -> Iterator[str]:
        """Yields the continuation piece by piece. Raises RotorError where mlx_lm refuses an option."""
        return stream(self.model, self.tokenizer, self.prompt, self.stats, progress=progress, **self.options)

    def headline(self, why: str = "") -> str:
        """One line on the caches, one on each model's experts. `why`: why the caches are left exact."""
        lines = [cache_line(self.stats.kv_scheme, self.stats.caches, why), *expert_lines(self.stats.experts)]
        lines += [f"The draft model's experts: {self.drafts.describe()}"] if self.drafts and self.drafts.layers else []
        return "\n".join(lines)


def cache_line(name: str, caches: Sequence[Any], why: str) -> str:
    """As in `KV cache trellis3: layers 0-7: …`, or why the caches called `name` are exact."""
    return f"KV cache {name}: {why or describe(caches)}"


def expert_lines(experts: ExpertReport | None) -> list[str]:
    """A line on a model's experts, or none for a model without."""
    return [f"Experts: {experts.describe()}"] if experts and experts.layers else []


def session(args: argparse.Namespace, text: str, scheme: Scheme | None, name: str) -> Session:
    """Opens what the flags of `mlx_lm.generate` ask for and prepares to continue `text`.

    Args:
        args: parsed flags of `mlx_lm.generate`, with `experts` (auto, fused or stock) beside them.
        text: the prompt, before the chat template.
        scheme: of the KV cache; None leaves it to mlx_lm.
        name: what the output calls that cache.

    Raises:
        RotorError: a model, prompt-cache file, draft model, token or template that is no good; as `attach`.
    """
    caches, metadata = _from_file(args)
    config = json.loads(metadata.get("tokenizer_config", "{}")) | {"trust_remote_code": args.trust_remote_code}
    if args.seed is not None:
        mx.random.seed(args.seed)
    model, tokenizer, model_config = load(
        args.model or metadata.get("model"),
        adapter_path=args.adapter_path,
        tokenizer_config=config,
        model_config={"quantize_activations": args.quantize_activations},
        trust_remote_code=args.trust_remote_code,
        return_config=True,
    )
    for token in args.extra_eos_token:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as e:
            raise RotorError(f"--extra-eos-token {token}: no token of this tokenizer") from e
    draft = _draft(args.draft_model, tokenizer)
    prompt = _prompt(args, model, model_config, tokenizer, text, after_cache=caches is not None)
    if scheme:
        attach(model, scheme)
    if caches is None:
        caches = make_prompt_cache(model, scheme, max_kv_size=args.max_kv_size)
    else:
        caches = fit_prompt_cache(args.prompt_cache_file, caches, model, scheme, args.max_kv_size)
    options: dict[str, Any] = {
        "max_tokens": args.max_tokens,
        "sampler": stock_sampler(args, tokenizer),
        "prefill_step_size": args.prefill_step_size,
        # mlx_lm replaces entries of this very list when --kv-bits begins.
        "prompt_cache": caches if draft is None else caches + stock_cache(draft),
    }
    stats = Stats(name, caches, attach_experts(model, args.experts))
    drafts = None
    if draft is not None:
        drafts = attach_experts(draft, mode_of_draft(args.experts))
        options |= {"draft_model": draft, "num_draft_tokens": args.num_draft_tokens}
    if args.kv_bits is not None:
        options |= {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size}
        options |= {"quantized_kv_start": args.quantized_kv_start}
    return Session(model, tokenizer, prompt, stats, options, drafts)


def _from_file(args: argparse.Namespace) -> tuple[list[Any] | None, dict[str, Any]]:
    """Caches and metadata of --prompt-cache-file, or nothing where there is none."""
    if not args.prompt_cache_file:
        return None, {}
    caches, metadata = read_prompt_cache(args.prompt_cache_file)
    if args.model not in (None, metadata.get("model", args.model)):
        raise RotorError(f"{args.prompt_cache_file} was made with {metadata.get('model')}, not {args.model}")
    return caches, metadata


def _draft(path: str | None, tokenizer: Any) -> Any:
    """The draft model, or None."""
    if not path:
        return None
    draft, other = load(path)
    if other.vocab_size != tokenizer.vocab_size:
        raise RotorError(
            f"--draft-model {path} has {other.vocab_size} tokens in its vocabulary and the model "
            f"{tokenizer.vocab_size}: a draft model must share the model's tokenizer"
        )
    return draft


def _prompt(
    args: argparse.Namespace, model: Any, config: dict[str, Any], tokenizer: Any, text: str, *, after_cache: bool
) -> Prompt:
    rendered = tokenizer.has_chat_template and not args.ignore_chat_template
    if rendered:
        text = prompting.render(
            tokenizer,
            text,
            system=args.system_prompt,
            prefill=args.prefill_response,
            template_config=args.chat_template_config,
            after_cache=after_cache,
        )
    if args.image:
        return prompting.encode_with_images(model, config, tokenizer, text, args.image, rendered=rendered)
    return prompting.encode(tokenizer, text, rendered=rendered)
