"""mlx_lm.server's generation thread, kept alive when a request fails, and its cache of prompts."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..errors import RotorError
from .provider import Provider
from .refusal import Refusal, Unanswered
from .stop_words import until_stop

log = logging.getLogger(__name__)


class PromptCache(stock.LRUPromptCache):
    """mlx_lm's cache of prompts, which here always leaves a token to run: without one there are no logits."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest or cache is None:
            return cache, rest
        if can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1) == 1:
            return cache, tokens[-1:]
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, rest + tokens[-1:]


def as_refusal(error: BaseException) -> Refusal:
    """The answer that tells a client of `error`: its own text for a RotorError, else that generation failed."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RotorError):
        return Refusal(str(error), param="model", code="model_not_loaded")
    return Refusal(f"generation failed: {error or type(error).__name__}", status=500, code="generation_failed")


def lenient(parser: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """A tool parser that reads arguments as plain strings where reading them by the tool's schema fails."""

    def parse(text: str, tools: Any) -> Any:
        try:
            return parser(text, tools)
        except (ArithmeticError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError) as e:
            log.warning("arguments of a tool call don't fit its schema (%s); they are passed on as strings", e)
            return parser(text, None)

    return parse


class Generator(stock.ResponseGenerator):
    """The thread that owns model and caches.

    Attributes:
        loaded: set once the default model is loaded or its loading has failed.
        failure: the error that loading ended with, None if it didn't.
    """

    model_provider: Provider

    def __init__(self, provider: Provider, prompt_cache: PromptCache) -> None:
        self.loaded = threading.Event()
        self.failure: Exception | None = None
        self._taken = 0
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        super().__init__(provider, prompt_cache)

    def _run_generate(self) -> None:
        try:
            self.model_provider.load_default()
        except Exception as e:
            self.failure, self._generation_failed = e, True
            return
        finally:
            self.loaded.set()
        while not self._stop:
            taken = self._taken
            try:
                self._generate()
            except Exception as e:
                log.exception("generation failed")
                # The requests of the batch are lost; the model and the stored prompts are not. Machines that share a
                # model must stay in step, and a failure without a request would come again.
                self._generation_failed = self._is_distributed or self._taken == taken
                for queue in list(self._waiting):
                    queue.put(as_refusal(e))
                if self._generation_failed:
                    return
            mx.clear_cache()

    def stop_and_join(self) -> None:
        super().stop_and_join()
        # Python calls a thread joined while MLX's thread-local objects still go away. If the interpreter begins to end
        # meanwhile, Linux aborts the process.
        thread = Path(f"/proc/self/task/{self._generation_thread.native_id}")
        for _ in range(1000):
            if not thread.exists():
                return
            time.sleep(0.005)

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        if request is not None:
            self._taken += 1
            self._waiting.add(request[0])
        return request

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        width = self.model_provider.logits
        if request.request_type == "text" and isinstance(request.prompt, list):
            prompt = request.prompt
            if any(t >= width for t in prompt):
                raise Refusal(f"prompt: token ids end at {width - 1}, {max(prompt)} is none", param="prompt")
            out = (prompt, [prompt], ["assistant"], "normal", None)
        else:
            param = "messages" if request.request_type == "chat" else "prompt"
            if "developer" not in str(tokenizer.chat_template):
                # A template passes over, or misreads, roles it does not know.
                request.messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in request.messages]
            try:
                out = super()._tokenize(tokenizer, request, args)
            except Exception as e:
                raise Refusal(f"{param}: the model's template can't take this: {e}", param=param) from e
            prompt = out[0]
            if not prompt:
                raise Refusal(f"{param} is empty: no token to begin with", param=param)
        if wrong := [t for t in args.logits.logit_bias or () if t >= width]:
            raise Refusal(f"logit_bias: token ids end at {width - 1}, {max(wrong)} is none", param="logit_bias")
        if args.sampling.top_k >= width:
            args.sampling.top_k = 0
        return out

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: list[str]) -> Any:
        stops, _ = super()._make_state_machine(model_key, tokenizer, stop_words)
        # mlx_lm's would take stop words out of the text and go on; `until_stop` finds them.
        _, text_machine = super()._make_state_machine(model_key, tokenizer, [])
        return stops, text_machine

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """mlx_lm's `generate`, with our stop words.

        Raises:
            Unanswered: nothing can be generated; its refusal says why.
        """
        try:
            ctx, responses = super().generate(request, generation_args, progress_callback)
        except Exception as e:
            raise Unanswered(as_refusal(e)) from e
        if ctx.tool_parser is not None:
            ctx.tool_parser = lenient(ctx.tool_parser)
        if request.request_type == "text":
            # A raw completion is text as it comes: nothing in it is reasoning or a tool call.
            ctx.text_sm, ctx.initial_state = stock.TextStateMachine(), "normal"
        if generation_args.stop_words:
            tokenizer, generated = self.model_provider.tokenizer, responses
            responses = until_stop(
                generated, generation_args.stop_words, tokenizer.eos_token_ids, lambda t: tokenizer.decode([t])
            )
            if self._is_distributed:
                # No machine may stop before the others: the rest is generated and not shown.
                responses = chain(responses, (r for r in generated if False))
        return ctx, responses
