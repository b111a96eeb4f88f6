"""One configuration (a model and a KV scheme) run over the sample and compared with the reference.

The reference's log-probabilities lie in a file, so that only one model is in memory at a time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import RotorError
from . import chat, greedy, needle
from .footprint import MeasuredCaches
from .greedy import Greedy
from .metrics import Divergence, Tally, summarise, token_kl, token_nll
from .model import chunks, log_probabilities
from .sample import Sample

FLOAT32_LIMIT = 4 << 30


class LogProbFile:
    """Log-probabilities [rows, vocab], appended once and read many times.

    The file is unnamed and in the system's temporary folder (`TMPDIR`); it vanishes with the process however that
    ends. float32 up to 4 GiB, float16 beyond.

    Raises:
        RotorError: the disk has too little room, before anything is written, or fills up meanwhile.
    """

    def __init__(self) -> None:
        self.rows, self.vocab, self.bytes = 0, 0, 0
        self.dtype: type[np.floating] = np.float32
        self._file = tempfile.TemporaryFile(prefix="mlx_rotor-")  # noqa: SIM115, closed in __exit__
        self._map: np.memmap | None = None

    def reserve(self, rows: int, vocab: int) -> None:
        """Sets the size of the file; fails at once if the disk has no room for it."""
        self.rows, self.vocab = rows, vocab
        self.dtype = np.float32 if rows * vocab * 4 <= FLOAT32_LIMIT else np.float16
        self.bytes = rows * vocab * np.dtype(self.dtype).itemsize
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if self.bytes > free:
            raise RotorError(
                f"{folder}: the reference's log-probabilities need {self.bytes / 1e9:.2f} GB ({rows} tokens × {vocab} "
                f"× {np.dtype(self.dtype).name}) and {free / 1e9:.2f} GB are free; use fewer --windows or set TMPDIR "
                "to a bigger disk"
            )

    def append(self, logp: np.ndarray) -> None:
        """logp: [n, vocab]."""
        try:
            self._file.write(logp.astype(self.dtype).tobytes())
        except OSError as e:
            raise RotorError(f"{tempfile.gettempdir()}: {e.strerror}; set TMPDIR to a disk with more room") from e

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop -> [stop - start, vocab] in the stored type."""
        if self._map is None:
            self._file.flush()
            self._map = np.memmap(self._file, dtype=self.dtype, mode="r", shape=(self.rows, self.vocab))
        return np.asarray(self._map[start:stop])

    def __enter__(self) -> LogProbFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._map = None
        self._file.close()


Advance = Callable[[int], Any]
Predictions = Iterable[tuple[np.ndarray, np.ndarray]]  # (log-probabilities [n, vocab], the tokens that came [n])
REPLY_GUESS = 48  # tokens a reply counts for in the progress bar


@dataclass(frozen=True)
class Reference:
    """The reference's results: losses `nll` in nats and likeliest tokens `top`, both [windows, window], its
    log-probabilities in a file, and `continuations` [prompts, greedy.TOKENS]."""

    nll: np.ndarray
    top: np.ndarray
    log_probs: LogProbFile
    continuations: np.ndarray


