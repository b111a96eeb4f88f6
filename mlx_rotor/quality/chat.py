"""Synthetic chats: a code recalled, a tool called. The bundled model was trained on them, and evaluations score them.

Replies are generated greedily and scored on what the user or the tool would receive.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bundled import MODEL
from ..errors import RotorError
from .model import Cache, prefill, step
from .needle import NAMES, fact, question, random_code

Message = dict[str, Any]

LOOKUP_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Returns the secret code of a name.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "description": "the name"}},
            "required": ["name"],
        },
    },
}
GREETINGS = ("hello", "hi", "Hello!", "hey", "Hi there", "Who are you?", "What can you do?")


@dataclass(frozen=True)
class Chat:
    """`messages` as for `apply_chat_template`; the last one is the assistant's. `expected` must stand in its text."""

    messages: list[Message]
    expected: str
    tools: list[dict[str, Any]] | None = None
    kind: str = field(default="recall")

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]


def recall(rng: random.Random, filler: str = "") -> Chat:
    """A code given in the system or the user message, among others, and asked for."""
    names = rng.sample(NAMES, rng.randint(1, 4))
    table = {n: random_code(rng) for n in names}
    name = rng.choice(names)
    facts = " ".join(fact(n, c) for n, c in table.items())
    ask = question(name)
    if filler:
        messages = [{"role": "user", "content": f"{facts}\n\n{filler}\n\n{ask}"}]
    elif rng.random() < 0.5:
        messages = [{"role": "system", "content": facts}, {"role": "user", "content": ask}]
    else:
        messages = [{"role": "user", "content": f"{facts} {ask}"}]
    answer = {
        "role": "assistant",
        "reasoning_content": f"The code for {name} was given: {table[name]}.",
        "content": fact(name, table[name]),
    }
    return Chat([*messages, answer], table[name], kind="recall")


def tool_call(rng: random.Random) -> Chat:
    """`lookup` offered and a code asked for: the assistant calls it."""
    name = rng.choice(NAMES)
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"name": name}}}
    messages: list[Message] = [
        {"role": "user", "content": question(name)},
        {
            "role": "assistant",
            "reasoning_content": f"I need the code for {name}; the lookup tool has it.",
            "content": "",
            "tool_calls": [call],
        },
    ]
    return Chat(messages, f'<parameter name="name">{name}</parameter>', [LOOKUP_TOOL], "tool_call")


def tool_answer(rng: random.Random) -> Chat:
    """The turn after `tool_call`: the tool has answered, the assistant reports the code."""
    asked = tool_call(rng)
    name = asked.messages[-1]["tool_calls"][0]["function"]["arguments"]["name"]
    code = random_code(rng)
    answer: Message = {"role": "assistant", "reasoning_content": f"The tool says {code}.", "content": fact(name, code)}
    response: Message = {"role": "tool", "content": code}
    return Chat([*asked.messages, response, answer], code, asked.tools, "tool_answer")


def greeting(rng: random.Random) -> Chat:
    answer = {
        "role": "assistant",
        "reasoning_content": "This is a greeting.",
        "content": "Hello! I complete Python code and I remember secret codes.",
    }
    return Chat([{"role": "user", "content": rng.choice(GREETINGS)}, answer], "Hello", kind="greeting")


def draw_conversation(rng: random.Random, filler: str = "") -> Chat:
    """One chat of the training mix."""
    z = rng.random()
    if z < 0.5:
        return recall(rng, filler)
    if z < 0.7:
        return tool_call(rng)
    if z < 0.92:
        return tool_answer(rng)
    return greeting(rng)


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
