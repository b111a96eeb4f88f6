"""A prompt run through a model for its KV cache alone, and the file that keeps it."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import Scheme
from . import prompting, report
from .attachment import make_prompt_cache
from .experts import attach_experts
from .generation import fill
from .loading import load
from .prompt_files import save_prompt_cache
from .report import ExpertReport
from .session import cache_line, expert_lines


@dataclass
class CachedPrompt:
    """A model and a prompt's `tokens` on their way into `caches`; `write` runs them and writes the file."""

    model: Any
    tokens: list[int]
    caches: list[Any]
    experts: ExpertReport
    path: str
    metadata: dict[str, str]

    def headline(self, name: str, why: str) -> str:
        """One line on the caches called `name` (`why`: why they are exact) and one on the experts."""
        return "\n".join([cache_line(name, self.caches, why), *expert_lines(self.experts)])

    def write(self, progress: bool = False) -> Path:
        """Runs the prompt and writes the file; returns its path. Raises RotorError where it can't be written."""
        fill(self.model, self.tokens, self.caches, progress=progress)
        return save_prompt_cache(self.path, self.caches, self.metadata)

    @property
    def nbytes(self) -> tuple[int, int]:
        """(bytes that the caches hold, bytes of the same tokens in fp16)."""
        return report.kv_bytes(self.caches), report.kv_bytes_fp16(self.caches)


def cached_prompt(args: argparse.Namespace, text: str, scheme: Scheme | None) -> CachedPrompt:
    """Opens what the flags of `mlx_lm.cache_prompt` ask for and prepares to run `text`.

    Args:
        args: parsed flags of `mlx_lm.cache_prompt`, with `experts` (auto, fused or stock) beside them.
        text: the prompt, before the chat template, which is left open for a continuation.
        scheme: of the KV cache; None leaves it to mlx_lm.

    Raises:
        RotorError: a model, template or scheme that is no good.
    """
    config = {"trust_remote_code": args.trust_remote_code}
    if args.eos_token is not None:
        config["eos_token"] = args.eos_token
    model, tokenizer = load(
        args.model, adapter_path=args.adapter_path, tokenizer_config=config, trust_remote_code=args.trust_remote_code
    )
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        tokens = prompting.templated(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    else:
        tokens = prompting.encode(tokenizer, text, rendered=False).tokens
    metadata = {"tokenizer_config": json.dumps(config)}
    if args.model is not None:  # The bundled model is where the package is: another place on another machine.
        metadata["model"] = args.model
    caches = make_prompt_cache(model, scheme, max_kv_size=args.max_kv_size)
    experts = attach_experts(model, args.experts)
    return CachedPrompt(model, tokens, caches, experts, args.prompt_cache_file, metadata)
