"""Several prompts in one completion request: each is answered as one would be, and the answers become one.

mlx_lm.server's HTTP handler behind a reader of requests: what it can't serve is refused before it gets there.
"""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from mlx_lm import server as stock

from .generator import Generator, as_refusal
from .refusal import Refusal, Unanswered

DONE = b"data: [DONE]\n\n"


log = logging.getLogger(__name__)

PATHS = {"/v1/completions": "text", "/v1/chat/completions": "chat", "/chat/completions": "chat"}
MODELS = "/v1/models"


@dataclass(frozen=True)
class Asked:
    """A request that was read.

    Attributes:
        body: JSON that mlx_lm's handler takes, with nothing in it that it stumbles over.
        model: the name that answers carry.
        prompts: text or token ids of each choice; empty in a chat.
    """

    body: dict[str, Any]
    model: str
    prompts: list[str | list[int]]


class Reader(Protocol):
    """What a server understands. Both methods may raise `Refusal`."""

    def read(self, kind: str, raw: bytes) -> Asked:
        """A request's body; `kind` is "chat" or "text"."""

    def models(self) -> list[dict[str, Any]]:
        """The models that can be asked for, as OpenAI lists them."""


class Handler(stock.APIHandler):
    """Answers requests; `index` is the number of the choice an answer is."""

    index = 0
    response_generator: Generator
    wfile: Any

    def __init__(self, generator: Generator, reader: Reader, *args: Any, **kwargs: Any) -> None:
        self.reader = reader
        self._began_stream = False
        super().__init__(generator, *args, **kwargs)

    # ---- requests

    def do_POST(self) -> None:
        self.path = urlsplit(self.path).path
        try:
            kind = PATHS.get(self.path)
            if kind is None:
                raise self._no_such_path()
            self.asked = self.reader.read(kind, self._read_body())
            with self._body_replaced():
                super().do_POST()
        except Refusal as e:
            self.refuse(e)
        except ConnectionError as e:
            log.debug("the client left: %s", e)
        except Exception as e:
            log.exception("a request was not answered")
            self.refuse(as_refusal(e))

    def do_GET(self) -> None:
        self.path = urlsplit(self.path).path
        try:
            if self.path == "/health":
                self.handle_health_check()
            elif self.path == MODELS or self.path.startswith(MODELS + "/"):
                self.handle_models_request()
            else:
                raise self._no_such_path()
        except Refusal as e:
            self.refuse(e)
        except ConnectionError as e:
            log.debug("the client left: %s", e)

    def _no_such_path(self) -> Refusal:
        there = f"POST to {', '.join(PATHS)}, GET of {MODELS} and /health"
        return Refusal(f"{self.command} {self.path} is not served here; there are {there}", status=404)

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refusal("a Content-Length header is needed", status=411)
        if not length.strip().isdecimal():
            raise Refusal(f"Content-Length: {length!r} is no length")
        return self.rfile.read(int(length))

    @contextmanager
    def _body_replaced(self) -> Iterator[None]:
        """mlx_lm's handler reads the request itself: it is given what became of it."""
        data, connection = json.dumps(self.asked.body).encode(), self.rfile
        self.headers.replace_header("Content-Length", str(len(data)))
        self.rfile = io.BytesIO(data)
        try:
            yield
        finally:
            self.rfile = connection

    # ---- answers

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        if len(self.asked.prompts) > 1:
            pass

            answer_all(self, request, stop_words)
        else:
            if self.asked.prompts:
                request.prompt = self.asked.prompts[0]
            self.complete(request, stop_words)

    def complete(self, request: Any, stop_words: list[str]) -> None:
        """One choice, by mlx_lm's handler."""
        try:
            super().handle_completion(request, stop_words)
        except Unanswered as e:
            self.refuse(e.refusal)
        except ConnectionError:
            raise
        except Exception as e:
            log.exception("an answer broke off")
            self.refuse(as_refusal(e))

    def refuse(self, refusal: Refusal) -> None:
        """Sends a refusal: as the answer, or as the last event of a stream that has begun."""
        data = json.dumps(refusal.body()).encode()
        if self._began_stream:
            self.wfile.write(b"data: " + data + b"\n\n")
            self.wfile.flush()
            return
        self._headers_buffer: list[bytes] = []  # what an answer may have put there
        self._send(data, refusal.status)

    def _send(self, data: bytes, status: int = 200) -> None:
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._began_stream = True

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = super().generate_response(*args, **kwargs)
        response["model"] = self.asked.model
        choice = response["choices"][0]
        choice["index"] = self.index
        said = choice.get("message") or choice.get("delta") or {}
        if "reasoning" in said:
            said["reasoning_content"] = said["reasoning"]
        return response

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        named = {"model": self.asked.model, "object": self.object_type}
        return super().completion_usage_response(*args, **kwargs) | named

    # ---- what is served

    def handle_health_check(self) -> None:
        generator = self.response_generator
        healthy, provider = generator.is_healthy, generator.model_provider
        said = {
            "status": "ok" if healthy else "unavailable",
            "model": provider.model_key[0] if provider.model_key else None,
            "kv": provider.kv,
            "experts": provider.expert_report.to_dict() if provider.expert_report else None,
            "batching": provider.is_batchable,
        }
        self._send(json.dumps(said).encode(), 200 if healthy else 503)

    def handle_models_request(self) -> None:
        models = [m | {"created": self.created} for m in self.reader.models()]
        name = unquote(self.path[len(MODELS) + 1 :])
        if not name:
            self._send(json.dumps({"object": "list", "data": models}).encode())
            return
        found = [m for m in models if m["id"] == name]
        if not found:
            raise Refusal(f"there is no model {name!r} here", param="model", status=404, code="model_not_found")
        self._send(json.dumps(found[0]).encode())


class Choice(Handler):
    """A handler for one of several prompts: writes bodies and events to `out`, and no headers."""

    def __init__(self, parent: Handler, index: int, out: Any) -> None:
        # The connection has been read: there is nothing for the bases' __init__ to do.
        self.__dict__.update(parent.__dict__)
        self.index, self.wfile = index, out
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
    """A stream that several choices write to. Headers go out with the first event, usage and the end with `close`."""

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
            if not self.parent._began_stream:
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
        choice.complete(replace(request, prompt=prompts[choice.index]), stop_words)

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
        parent._send(json.dumps(whole).encode())
