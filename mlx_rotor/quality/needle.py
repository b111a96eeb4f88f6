"""Needle in a haystack: a code hidden at a known depth of filler text, asked for at the end of the prompt.

The bundled model's trainer draws its tasks from here too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .model import Cache, prefill, step

Encode = Callable[[str], list[int]]

NAMES = (
    "alpha", "bravo", "delta", "echo", "golf", "hotel", "india", "kilo", "lima", "mike",
    "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "zulu",
)  # fmt: skip


@dataclass(frozen=True)
class Needle:
    """One trial: `prompt` ends right before the code, `answer` is the code and the closing full stop."""

    prompt: list[int]
    answer: list[int]
    code: str
    depth: float


def random_code(rng: random.Random, low: int = 4, high: int = 6) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(low, high)))


def fact(name: str, code: str) -> str:
    return f"The secret code for {name} is {code}."


def question(name: str) -> str:
    return f"What is the secret code for {name}?"


def hide(
    encode: Encode,
    filler: Sequence[int],
    length: int,
    rng: random.Random,
    depth: float | None = None,
    count: int | None = None,
) -> Needle:
    """Hides `count` facts in `filler` so that prompt and answer together are `length` tokens.

    Args:
        encode: text to token ids, without special tokens.
        filler: at least `length` token ids of ordinary text.
        depth: where the fact asked for stands, 0 (start) to 1 (end); None draws it.
        count: facts hidden, one of which is asked for; None draws 1 to 4.

    Raises:
        ValueError: if `length` leaves no room for the facts and the question.
    """
    names = rng.sample(NAMES, count or rng.randint(1, 4))
    codes = [random_code(rng) for _ in names]
    asked = rng.randrange(len(names))
    facts = [encode(f"\n# {fact(n, c)}\n") for n, c in zip(names, codes, strict=True)]
    tail = encode(f"\n# {question(names[asked])} {fact(names[asked], codes[asked])}\n")
    answer_len = len(encode(f" {codes[asked]}.\n"))
    room = length - len(tail) - sum(map(len, facts))
    if room < 0 or len(filler) < room:
        raise ValueError(f"a needle of {length} tokens needs {room} tokens of filler between 0 and {len(filler)}")
    at_asked = rng.random() if depth is None else depth
    cuts = [round(at_asked * room) if i == asked else rng.randint(0, room) for i in range(len(facts))]
    row: list[int] = []
    start = 0
    for cut, tokens in sorted(zip(cuts, facts, strict=True)):
        row += list(filler[start:cut]) + tokens
        start = cut
    row += list(filler[start:room]) + tail
    return Needle(row[:-answer_len], row[-answer_len:], codes[asked], at_asked)


def found(model: Any, cache: Cache, trial: Needle, chunk: int) -> bool:
    """True if every answer token is the greedy one.

    The prompt goes through `cache` in chunks, the answer token by token, so that compressed tokens are what the
    answer is read from. The right token is fed each time: as long as all were right that *is* greedy decoding, and
    the first wrong one ends the trial.
    """
    chosen = prefill(model, cache, trial.prompt, chunk)
    for i, token in enumerate(trial.answer):
        if chosen != token:
            return False
        if i + 1 < len(trial.answer):
            chosen = step(model, cache, token)
    return True
