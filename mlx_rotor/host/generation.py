"""One generation through mlx_lm's own loop, with what it held and how fast it went."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from tqdm import tqdm

from ..errors import RotorError
from ..kernels import backend
from . import report
from .prompting import Prompt
from .report import ExpertReport

# `import mlx_lm.generate` would give the function of that name, not the module.
_generate = importlib.import_module("mlx_lm.generate")

# A prompt of fewer tokens is through before a bar could be read.
PROGRESS_FROM = 512


def stock_parser_of(command: str) -> argparse.ArgumentParser:
    """A fresh parser with every flag and default of mlx_lm's `command`: generate, chat or cache_prompt."""
    parser: argparse.ArgumentParser = importlib.import_module(f"mlx_lm.{command}").setup_arg_parser()
    return parser


def fill(model: Any, tokens: list[int], caches: list[Any], *, progress: bool = False) -> None:
    """Runs a prompt through `model` for its caches alone, in mlx_lm's chunks."""
    with tqdm(total=len(tokens), unit="tok", desc="prompt", leave=False, disable=None if progress else True) as bar:
        steps = _generate.generate_step(
            mx.array(tokens),
            model,
            max_tokens=0,
            prompt_cache=caches,
            prompt_progress_callback=lambda done, _: bar.update(done - bar.n),
        )
        for _ in steps:
            pass


SAMPLING = ("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability", "xtc_threshold")


def stock_sampler(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The sampler that mlx_lm makes of the flags of its `generate`, or of the fewer ones of its `chat`."""
    options = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    special = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
    return make_sampler(**options, xtc_special_tokens=special)


@dataclass
class Stats:
    """A run's figures; speeds in tokens a second, memory in GB (1e9 bytes), caches in bytes.

    `experts`: what became of the model's, which counts its calls; None where nothing was asked.
    """

    kv_scheme: str
    caches: Sequence[Any]
    experts: ExpertReport | None = None
    text: str = ""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    peak_memory_gb: float = 0.0
    finish_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        layers = report.layers(self.caches)
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "prompt_tps": round(self.prompt_tps, 3),
            "generation_tps": round(self.generation_tps, 3),
            "peak_memory_gb": round(self.peak_memory_gb, 4),
            "finish_reason": self.finish_reason,
            "kv_scheme": self.kv_scheme,
            "kv_backend": backend(),
            "kv_bytes": report.kv_bytes(self.caches),
            "kv_bytes_fp16": report.kv_bytes_fp16(self.caches),
            "layers_compressed": len(layers.compressed),
            "layers_total": layers.total,
            "layers_fallen_back": layers.fallen_back,
            "fused_calls": layers.fused_calls,
            "fallback_calls": layers.fallback_calls,
            "experts": self.experts.to_dict() if self.experts and self.experts.layers else None,
        }

    def summary(self) -> str:
        """The lines a person reads after a run."""
        d, layers = self.to_dict(), report.layers(self.caches)
        lines = [
            f"Prompt: {self.prompt_tokens} tokens, {self.prompt_tps:.3f} tokens-per-sec",
            f"Generation: {self.generation_tokens} tokens, {self.generation_tps:.3f} tokens-per-sec",
            f"Peak memory: {self.peak_memory_gb:.3f} GB",
            *self._cache_lines(d["kv_bytes"], d["kv_bytes_fp16"], layers),
        ]
        if layers.fallen_back:
            lines.append(f"Warning: layers {report.spans(layers.fallen_back)} attended to expanded keys and values")
        if self.experts and self.experts.fused:
            lines += self.experts.calls()
        return "\n".join(lines)

    def _cache_lines(self, held: int, fp16: int, layers: report.LayerReport) -> list[str]:
        line = f"KV cache ({self.kv_scheme}): {held / 1e6:.3f} MB held"
        counts = f"{len(layers.exact)} left alone, {len(layers.fallen_back)} fallen back"
        if layers.compressed and not report.packed_tokens(self.caches):
            return [
                f"{line}; too few tokens to compress: the first and the most recent ones stay exact",
                f"Layers: {len(layers.compressed)} of {layers.total} ready to compress, {counts}",
            ]
        return [
            f"{line}; the same tokens in fp16: {fp16 / 1e6:.3f} MB"
            + (f" ({fp16 / held:.2f}x)" if layers.compressed else ""),
            f"Layers: {len(layers.compressed)} of {layers.total} compressed, {counts}; attention calls: "
            f"{layers.fused_calls} on packed tokens, {layers.fallback_calls} on expanded ones",
        ]


def stream(
    model: Any, tokenizer: Any, prompt: Prompt, stats: Stats, *, progress: bool = False, **options: Any
) -> Iterator[str]:
    """Yields text as it comes and fills `stats`. `options` go to `mlx_lm.stream_generate`.

    Raises:
        RotorError: mlx_lm refuses the options.
    """
    bar = None
    if progress and len(prompt.tokens) >= PROGRESS_FROM and "draft_model" not in options:
        bar = tqdm(total=len(prompt.tokens), unit="tok", desc="prompt", leave=False, disable=None)

        def report_progress(done: int, total: int) -> None:
            bar.update(done - bar.n)
            if done >= total:
                bar.close()

        options["prompt_progress_callback"] = report_progress
    if prompt.embeddings is not None:
        options["input_embeddings"] = prompt.embeddings
    mx.reset_peak_memory()
    try:
        for r in stream_generate(model, tokenizer, mx.array(prompt.tokens), **options):
            stats.text += r.text
            stats.prompt_tokens, stats.prompt_tps = r.prompt_tokens, r.prompt_tps
            stats.generation_tokens, stats.generation_tps = r.generation_tokens, r.generation_tps
            stats.peak_memory_gb, stats.finish_reason = r.peak_memory, r.finish_reason
            yield r.text
    except (ValueError, NotImplementedError) as e:
        raise RotorError(str(e)) from e
    finally:
        if bar is not None:
            bar.close()
