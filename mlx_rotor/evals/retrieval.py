"""Whether a model, through its KV cache, says the code a needle prompt asks for."""

from __future__ import annotations

from typing import Any

from .feed import Cache, prefill, step
from .needle import Needle


def found(model: Any, cache: Cache, trial: Needle, chunk: int) -> bool:
    """True if every answer token is the greedy one.

    The prompt goes through `cache` in chunks, the answer token by token, so that compressed tokens are what the
    answer is read from. The right token is fed each time: as long as all were right that *is* greedy decoding, and
    the first wrong one ends the trial.
    """
    said = prefill(model, cache, trial.prompt, chunk)
    for i, token in enumerate(trial.answer):
        if said != token:
            return False
        if i + 1 < len(trial.answer):
            said = step(model, cache, token)
    return True
