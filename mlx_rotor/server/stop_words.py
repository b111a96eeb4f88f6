"""Stop words found in generated text, wherever tokens begin and end; mlx_lm finds only words that are whole tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any


def first(text: str, words: list[str]) -> int:
    """The index in `text` where the word that is complete first begins; -1 where there is none."""
    found = [(at + len(word), at) for word in words if (at := text.find(word)) >= 0]
    return min(found)[1] if found else -1


def begun(text: str, words: list[str]) -> int:
    """The length of the longest end of `text` that a word may begin with."""
    longest = min(len(text), max(map(len, words)) - 1)
    return next((n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in words)), 0)


def until_stop(
    responses: Iterator[Any], words: list[str], ends: set[int], decode: Callable[[int], str]
) -> Iterator[Any]:
    """Passes on mlx_lm's responses up to the first of `words`, which is left out with all that follows.

    mlx_lm's handler drops the text of a response whose finish reason is "stop". Text before a stop word is therefore
    put into the response before, which is held until the next has come.

    Args:
        responses: of mlx_lm's generator.
        words: stop words, none empty.
        ends: tokens that end a turn.
        decode: gives a token's text, for the token that completed one of mlx_lm's own stop sequences.
    """
    held, before = "", None
    for r in responses:
        ended = r.finish_reason == "stop" and r.token in ends
        stopped = r.finish_reason == "stop" and not ended
        text = held + ("" if ended else r.text or (decode(r.token) if stopped else ""))
        at = first(text, words)
        if ended or stopped or at >= 0:
            left = text if ended else text[: max(at, 0)]
            if before is not None:
                yield replace(before, text=before.text + left)
            elif left:
                yield replace(r, text=left, finish_reason=None)
            yield replace(r, text="", finish_reason="stop")
            return
        safe = len(text) - (begun(text, words) if r.finish_reason is None else 0)
        held = text[safe:]
        if before is not None:
            yield before
        before = replace(r, text=text[:safe])
    if before is not None:
        yield before
