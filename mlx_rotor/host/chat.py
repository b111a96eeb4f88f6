"""mlx_lm's chat over a compressed cache: its prompt, its commands (q, r, h) and its turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm import cli_ui, stream_generate
from mlx_lm.utils import sharded_load

from ..cache import Scheme
from ..errors import RotorError
from . import prompting
from .attachment import attach, make_prompt_cache
from .experts import attach_experts
from .generation import stock_sampler
from .loading import load, located, run_dtype
from .session import cache_line, expert_lines


class _Screen(cli_ui.ChatUI):
    """mlx_lm's chat screen under this package's name, with what became of caches and experts in its first lines."""

    def __init__(self, args: argparse.Namespace, rank: int, lines: list[str]) -> None:
        super().__init__(args, rank=rank)
        self._lines = lines

    def __enter__(self) -> _Screen:
        if self._rank == 0:
            rows = [("model", str(self._args.model or "bundled")), ("max tokens", f"{self._args.max_tokens:,}")]
            rows += [("adapter", self._args.adapter_path)] if self._args.adapter_path else []
            rows += [("system", self._args.system_prompt)] if self._args.system_prompt else []
            cli_ui.print_header_panel(self._console, "mlx_rotor chat", rows)
            print("\n".join(self._lines))
            cli_ui.print_chat_help(self._console)
        return self

    def asked(self) -> str:
        """What the user types; the end of the input ends the chat."""
        try:
            return self.prompt()
        except EOFError:
            return "q"


def chat(args: argparse.Namespace, scheme: Scheme | None, name: str, why: str = "") -> None:
    """Chats until `q` or the end of the input, as `mlx_lm.chat` does.

    Args:
        args: parsed flags of `mlx_lm.chat`, with `experts` (auto, fused or stock) beside them.
        scheme: of the KV cache, which holds the whole chat; None leaves it to mlx_lm.
        name, why: what the first lines call that cache, and why it is exact where it is.

    Raises:
        RotorError: a model or chat template that is no good, flags that contradict each other; as `attach`.
    """
    group = mx.distributed.init()
    mx.random.seed(args.seed)
    model, tokenizer = _loaded(args, group)
    if not tokenizer.has_chat_template:
        raise RotorError("this model has no chat template; use mlx_rotor generate")
    if scheme:
        attach(model, scheme)

    def fresh() -> list[Any]:
        return make_prompt_cache(model, scheme, max_kv_size=args.max_kv_size)

    experts = attach_experts(model, args.experts)
    lines = [cache_line(name, fresh(), why), *expert_lines(experts)]
    with _Screen(args, group.rank(), lines) as screen:
        _turns(args, model, tokenizer, screen, fresh)


def _loaded(args: argparse.Namespace, group: Any) -> tuple[Any, Any]:
    """(model, tokenizer), in parts where several machines share it."""
    if group.size() == 1:
        model, tokenizer = load(
            args.model,
            adapter_path=args.adapter_path,
            tokenizer_config={"trust_remote_code": args.trust_remote_code},
            trust_remote_code=args.trust_remote_code,
        )
        return model, tokenizer
    if args.adapter_path:
        raise RotorError("--adapter-path: mlx_lm takes no adapters on several machines; leave it out")
    shares = (group, None) if args.pipeline else (None, group)
    model, tokenizer = sharded_load(located(args.model), *shares, trust_remote_code=args.trust_remote_code)[:2]
    run_dtype(model)
    return model, tokenizer


def _turns(
    args: argparse.Namespace, model: Any, tokenizer: Any, screen: _Screen, fresh: Callable[[], list[Any]]
) -> None:
    caches = fresh()
    sampler = stock_sampler(args, tokenizer)
    while (query := screen.asked()) != "q":
        if query == "r":
            caches = fresh()
            screen.say_reset()
            continue
        if query == "h":
            screen.say_help()
            continue
        messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt is not None else []
        messages.append({"role": "user", "content": query})
        prompt = prompting.templated(tokenizer, messages, add_generation_prompt=True)
        options = {"max_tokens": args.max_tokens, "prefill_step_size": args.prefill_step_size}
        last = None
        for last in stream_generate(model, tokenizer, prompt, sampler=sampler, prompt_cache=caches, **options):
            screen.stream_token(last.text)
        screen.end_turn(last)
    screen.say_bye()
