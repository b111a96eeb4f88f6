"""The quality that quantizing cost, on a machine smaller than the model: checkpoints against their source by layers.

Source and checkpoint run in float32 without a KV cache, each holding one layer's dense weights and one expert at a
time, so that nothing but the stored weights differs between them. Models that fit can also be run whole, by mlx_lm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import EXACT
from ..errors import RotorError
from ..host.layerwise import Layerwise
from ..host.prompting import tokenizer
from ..quant.plan import read_config
from . import score
from .footprint import MeasuredCaches
from .metrics import Divergence, Estimate, change, perplexity
from .model import EvaluatedModel, NamedModel, log_probabilities
from .sample import Domain, Sample, Size, draw, encode
from .score import LogProbFile, Reference
from .stored import parameters_of

# A domain's windows; their tokens' hidden states, 4 bytes × hidden size each, are held in memory.
WINDOWS_ONLY = Size(16, 512, needles=0, lengths=(), depths=(), chats=0, asked=frozenset())
BATCH = 8192  # tokens run through a layer at once: it reads its experts once for them all
ROWS = 64  # tokens whose distributions are compared at once

Progress = Callable[[str, int, int], None]  # the checkpoint's name, layers done, layers in all


@dataclass(frozen=True)
class Quality:
    """A checkpoint against its source on one domain's windows; errors are between windows.

    Attributes:
        source: the source's perplexity a token, on the same tokens.
        change: the checkpoint's over the source's, less 1, paired by window.
        divergence: KL(source || checkpoint) in nats a token, and how often both choose the same token.
    """

    domain: str
    text: str
    text_digest: str
    windows: int
    window: int
    source: Estimate
    perplexity: Estimate
    change: Estimate
    divergence: Divergence

    @property
    def tokens(self) -> int:
        return self.windows * self.window


def check_runnable(source: str | Path, texts: Sequence[Domain], size: Size = WINDOWS_ONLY) -> None:
    """Raises at once the RotorError that `SourceReference` of these would end with: texts, tokenizer, architecture."""
    folder = Path(source)
    config, weights = parameters_of(folder)
    words = tokenizer(folder)
    for text in texts:
        draw(words, text.text, size, config.get("max_position_embeddings"))
    Layerwise(config, weights, size.window)


class SourceReference:
    """The source's log-probabilities on the texts' windows, in files, for comparing any number of checkpoints with it.

    A context manager: the temporary files go with it.
    """

    def __init__(
        self,
        source: str | Path,
        texts: Sequence[Domain],
        size: Size = WINDOWS_ONLY,
        *,
        batch: int = BATCH,
        whole: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Runs the source.

        Args:
            source: folder of the checkpoint that others were quantized from.
            size: windows and window; nothing else of it is used.
            batch: tokens at once, rounded to whole windows, one at least.
            whole: load each model into memory instead, and run it as mlx_lm does; the layers of some architectures
                can't be run one by one.

        Raises:
            RotorError: a text too short, no source there, an architecture that can't be run layer by layer, a disk
                too small for the distributions (4 bytes × vocabulary a token, half of that above 4 GiB a text).
        """
        self.folder, self.texts, self.size = Path(source), tuple(texts), size
        self.whole, self._step, self._progress = whole, max(1, batch // size.window), progress
        if not self.texts:
            raise RotorError("no text to measure quality on")
        words, context = tokenizer(self.folder), read_config(self.folder).get("max_position_embeddings")
        self.samples = [draw(words, text.text, size, context) for text in self.texts]
        self._stack = ExitStack()
        try:
            files = [self._stack.enter_context(LogProbFile()) for _ in self.texts]
            self._references: list[Reference] = []
            no_prompts = np.zeros((0, 0), np.int64)
            for sample, log_probs, predicted in zip(self.samples, files, self._run(self.folder), strict=True):
                nll, top = score.keep(predicted, sample, log_probs, _ignore)
                self._references.append(Reference(nll, top, log_probs, no_prompts))
        except BaseException:
            self._stack.close()
            raise

    def compare(self, folder: str | Path) -> tuple[Quality, ...]:
        """Compares the checkpoint in `folder` with the source, on each text.

        Raises:
            RotorError: no checkpoint there, or one with another tokenizer or vocabulary.
        """
        folder, found = Path(folder), []
        words = tokenizer(folder)
        if any(encode(words, t.text) != s.tokens for t, s in zip(self.texts, self.samples, strict=True)):
            raise RotorError(f"{folder}: its tokenizer is not that of {self.folder}; they can't be compared")
        for text, reference, predicted in zip(self.texts, self._references, self._run(folder), strict=True):
            nll, divergence = score.compare_predictions(predicted, reference, _ignore)
            found.append(
                Quality(
                    text.name,
                    text.what,
                    text.digest,
                    len(nll),
                    nll.shape[1],
                    source=perplexity(reference.nll),
                    perplexity=perplexity(nll),
                    change=change(nll, reference.nll),
                    divergence=divergence,
                )
            )
        return tuple(found)

    def _run(self, folder: Path) -> Iterator[score.Predictions]:
        """Yields a model's predictions on each text's windows; each must be used up before the next."""
        if self.whole:
            evaluated = EvaluatedModel(NamedModel(folder.name, str(folder)))
            caches = MeasuredCaches(evaluated, EXACT, {})
            yield from (score.predictions(evaluated.model, caches, sample, ROWS) for sample in self.samples)
            return
        windows = np.concatenate([sample.windows for sample in self.samples])
        config, weights = parameters_of(folder)
        walk = Layerwise(config, weights, windows.shape[1] - 1)
        states = self._hidden(walk, windows[:, :-1], folder.name)
        with walk.end() as head:
            for sample in self.samples:
                yield self._predictions(head, states[: len(sample.windows)], sample)
                states = states[len(sample.windows) :]

    def _hidden(self, walk: Layerwise, tokens: np.ndarray, name: str) -> np.ndarray:
        """tokens: int [windows, L] -> hidden states behind the last layer, float32 [windows, L, ..]."""
        batches = [slice(i, i + self._step) for i in range(0, len(tokens), self._step)]
        with walk.start() as run:
            states = np.concatenate([np.array(run(mx.array(tokens[b]))) for b in batches])
        for number in range(walk.layers):
            if self._progress is not None:
                self._progress(name, number, walk.layers)
            with walk.layer(number) as layer:
                for b in batches:
                    states[b] = np.array(layer(mx.array(states[b])))
            mx.clear_cache()
        if self._progress is not None:
            self._progress(name, walk.layers, walk.layers)
        return states

    @staticmethod
    def _predictions(head: Any, states: np.ndarray, sample: Sample) -> score.Predictions:
        for hidden, row in zip(states, sample.windows, strict=True):
            logits = head(mx.array(hidden[None]))[0]
            for at in range(0, len(hidden), ROWS):
                yield log_probabilities(logits[at : at + ROWS]), row[1 + at : 1 + at + ROWS]

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> SourceReference:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _ignore(tokens: int) -> None:
    pass