def predictions(
    model: Any, caches: MeasuredCaches, sample: Sample, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(log-probabilities [n, vocab], the tokens that came [n]) of each chunk of each window, in order."""
    for row in sample.windows:
        at = 1
        for logits in chunks(model, caches.new(), row[:-1].tolist(), chunk):
            yield log_probabilities(logits), row[at : at + len(logits)]
            at += len(logits)


def read_reference(
    model: Any, caches: MeasuredCaches, sample: Sample, chunk: int, log_probs: LogProbFile, advance: Advance
) -> Reference:
    """Runs the reference over windows and prompts, and keeps its results for every other configuration."""
    nll, top = keep(predictions(model, caches, sample, chunk), sample, log_probs, advance)
    continued = greedy.continuations(model, caches.new_rows, sample.prompts, chunk, advance)
    return Reference(nll, top, log_probs, continued)


def keep(
    predicted: Predictions, sample: Sample, log_probs: LogProbFile, advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    """Losses in nats and likeliest tokens, both [windows, window]; whole distributions go to `log_probs`."""
    nll: list[np.ndarray] = []
    top: list[np.ndarray] = []
    for logp, came in predicted:
        if not nll:
            log_probs.reserve(window_tokens(sample), logp.shape[1])
        log_probs.append(logp)
        nll.append(token_nll(logp, came))
        top.append(logp.argmax(axis=1))
        advance(len(logp))
    shape = (len(sample.windows), -1)
    return np.concatenate(nll).reshape(shape), np.concatenate(top).reshape(shape)


def compare_windows(
    model: Any, caches: MeasuredCaches, sample: Sample, chunk: int, reference: Reference, advance: Advance
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
        if logp.shape[1] != reference.log_probs.vocab:
            raise RotorError(
                f"the model gives {logp.shape[1]} probabilities a token and the reference {reference.log_probs.vocab}: "
                "their distributions can't be compared; evaluate them separately"
            )
        nll.append(token_nll(logp, came))
        kl.append(token_kl(reference.log_probs.read(at, end), logp))
        agrees.append(logp.argmax(axis=1) == tops[at:end])
        at = end
        advance(len(logp))
    shape = reference.nll.shape
    divergence = summarise(np.concatenate(kl).reshape(shape), np.concatenate(agrees).reshape(shape))
    return np.concatenate(nll).reshape(shape), divergence


def score_greedy(
    model: Any, caches: MeasuredCaches, sample: Sample, chunk: int, reference: Reference, advance: Advance
) -> Greedy | None:
    """The greedy divergence from the reference; None without prompts."""
    if not len(sample.prompts):
        return None
    return greedy.follow(model, caches.new_rows, sample.prompts, reference.continuations, chunk, advance)


def score_needles(
    model: Any, caches: MeasuredCaches, sample: Sample, chunk: int, advance: Advance
) -> dict[tuple[int, float], Tally]:
    """Needles found by (length, depth)."""
    tallies: dict[tuple[int, float], Tally] = {}
    for trial in sample.needles:
        before = tallies.get((trial.length, trial.depth), Tally(0, 0))
        hit = needle.found(model, caches.new(), trial.needle, chunk)
        tallies[trial.length, trial.depth] = Tally(before.right + hit, before.of + 1)
        advance(trial.length)
    return tallies


def score_chats(
    model: Any, tokenizer: Any, caches: MeasuredCaches, sample: Sample, chunk: int, advance: Advance
) -> dict[str, Tally]:
    """Chats right by kind."""
    tallies: dict[str, Tally] = {}
    for trial in sample.chats:
        before = tallies.get(trial.chat.kind, Tally(0, 0))
        reply = list(chat.reply(model, caches.new(), trial, tokenizer.eos_token_ids, chunk))
        hit = chat.right(trial.chat, tokenizer.decode(reply), tokenizer)
        tallies[trial.chat.kind] = Tally(before.right + hit, before.of + 1)
        advance(len(trial.prompt) + REPLY_GUESS)
    return tallies


def row_tokens(sample: Sample) -> int:
    """Tokens of work in one row, for the progress bar."""
    chats = sum(len(t.prompt) + REPLY_GUESS for t in sample.chats)
    return reference_tokens(sample) + sum(t.length for t in sample.needles) + chats


def reference_tokens(sample: Sample) -> int:
    """Tokens of work in windows and prompts, which every row has."""
    return window_tokens(sample) + len(sample.prompts) * (greedy.PROMPT + greedy.TOKENS)


def window_tokens(sample: Sample) -> int:
    """Tokens predicted in all windows."""
    return int(sample.windows[:, 1:].size)
