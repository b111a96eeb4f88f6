"""Chats answered and tools called: real greedy generation, scored on what the user or the tool would receive."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo import MODEL
from ..errors import RotorError
from .conversations import Chat, recall, tool_answer, tool_call
from .feed import Cache, prefill, step

REPLY_LIMIT = 128
FILLER = 256


@dataclass(frozen=True)
class ChatTrial:
    chat: Chat
    prompt: list[int]


def suits(tokenizer: Any) -> bool:
    """True for the bundled model's template: it, and what is quantized from it, was trained on these chats."""
    return tokenizer.chat_template == (MODEL / "chat_template.jinja").read_text()


def draw(tokenizer: Any, count: int, seed: int, filler: Sequence[int]) -> list[ChatTrial]:
    """`count` chats in turn: a code recalled, a tool called, a tool's answer reported.

    Every second recall has `FILLER` tokens of `filler` between the codes and the question, so that what is recalled
    has left the exact recent tokens of a compressed cache.

    Raises:
        RotorError: the tokenizer's chat template knows no tools.
    """
    if count and not (tokenizer.has_chat_template and tokenizer.has_tool_calling):
        raise RotorError("--chats needs a tokenizer whose chat template has tool calls; use --chats 0")
    rng, trials = random.Random(f"chat {seed}"), []
    for i in range(count):
        if i % 6 == 0 and len(filler) > FILLER:
            at = rng.randrange(len(filler) - FILLER)
            chat = recall(rng, tokenizer.decode(list(filler[at : at + FILLER])))
        else:
            chat = (recall, tool_call, tool_answer)[i % 3](rng)
        prompt = tokenizer.apply_chat_template(chat.prompt, tools=chat.tools, tokenize=True, add_generation_prompt=True)
        trials.append(ChatTrial(chat, list(prompt)))
    return trials


def reply(model: Any, cache: Cache, trial: ChatTrial, stop: set[int], chunk: int) -> Iterator[int]:
    """The greedy reply's tokens, without the one that ends it; at most `REPLY_LIMIT`."""
    token = prefill(model, cache, trial.prompt, chunk)
    for _ in range(REPLY_LIMIT):
        if token in stop:
            return
        yield token
        token = step(model, cache, token)


def right(chat: Chat, text: str, tokenizer: Any) -> bool:
    """True if `text`, the reply after the template's opening of the assistant's turn, does what was asked.

    An answer holds the expected code and no other number; reasoning doesn't count. A tool call has the right name and
    arguments as the tokenizer's own tool parser reads them.
    """
    if tokenizer.has_thinking:
        _, closed, text = text.partition(tokenizer.think_end)
        if not closed:
            return False
    if chat.kind != "tool_call":
        return set(re.findall(r"\d+", text)) == {chat.expected}
    _, opened, body = text.partition(tokenizer.tool_call_start)
    body, closed, _ = body.partition(tokenizer.tool_call_end)
    if not (opened and closed):
        return False
    try:
        called = tokenizer.tool_parser(body, chat.tools)
    except ValueError:
        return False
    wanted = chat.messages[-1]["tool_calls"][0]["function"]
    return called == {"name": wanted["name"], "arguments": wanted["arguments"]}
