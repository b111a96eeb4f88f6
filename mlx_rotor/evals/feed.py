"""Tokens through a model and its KV cache: in chunks, then one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Cache = list[Any]


def chunks(model: Any, cache: Cache, tokens: Sequence[int], chunk: int) -> Iterator[mx.array]:
    """Feeds `tokens` through `cache`, `chunk` at a time; yields each chunk's logits [n, vocab].

    The cache's state is evaluated with each chunk: what attention doesn't read would stay a growing lazy graph.
    """
    ids = mx.array(list(tokens))
    for i in range(0, len(tokens), chunk):
        logits = model(ids[i : i + chunk][None], cache=cache)[0]
        mx.eval(logits, [c.state for c in cache])
        yield logits


def log_probabilities(logits: mx.array) -> np.ndarray:
    """logits: [n, vocab], any float type -> natural log-probabilities, float32 NumPy [n, vocab]."""
    x = logits.astype(mx.float32)
    return np.array(x - mx.logsumexp(x, axis=-1, keepdims=True))


def prefill(model: Any, cache: Cache, tokens: Sequence[int], chunk: int) -> int:
    """Feeds a prompt; returns the token a greedy decoder would say next."""
    last: mx.array | None = None
    for logits in chunks(model, cache, tokens, chunk):
        last = logits[-1]
    if last is None:
        raise ValueError("an empty prompt")
    return _best(last)


def step(model: Any, cache: Cache, token: int) -> int:
    """Feeds one token; returns the next one, greedily."""
    return _best(model(mx.array([[token]]), cache=cache)[0, -1])


def prefill_rows(model: Any, cache: Cache, prompts: np.ndarray, chunk: int) -> np.ndarray:
    """Feeds prompts int [rows, n], all of one length, as one batch; returns each row's next token, greedily: [rows]."""
    ids, logits = mx.array(prompts), None
    for i in range(0, ids.shape[1], chunk):
        logits = model(ids[:, i : i + chunk], cache=cache)
        mx.eval(logits, [c.state for c in cache])
    if logits is None:
        raise ValueError("empty prompts")
    return np.array(mx.argmax(logits[:, -1], axis=-1))


def step_rows(model: Any, cache: Cache, tokens: np.ndarray) -> np.ndarray:
    """Feeds one token a row, [rows]; returns the next ones, greedily."""
    return np.array(mx.argmax(model(mx.array(tokens)[:, None], cache=cache)[:, -1], axis=-1))


def _best(logits: mx.array) -> int:
    return int(np.array(mx.argmax(logits)))
