"""Several prompts in one completion request: each is answered like a request of its own, and the answers are joined."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from .handler import Handler
from .refusal import Refusal

DONE = b"data: [DONE]\n\n"


class ChoicesHandler(Handler):
    """Answers one request with any number of prompts."""

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answers one prompt as `Handler` does, several at the same time."""
        if len(self.asked.prompts) > 1:
            answer_all(self, request, stop_words)
        else:
            super().handle_completion(request, stop_words)


class Choice(Handler):
    """Answers one of several prompts: writes bodies and events to `out`, and no headers."""

    def __init__(self, parent: Handler, index: int, out: Any) -> None:
        # The connection has been read: there is nothing for the bases' __init__ to do.
        self.__dict__.update(parent.__dict__)
        self.index, self.wfile = index, out
        self.asked = replace(parent.asked, prompts=[parent.asked.prompts[index]])
        self.refusal: Refusal | None = None

    def send_response(self, code: int, message: str | None = None) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        pass

    def end_headers(self) -> None:
        pass

    def refuse(self, refusal: Refusal) -> None:
        self.refusal = refusal


def summed(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """Token counts of all choices together."""
    total = {k: sum(u[k] for u in usages) for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
    cached = [u["prompt_tokens_details"]["cached_tokens"] for u in usages if "prompt_tokens_details" in u]
    return total | ({"prompt_tokens_details": {"cached_tokens": sum(cached)}} if cached else {})


class Events:
    """A stream that several choices write to. The first event sends headers; `close` sends the usage and the end."""

    def __init__(self, parent: Handler) -> None:
        self.parent, self.lock = parent, threading.Lock()
        self.usages: list[dict[str, Any]] = []

    def write(self, data: bytes) -> None:
        if data == DONE:
            return
        if data.startswith(b"data: "):
            event = json.loads(data[len(b"data: ") :])
            if not event["choices"]:
                self.usages.append(event)
                return
        with self.lock:
            if not self.parent.began_stream:
                self.parent._set_stream_headers(200)
                self.parent.end_headers()
            self.parent.wfile.write(data)
            self.parent.wfile.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self.usages:
            last = self.usages[0] | {"usage": summed([u["usage"] for u in self.usages])}
            self.parent.wfile.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        self.parent.wfile.write(DONE)
        self.parent.wfile.flush()


def answer_all(parent: Handler, request: Any, stop_words: list[str]) -> None:
    """Answers every prompt of `parent.asked` at the same time; the first refusal stands for all of them."""
    prompts = parent.asked.prompts
    events = Events(parent) if parent.stream else None
    choices = [Choice(parent, i, events or io.BytesIO()) for i in range(len(prompts))]

    def answer(choice: Choice) -> None:
        choice.handle_completion(replace(request, prompt=prompts[choice.index]), stop_words)

    workers = min(len(prompts), parent.response_generator.cli_args.decode_concurrency)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(answer, choices))
    refused = [c.refusal for c in choices if c.refusal is not None]
    if refused:
        parent.refuse(refused[0])
    elif events is not None:
        events.close()
    else:
        answers = [json.loads(c.wfile.getvalue()) for c in choices]
        whole = answers[0] | {
            "choices": [choice for answer in answers for choice in answer["choices"]],
            "usage": summed([answer["usage"] for answer in answers]),
        }
        parent.send(json.dumps(whole).encode())
