"""Synthetic chats the bundled model is trained on and checked with: a code recalled, a tool called."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

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


def draw(rng: random.Random, filler: str = "") -> Chat:
    """One chat of the training mix."""
    z = rng.random()
    if z < 0.5:
        return recall(rng, filler)
    if z < 0.7:
        return tool_call(rng)
    if z < 0.92:
        return tool_answer(rng)
    return greeting(rng)
