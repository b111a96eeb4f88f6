"""mlx_lm.server's HTTP handler behind our reader of requests, which refuses what the handler can't serve."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm import server as stock

from .generator import Generator, as_refusal
from .reader import OpenAIReader
from .refusal import Refusal, Unanswered

log = logging.getLogger(__name__)

PATHS = {"/v1/completions": "text", "/v1/chat/completions": "chat", "/chat/completions": "chat"}
MODELS = "/v1/models"


class Handler(stock.APIHandler):
    """Answers one request with one prompt. `index` is the number that its answer has among a request's choices."""

    index = 0
    response_generator: Generator
    wfile: Any

    def __init__(self, generator: Generator, reader: OpenAIReader, *args: Any, **kwargs: Any) -> None:
        self.reader = reader
        self.began_stream = False
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
        """Gives mlx_lm's handler, which reads the connection itself, the body that the reader made."""
        data, connection = json.dumps(self.asked.body).encode(), self.rfile
        self.headers.replace_header("Content-Length", str(len(data)))
        self.rfile = io.BytesIO(data)
        try:
            yield
        finally:
            self.rfile = connection

    # ---- answers

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        """Answers through mlx_lm's handler; whatever goes wrong becomes a refusal."""
        if len(self.asked.prompts) == 1:
            request.prompt = self.asked.prompts[0]
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
        """Sends a refusal as the answer, or as the last event of a stream that has begun."""
        data = json.dumps(refusal.body()).encode()
        if self.began_stream:
            self.wfile.write(b"data: " + data + b"\n\n")
            self.wfile.flush()
            return
        self._headers_buffer: list[bytes] = []  # without headers that a broken-off answer has put there
        self.send(data, refusal.status)

    def send(self, data: bytes, status: int = 200) -> None:
        """Sends a whole JSON answer."""
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self.began_stream = True

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = super().generate_response(*args, **kwargs)
        response["model"] = self.asked.model
        choice = response["choices"][0]
        choice["index"] = self.index
        message = choice.get("message") or choice.get("delta") or {}
        if "reasoning" in message:
            message["reasoning_content"] = message["reasoning"]
        return response

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        named = {"model": self.asked.model, "object": self.object_type}
        return super().completion_usage_response(*args, **kwargs) | named

    # ---- what is served

    def handle_health_check(self) -> None:
        generator = self.response_generator
        healthy, provider = generator.is_healthy, generator.model_provider
        state = {
            "status": "ok" if healthy else "unavailable",
            "model": provider.model_key[0] if provider.model_key else None,
            "kv": provider.kv,
            "experts": provider.expert_report.to_dict() if provider.expert_report else None,
            "batching": provider.is_batchable,
        }
        self.send(json.dumps(state).encode(), 200 if healthy else 503)

    def handle_models_request(self) -> None:
        models = [m | {"created": self.created} for m in self.reader.models()]
        name = unquote(self.path[len(MODELS) + 1 :])
        if not name:
            self.send(json.dumps({"object": "list", "data": models}).encode())
            return
        found = [m for m in models if m["id"] == name]
        if not found:
            raise Refusal(f"there is no model {name!r} here", param="model", status=404, code="model_not_found")
        self.send(json.dumps(found[0]).encode())
