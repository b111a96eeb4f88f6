"""Greedy divergence: how many tokens a configuration generates before the first that is not the reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .metrics import Estimate, Tally, clustered_mean
from .model import Cache, prefill_rows, step_rows

PROMPT, TOKENS = 256, 256  # tokens of text fed, tokens then generated
ROWS = 8  # prompts that share a cache

Advance = Callable[[int], Any]
NewCache = Callable[[], Cache]


@dataclass(frozen=True)
class Greedy:
    """The number of tokens of each prompt's continuation before the first that is not the reference's; at most `limit`.

    Prompts don't overlap and each gives one number: the standard error is between them. A continuation that never
    differs counts as `limit`, so the mean says nothing of what comes after `limit` tokens.
    """

    same: tuple[int, ...]
    limit: int = TOKENS

    @property
    def mean(self) -> Estimate:
        """The mean, without an error where all prompts are alike: 256 of 256 in few prompts is not ± 0."""
        found = clustered_mean(np.array(self.same, dtype=np.float64)[:, None])
        return found if found.se else Estimate(found.value, None)

    @property
    def median(self) -> float:
        return float(np.median(self.same))

    @property
    def never(self) -> Tally:
        """Prompts whose continuation never differed."""
        return Tally(sum(n >= self.limit for n in self.same), len(self.same))


def repeating(continuations: np.ndarray) -> int:
    """The number of `continuations` [prompts, limit] that end in a loop: the last half repeats some tokens throughout.

    Small models fall into loops, and no small error brings them out again.
    """
    half = continuations[:, continuations.shape[1] // 2 :]
    periods = range(1, half.shape[1] // 2 + 1)
    return sum(any((row[n:] == row[:-n]).all() for n in periods) for row in half)


def draw_prompts(tokens: Sequence[int], first: Sequence[int], count: int) -> np.ndarray:
    """Pieces of text that don't overlap, spread evenly, each behind the tokens `first`: int [count, PROMPT].

    There are fewer where the text has no room for `count`.
    """
    need = PROMPT - len(first)
    count = min(count, len(tokens) // need)
    stride = len(tokens) // count if count else 0
    rows = [[*first, *tokens[i * stride : i * stride + need]] for i in range(count)]
    return np.array(rows, dtype=np.int64).reshape(count, PROMPT)


def _batches(count: int) -> Iterator[slice]:
    """Batches of at most ROWS prompts, as few as possible and nearly equal in size."""
    for part in np.array_split(np.arange(count), max(1, math.ceil(count / ROWS))):
        if len(part):
            yield slice(int(part[0]), int(part[-1]) + 1)


def continuations(
    model: Any, new_cache: NewCache, prompts: np.ndarray, chunk: int, advance: Advance, limit: int = TOKENS
) -> np.ndarray:
    """The tokens that greedy decoding gives after each prompt, ends of text included: int [prompts, limit]."""
    out = np.zeros((len(prompts), limit), dtype=np.int64)
    for rows in _batches(len(prompts)):
        cache = new_cache()
        token = prefill_rows(model, cache, prompts[rows], chunk)
        for i in range(limit):
            out[rows, i] = token
            if i + 1 < limit:
                token = step_rows(model, cache, token)
        advance(prompts[rows].size + len(token) * limit)
    return out


def follow(
    model: Any, new_cache: NewCache, prompts: np.ndarray, continuations: np.ndarray, chunk: int, advance: Advance
) -> Greedy:
    """Compares a model's greedy decoding, through caches of `new_cache`, with the reference's `continuations`.

    The reference's token is fed each time. Until a row's first difference that is greedy decoding, and what the row
    chooses afterwards doesn't count. A batch ends when every row has differed.

    Args:
        prompts: int [prompts, n].
        continuations: int [prompts, limit].
        chunk: tokens of a prompt fed at a time.
        advance: called with the number of tokens done, for a progress bar.
    """
    limit = continuations.shape[1]
    same = np.full(len(prompts), limit)
    for rows in _batches(len(prompts)):
        cache = new_cache()
        token = prefill_rows(model, cache, prompts[rows], chunk)
        for i in range(limit):
            same[rows] = np.where((same[rows] == limit) & (token != continuations[rows, i]), i, same[rows])
            if i + 1 == limit or (same[rows] < limit).all():
                break
            token = step_rows(model, cache, continuations[rows, i])
        advance(prompts[rows].size + len(token) * limit)
    return Greedy(tuple(same.tolist()), limit)
