"""OpenAI's requests, read into what mlx_lm's server takes. What can't be served as asked is refused, never ignored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .catalog import DEFAULT_NAME, Catalog, folder_with
from .fields import (
    FLAGS,
    NUMBERS,
    OBJECTS,
    flag,
    logit_bias,
    mapping,
    messages,
    prompts,
    shown,
    stop_words,
    text,
    tools,
)
from .refusal import Refusal

# Field -> the values that are served, and their description. Any other value is refused.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "1: one choice a request"),
    "best_of": ((1,), "1"),
    "echo": ((False,), "false"),
    "suffix": (("",), "left out: text is continued, not filled in"),
    "response_format": (({"type": "text"},), '{"type": "text"}: output is not constrained'),
    "tool_choice": (("auto", "none"), '"auto" or "none": a call is not forced'),
    "modalities": ((["text"],), '["text"]'),
    "audio": ((), "left out"),
    "functions": (([],), "left out: use tools"),
    "web_search_options": ((), "left out"),
}


@dataclass(frozen=True)
class Asked:
    """A request that has been read.

    Attributes:
        body: JSON that mlx_lm's handler takes without an error.
        model: the name that answers carry.
        prompts: text or token ids of each choice; empty in a chat.
    """

    body: dict[str, Any]
    model: str
    prompts: list[str | list[int]]


class OpenAIReader:
    """Reads requests to a server whose default model is `default`, a folder, a repository or None."""

    def __init__(self, default: str | None) -> None:
        self.catalog = Catalog(default)

    def models(self) -> list[dict[str, Any]]:
        """The models that can be asked for, in the form of OpenAI's list."""
        return self.catalog.list()

    def read(self, kind: str, raw: bytes) -> Asked:
        """Reads the body of a request; `kind` is "chat" or "text".

        Raises:
            Refusal: what can't be served, and why.
        """
        body = _body(raw)
        for name, (values, called) in ONLY.items():
            if name in body and not any(body[name] == v and type(body[name]) is type(v) for v in values):
                raise Refusal(f"{name} must be {called}; {shown(body[name])} is not supported", param=name)
        for name, number in NUMBERS.items():
            if name in body:
                body[name] = number.read(name, body[name])
        for name in FLAGS:
            if name in body:
                flag(name, body[name])
        for name in OBJECTS:
            if name in body:
                mapping(name, body[name])
        if "seed" in body:
            body["seed"] %= 1 << 64
        if "stop" in body:
            body["stop"] = stop_words(body["stop"])
        if "logit_bias" in body:
            body["logit_bias"] = logit_bias(body["logit_bias"])
        if "stream_options" in body:
            usage = body["stream_options"].get("include_usage")
            body["stream_options"] = {"include_usage": usage is not None and flag("include_usage", usage)}
        asked = self._model(body)
        if kind == "chat":
            if body.get("parallel_tool_calls") is False and body.get("tools"):
                raise Refusal("parallel_tool_calls must be true: calls are not held back", param="parallel_tool_calls")
            body["messages"] = messages(_needed(body, "messages"))
            body["tools"] = tools(body)
            return Asked(body, asked, [])
        found = prompts(_needed(body, "prompt"))
        return Asked(body | {"prompt": ""}, asked, found)

    def _model(self, body: dict[str, Any]) -> str:
        """Puts what mlx_lm's server knows the model by into `body`; returns what answers call it."""
        given = text("model", body["model"]) if "model" in body else None
        adapter = text("adapters", body["adapters"]) if "adapters" in body else None
        if adapter is not None:
            body["adapters"] = folder_with("adapter_config.json", adapter)
            if body["adapters"] is None:
                raise Refusal(f"there are no adapters in {shown(adapter)} here", param="adapters", status=404)
        body["model"] = self.catalog.resolve(given, adapted=adapter is not None)
        if "draft_model" in body and body["draft_model"] != DEFAULT_NAME:
            draft = text("draft_model", body["draft_model"])
            body["draft_model"] = Catalog(None).resolve(draft, param="draft_model")
        return self.catalog.name(given)


def _needed(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise Refusal(f"{name} is missing", param=name)
    return body[name]


def _body(raw: bytes) -> dict[str, Any]:
    """The fields of a request. null is OpenAI's way to say that a field was left out."""
    try:
        body = json.loads(raw.decode())
        if rb"\ud" in raw.lower():
            # Half a surrogate pair is JSON and no text: no tokenizer takes it.
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise Refusal(f"the request's body is not JSON: {e}") from e
    if not isinstance(body, dict):
        raise Refusal(f"the request's body must be a JSON object, not {shown(body)}")
    return {k: v for k, v in body.items() if v is not None}
