"""Greedy divergence: how many tokens a configuration says before the first that the reference would not have said."""

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
    """Tokens of each prompt's continuation that are the reference's, before the first that isn't; at most `limit`.

    Prompts are apart in the text, each gives one number: they are what the error is between. A continuation that never
    differs counts as `limit`, so the mean is that of the first `limit` tokens, no forecast beyond.
    """

    same: tuple[int, ...]
    limit: int = TOKENS

    @property
    def mean(self) -> Estimate:
        """Without an error where all are alike: 256 of 256 in few prompts is not ± 0."""
        found = clustered_mean(np.array(self.same, dtype=np.float64)[:, None])
        return found if found.se else Estimate(found.value, None)

    @property
    def median(self) -> float:
        return float(np.median(self.same))

    @property
    def never(self) -> Tally:
        """Prompts whose continuation never differed."""
        return Tally(sum(n >= self.limit for n in self.same), len(self.same))


def repeating(said: np.ndarray) -> int:
    """How many of the continuations [prompts, limit] end in a loop, twice or more of the same tokens in the last half:
    what small models fall into, and what no small error takes them out of again."""
    half = said[:, said.shape[1] // 2 :]
    periods = range(1, half.shape[1] // 2 + 1)
    return sum(any((row[n:] == row[:-n]).all() for n in periods) for row in half)


def draw_prompts(tokens: Sequence[int], first: Sequence[int], count: int) -> np.ndarray:
    """int [count, PROMPT]: pieces of text that don't overlap, spread evenly, each behind the tokens `first`.

    As many as the text has room for where that is fewer.
    """
    need = PROMPT - len(first)
    count = min(count, len(tokens) // need)
    stride = len(tokens) // count if count else 0
    rows = [[*first, *tokens[i * stride : i * stride + need]] for i in range(count)]
    return np.array(rows, dtype=np.int64).reshape(count, PROMPT)


def _batches(count: int) -> Iterator[slice]:
    """As few as ROWS allows, all nearly as large."""
    for part in np.array_split(np.arange(count), max(1, math.ceil(count / ROWS))):
        if len(part):
            yield slice(int(part[0]), int(part[-1]) + 1)


def continuations(
    model: Any, new_cache: NewCache, prompts: np.ndarray, chunk: int, advance: Advance, limit: int = TOKENS
) -> np.ndarray:
    """What the model says after each prompt, greedily, ends of text included: int [prompts, limit]."""
    said = np.zeros((len(prompts), limit), dtype=np.int64)
    for rows in _batches(len(prompts)):
        cache = new_cache()
        token = prefill_rows(model, cache, prompts[rows], chunk)
        for i in range(limit):
            said[rows, i] = token
            if i + 1 < limit:
                token = step_rows(model, cache, token)
        advance(prompts[rows].size + len(token) * limit)
    return said


def follow(
    model: Any, new_cache: NewCache, prompts: np.ndarray, said: np.ndarray, chunk: int, advance: Advance
) -> Greedy:
    """Tokens of `said` [prompts, limit] that the model, through caches of `new_cache`, says too before it differs.

    The reference's token is fed each time: as long as a row has said the same, that is greedy decoding, and what it
    says after its first difference doesn't count. A batch ends when every row has differed.
    """
    limit = said.shape[1]
    same = np.full(len(prompts), limit)
    for rows in _batches(len(prompts)):
        cache = new_cache()
        token = prefill_rows(model, cache, prompts[rows], chunk)
        for i in range(limit):
            same[rows] = np.where((same[rows] == limit) & (token != said[rows, i]), i, same[rows])
            if i + 1 == limit or (same[rows] < limit).all():
                break
            token = step_rows(model, cache, said[rows, i])
        advance(prompts[rows].size + len(token) * limit)
    return Greedy(tuple(same.tolist()), limit)
