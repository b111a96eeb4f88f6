"""One configuration (a model and a KV scheme) run over the sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RotorError
from . import chat, greedy, retrieval
from .divergence import Divergence, summarise, token_kl
from .feed import chunks, log_probabilities
from .footprint import Caches
from .greedy import Greedy
from .perplexity import token_nll
from .sample import Sample
from .spool import Spool
from .stats import Tally

Advance = Callable[[int], Any]
Predictions = Iterable[tuple[np.ndarray, np.ndarray]]  # (log-probabilities [n, vocab], the tokens that came [n])
REPLY_GUESS = 48  # tokens a reply counts for in the progress bar


@dataclass(frozen=True)
class Reference:
    """The reference's losses and choices, both [windows, window], its distributions on disk, and what it `said` after
    each prompt, [prompts, greedy.TOKENS]."""

    nll: np.ndarray
    top: np.ndarray
    spool: Spool
    said: np.ndarray


def predictions(model: Any, caches: Caches, sample: Sample, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(log-probabilities [n, vocab], the tokens that came [n]) of each chunk of each window, in order."""
    for row in sample.windows:
        at = 1
        for logits in chunks(model, caches.new(), row[:-1].tolist(), chunk):
            yield log_probabilities(logits), row[at : at + len(logits)]
            at += len(logits)


def read_reference(model: Any, caches: Caches, sample: Sample, chunk: int, spool: Spool, advance: Advance) -> Reference:
    """Runs windows and prompts and keeps what every other configuration is compared with."""
    nll, top = keep(predictions(model, caches, sample, chunk), sample, spool, advance)
    said = greedy.continuations(model, caches.new_rows, sample.prompts, chunk, advance)
    return Reference(nll, top, spool, said)


def keep(predicted: Predictions, sample: Sample, spool: Spool, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
    """Losses in nats and likeliest tokens, both [windows, window]; whole distributions go to `spool`."""
    nll: list[np.ndarray] = []
    top: list[np.ndarray] = []
    for logp, came in predicted:
        if not nll:
            spool.reserve(window_tokens(sample), logp.shape[1])
        spool.append(logp)
        nll.append(token_nll(logp, came))
        top.append(logp.argmax(axis=1))
        advance(len(logp))
    shape = (len(sample.windows), -1)
    return np.concatenate(nll).reshape(shape), np.concatenate(top).reshape(shape)


def compare_windows(
    model: Any, caches: Caches, sample: Sample, chunk: int, reference: Reference, advance: Advance
) -> tuple[np.ndarray, Divergence]:
    """As `compare_predictions`, of a model's predictions through its caches."""
    return compare_predictions(predictions(model, caches, sample, chunk), reference, advance)


def compare_predictions(
    predicted: Predictions, reference: Reference, advance: Advance
) -> tuple[np.ndarray, Divergence]:
    """Losses in nats [windows, window] and the divergence from the reference on the same tokens.

    Raises:
        RotorError: the model's vocabulary has another size than the reference's.
    """
    nll: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    agrees: list[np.ndarray] = []
    at = 0
    tops = reference.top.reshape(-1)
    for logp, came in predicted:
        end = at + len(logp)
        if logp.shape[1] != reference.spool.vocab:
            raise RotorError(
                f"the model gives {logp.shape[1]} probabilities a token and the reference {reference.spool.vocab}: "
                "their distributions can't be compared; evaluate them separately"
            )
        nll.append(token_nll(logp, came))
        kl.append(token_kl(reference.spool.read(at, end), logp))
        agrees.append(logp.argmax(axis=1) == tops[at:end])
        at = end
        advance(len(logp))
    shape = reference.nll.shape
    divergence = summarise(np.concatenate(kl).reshape(shape), np.concatenate(agrees).reshape(shape))
    return np.concatenate(nll).reshape(shape), divergence


def score_greedy(
    model: Any, caches: Caches, sample: Sample, chunk: int, reference: Reference, advance: Advance
) -> Greedy | None:
    """How long the continuations are the reference's; None without prompts."""
    if not len(sample.prompts):
        return None
    return greedy.follow(model, caches.new_rows, sample.prompts, reference.said, chunk, advance)


def score_needles(
    model: Any, caches: Caches, sample: Sample, chunk: int, advance: Advance
) -> dict[tuple[int, float], Tally]:
    """Needles found by (length, depth)."""
    tallies: dict[tuple[int, float], Tally] = {}
    for trial in sample.needles:
        before = tallies.get((trial.length, trial.depth), Tally(0, 0))
        hit = retrieval.found(model, caches.new(), trial.needle, chunk)
        tallies[trial.length, trial.depth] = Tally(before.right + hit, before.of + 1)
        advance(trial.length)
    return tallies


def score_chats(
    model: Any, tokenizer: Any, caches: Caches, sample: Sample, chunk: int, advance: Advance
) -> dict[str, Tally]:
    """Chats right by kind."""
    tallies: dict[str, Tally] = {}
    for trial in sample.chats:
        before = tallies.get(trial.chat.kind, Tally(0, 0))
        said = list(chat.reply(model, caches.new(), trial, tokenizer.eos_token_ids, chunk))
        hit = chat.right(trial.chat, tokenizer.decode(said), tokenizer)
        tallies[trial.chat.kind] = Tally(before.right + hit, before.of + 1)
        advance(len(trial.prompt) + REPLY_GUESS)
    return tallies


def row_tokens(sample: Sample) -> int:
    """Tokens of work in one row, for the progress bar."""
    chats = sum(len(t.prompt) + REPLY_GUESS for t in sample.chats)
    return reference_tokens(sample) + sum(t.length for t in sample.needles) + chats


def reference_tokens(sample: Sample) -> int:
    """Tokens of work in what every row is compared with."""
    return window_tokens(sample) + len(sample.prompts) * (greedy.PROMPT + greedy.TOKENS)


def window_tokens(sample: Sample) -> int:
    """Tokens predicted in all windows."""
    return int(sample.windows[:, 1:].size)
