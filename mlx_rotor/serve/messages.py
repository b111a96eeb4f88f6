"""Checks of a chat's messages and tools: their shape, not whether the model's template likes them."""

from __future__ import annotations

from typing import Any

from ..host.serving import Refusal
from .fields import items, mapping, shown, text


def messages(value: Any) -> list[dict[str, Any]]:
    """Messages with their reasoning under both names templates look for."""
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
