"""Checks of a request's fields. Each returns the value as mlx_lm's server takes it, or refuses it and says why.

A chat's messages and tools are checked for their shape; whether the model's template takes them is found out later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .refusal import Refusal

# More than any of these fields can mean, and what 32-bit integers and floats hold.
LARGEST = (1 << 31) - 1


def shown(value: Any) -> str:
    """A value as error messages show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Number:
    """A number between `low` and `high`, both allowed; `whole`: an integer."""

    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False

    def read(self, name: str, value: Any) -> int | float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # NaN lies in no range.
        if not number or not self.low <= value <= self.high or (self.whole and value != int(value)):
            raise Refusal(f"{name} must be {self}, not {shown(value)}", param=name)
        return int(value) if self.whole else float(value)

    def __str__(self) -> str:
        what = "an integer" if self.whole else "a number"
        low, high = (str(int(x)) if x == int(x) else f"{x:g}" for x in (self.low, self.high))
        return f"{what} from {low} to {high}"


NUMBERS = {
    "max_tokens": Number(1, whole=True),
    "max_completion_tokens": Number(1, whole=True),
    "temperature": Number(0),
    "top_p": Number(0, 1),
    "top_k": Number(0, whole=True),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(0),
    "presence_penalty": Number(),
    "frequency_penalty": Number(),
    "repetition_context_size": Number(0, whole=True),
    "presence_context_size": Number(0, whole=True),
    "frequency_context_size": Number(0, whole=True),
    "xtc_probability": Number(0, 1),
    "xtc_threshold": Number(0, 0.5),
    "top_logprobs": Number(-1, 11, whole=True),
    "num_draft_tokens": Number(0, whole=True),
    "seed": Number(-(1 << 63), (1 << 64) - 1, whole=True),
}
FLAGS = ("stream", "logprobs")
OBJECTS = ("chat_template_kwargs", "role_mapping", "stream_options")


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false, not {shown(value)}", param=name)
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refusal(f"{name} must be a string, not {shown(value)}", param=name)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(f"{name} must be an object, not {shown(value)}", param=name)
    return value


def items(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Refusal(f"{name} must be a list, not {shown(value)}", param=name)
    return value


def stop_words(value: Any) -> list[str]:
    """A string or a list of strings. Empty ones stop nothing and are left out."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise Refusal(
            f"stop must be a string or a list of strings, not {shown(value)}; token ids are not taken", param="stop"
        )
    return [w for w in words if w]


def logit_bias(value: Any) -> dict[str, float]:
    """Token ids, which JSON has as strings, to finite numbers. Ids are held against the vocabulary later."""
    bias = {}
    for key, amount in mapping("logit_bias", value).items():
        if not (isinstance(key, str) and key.isdecimal() and key.isascii()):
            raise Refusal(f"logit_bias: keys are token ids, {shown(key)} is none", param="logit_bias")
        bias[key] = Number().read(f"logit_bias[{key}]", amount)
    return bias


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in value)


def prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four forms: a string, strings, token ids, lists of token ids."""
    many = value if isinstance(value, list) and value and not _is_tokens(value) else [value]
    strings = all(isinstance(p, str) for p in many)
    if not strings and not all(_is_tokens(p) for p in many):
        raise Refusal(
            f"prompt must be a string, a list of strings, a list of token ids or a list of such lists, "
            f"not {shown(value)}",
            param="prompt",
        )
    # The tokenizer decides about a single empty string; among others it would break off their answers.
    if [] in many or (len(many) > 1 and "" in many):
        raise Refusal("prompt is empty: no token to begin with", param="prompt")
    return many


def messages(value: Any) -> list[dict[str, Any]]:
    """A chat's messages, with their reasoning under both names that templates look for."""
    found = items("messages", value)
    if not found:
        raise Refusal("messages is empty: there is nothing to answer", param="messages")
    return [_message(f"messages[{i}]", m) for i, m in enumerate(found)]


def _message(name: str, value: Any) -> dict[str, Any]:
    message = dict(mapping(name, value))
    text(f"{name}.role", message.get("role"))
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = text(f"{name}.content[{i}].type", mapping(f"{name}.content[{i}]", part).get("type"))
            if kind == "text":
                text(f"{name}.content[{i}].text", part.get("text"))
    elif not isinstance(content, str | None):
        raise Refusal(f"{name}.content must be a string or a list of parts, not {shown(content)}", param="messages")
    if message.get("tool_calls") is None:
        message.pop("tool_calls", None)
    for i, call in enumerate(items(f"{name}.tool_calls", message.get("tool_calls", []))):
        where = f"{name}.tool_calls[{i}].function"
        text(f"{where}.name", mapping(where, mapping(where, call).get("function")).get("name"))
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        message |= {"reasoning": thought, "reasoning_content": thought}
    return message


def tools(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools the model is shown: none under `tool_choice` "none"."""
    found = items("tools", body.get("tools", []))
    for i, tool in enumerate(found):
        where = f"tools[{i}]"
        if mapping(where, tool).get("type") != "function":
            raise Refusal(f'{where}.type must be "function", not {shown(tool.get("type"))}', param="tools")
        function = mapping(f"{where}.function", tool.get("function"))
        text(f"{where}.function.name", function.get("name"))
        if function.get("parameters") is not None:
            parameters = mapping(f"{where}.function.parameters", function["parameters"])
            mapping(f"{where}.function.parameters.properties", parameters.get("properties") or {})
    return [] if body.get("tool_choice") == "none" else found
