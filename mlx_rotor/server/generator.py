"""Stop words found in text, wherever tokens begin and end. mlx_lm finds only words that come as its own tokens.

mlx_lm.server's generation thread, which here outlives what goes wrong in it, and its cache of prompts.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server as stock
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..errors import RotorError
from .provider import Provider
from .refusal import Refusal, Unanswered


def first(text: str, words: list[str]) -> int:
    """Where the word that is complete first begins in `text`; -1 where none stands in it."""
    found = [(at + len(word), at) for word in words if (at := text.find(word)) >= 0]
    return min(found)[1] if found else -1


def begun(text: str, words: list[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of a word."""
    longest = min(len(text), max(map(len, words)) - 1)
    return next((n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in words)), 0)


def until_stop(
    responses: Iterator[Any], words: list[str], ends: set[int], decode: Callable[[int], str]
) -> Iterator[Any]:
    """mlx_lm's responses up to the first of `words`, which is left out, as is all that follows.

    mlx_lm's handler drops the text of a response that says "stop": what is left to say is put into the one before,
    which is therefore held until the next has come.

    Args:
        ends: tokens that end a turn.
        decode: a token's text, for the token that completed a word among mlx_lm's own stops.
    """
    held, before = "", None
    for r in responses:
        ended = r.finish_reason == "stop" and r.token in ends
        stopped = r.finish_reason == "stop" and not ended
        text = held + ("" if ended else r.text or (decode(r.token) if stopped else ""))
        at = first(text, words)
        if ended or stopped or at >= 0:
            left = text if ended else text[: max(at, 0)]
            if before is not None:
                yield replace(before, text=before.text + left)
            elif left:
                yield replace(r, text=left, finish_reason=None)
            yield replace(r, text="", finish_reason="stop")
            return
        safe = len(text) - (begun(text, words) if r.finish_reason is None else 0)
        held = text[safe:]
        if before is not None:
            yield before
        before = replace(r, text=text[:safe])
    if before is not None:
        yield before


log = logging.getLogger(__name__)


class PromptCache(stock.LRUPromptCache):
    """Always leaves a token of the prompt to run: without one there are no logits to go on from."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest or cache is None:
            return cache, rest
        if can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1) == 1:
            return cache, tokens[-1:]
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, rest + tokens[-1:]


def as_refusal(error: BaseException) -> Refusal:
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
    """One thread that owns model and caches.

    Attributes:
        loaded: set once the default model is loaded, or has failed to.
        failure: why it failed.
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
                # What a batch was at is lost; the model and the stored prompts are not. Ranks must not part ways, and
                # what fails without a request would fail again.
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
        """As mlx_lm's.

        Raises:
            Unanswered: nothing can be generated; says why.
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
                # No rank may leave off before the others: the rest is taken in and not shown.
                responses = chain(responses, (r for r in generated if False))
        return ctx, responses
