"""Models and KV schemes compared on one sample, against one reference."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..bundled import held_out_text
from ..cache import DEFAULT, EXACT
from ..errors import RotorError
from . import greedy, record, score
from .footprint import MeasuredCaches
from .machine import machine
from .metrics import change, perplexity
from .model import EvaluatedModel, NamedModel, fingerprint
from .report import ComparisonRow, Conditions, Report
from .sample import QUICK, Sample, Size, draw, encode
from .score import LogProbFile, Reference


def compare(
    models: Sequence[str | None] = (None,),
    kv: Sequence[str] = (EXACT, DEFAULT),
    *,
    against: str | None = None,
    text: str | None = None,
    text_name: str = "given text",
    size: Size = QUICK,
    protection: Mapping[str, int] | None = None,
    file: Path | None = None,
    progress: bool = False,
) -> Report:
    """Evaluates every model under every KV scheme, one model in memory at a time.

    The reference is `against` with an exact KV cache; its log-probabilities are kept in a temporary file (4 bytes ×
    vocabulary a token, half of that above 4 GiB). A row that *is* the reference is run once.

    Args:
        models: folders, repositories, `NAME=PATH`, or `bundled`/None.
        kv: schemes as `make_prompt_cache` takes them; `exact` is the stock cache.
        against: the reference model; None is the first of `models`.
        text: the text that windows and filler are taken from; None is the bundled held-out text.
        text_name: the text's name in the report.
        size: of the sample.
        protection: keyword arguments of `make_prompt_cache` (sinks, ring, protect_layers) for every scheme but exact.
        file: JSON that keeps every finished row (see `record`). Rows in it are not measured again; those that this
            comparison doesn't ask for stay in it.
        progress: a bar with the time left for the whole job, on stderr.

    Returns:
        The report: a row a model and scheme, in the order asked for. Perplexity is a token's, KL in nats a token.

    Raises:
        RotorError: unknown model or scheme, a sample that doesn't fit text or model, models that don't share a
            tokenizer, a disk too small, a file whose rows were measured under other conditions.

    Example:
        >>> print(compare(kv=["exact", "turbo4"], size=TINY).markdown())
    """
    targets = unique([NamedModel.parse(m) for m in models])
    schemes = list(dict.fromkeys(kv))
    if not targets or not schemes:
        raise RotorError("nothing to evaluate: give at least one model and one KV scheme")
    first = targets[0] if against is None else NamedModel.parse(against)
    if text is None:
        text, text_name = held_out_text(), "bundled held-out text"
    every = 1 if sys.stderr.isatty() else 30
    with (
        tqdm(unit="tok", disable=not progress, smoothing=0.05, delay=1, mininterval=every) as bar,
        LogProbFile() as log_probs,
    ):
        job = _Job(first, targets, schemes, text, text_name, size, dict(protection or {}), file, bar, log_probs)
        for target in job.order():
            job.evaluate(target)
            gc.collect()
            mx.clear_cache()
        return job.report()


def unique(targets: Sequence[NamedModel]) -> list[NamedModel]:
    """Each model once; where different models share a label, their paths are the labels."""
    once: dict[str, NamedModel] = {}
    for target in targets:
        once.setdefault(target.path, target)
    labels = [t.label for t in once.values()]
    return [t if labels.count(t.label) == 1 else NamedModel(t.path, t.path) for t in once.values()]


class _Job:
    """The comparison under way. Sample and reference come from the first model and stay; models don't."""

    def __init__(
        self,
        first: NamedModel,
        targets: list[NamedModel],
        schemes: list[str],
        text: str,
        text_name: str,
        size: Size,
        protection: dict[str, int],
        file: Path | None,
        bar: tqdm,
        log_probs: LogProbFile,
    ) -> None:
        self.start = time.perf_counter()
        self.first, self.targets, self.schemes = first, targets, schemes
        self.text, self.text_name, self.size, self.protection = text, text_name, size, protection
        self.file, self.bar, self.log_probs = file, bar, log_probs
        self.sample: Sample | None = None
        self.reference: Reference | None = None
        self.weights = ""
        # A file that can't be read ends the job before a model is loaded.
        self.found = record.read(file) if file is not None and file.exists() else None
        self.prints = {(t.where, s): fingerprint(t, s) for t in targets for s in schemes}
        self.rows: dict[tuple[str, str], ComparisonRow] = {}
        for row in self.found.rows if self.found else ():
            if self.prints.get((row.path, row.kv)) == row.fingerprint:
                label = next(t.label for t in targets if t.where == row.path)
                self.rows[row.path, row.kv] = dataclasses.replace(row, label=label)

    def order(self) -> list[NamedModel]:
        """The reference first, since every row is compared with it; then models with rows to measure."""
        return [self.first, *(t for t in self.targets if t.path != self.first.path and self.schemes_of(t))]

    def schemes_of(self, target: NamedModel) -> list[str]:
        """The schemes to measure, exact first as it may be the reference; none for a reference that is no row."""
        if target.path not in {t.path for t in self.targets}:
            return []
        return sorted((s for s in self.schemes if (target.where, s) not in self.rows), key=lambda s: s != EXACT)

    def evaluate(self, target: NamedModel) -> None:
        """Loads a model and measures its rows; the model is free again afterwards."""
        self.show(f"{target.label}: loading")
        evaluated = EvaluatedModel(target)
        schemes = self.schemes_of(target)
        caches = {s: MeasuredCaches(evaluated, s, {} if s == EXACT else self.protection) for s in schemes}
        for made in caches.values():
            made.new()  # an unknown scheme ends the job here, before a model has run
        sample = self.same_sample(evaluated)
        if self.reference is None and EXACT not in schemes and any(self.schemes_of(t) for t in self.targets):
            self.show(f"{target.label}: reference")
            self.open_reference(evaluated, sample, MeasuredCaches(evaluated, EXACT, {}))
        for scheme in schemes:
            self.show(f"{target.label}, {scheme}")
            self.rows[target.where, scheme] = self.row(evaluated, sample, scheme, caches[scheme])
            if self.file is not None:
                record.write(self.file, self.report(others=True))

    def show(self, what: str) -> None:
        # Most mistakes show before the sample is drawn, and their message gets a line without a bar.
        self.bar.set_description(what, refresh=self.sample is not None)

    def same_sample(self, evaluated: EvaluatedModel) -> Sample:
        if self.sample is None:
            self.sample = draw(evaluated.tokenizer, self.text, self.size, evaluated.context)
            if self.file is not None and self.found is not None:
                record.check_conditions(self.file, self.found, self.conditions(), machine())
            work = score.row_tokens(self.sample) * sum(len(self.schemes_of(t)) for t in self.targets)
            extra = 0 if EXACT in self.schemes_of(evaluated.target) else score.reference_tokens(self.sample)
            self.bar.reset(work + extra if work else 0)
        elif encode(evaluated.tokenizer, self.text) != self.sample.tokens:
            raise RotorError(
                f"{evaluated.target.label} and {self.first.label} tokenize the text differently: their distributions "
                "can't be compared; evaluate them separately"
            )
        return self.sample

    def open_reference(self, evaluated: EvaluatedModel, sample: Sample, caches: MeasuredCaches) -> Reference:
        self.weights = evaluated.weights
        self.reference = score.read_reference(
            evaluated.model, caches, sample, self.size.chunk, self.log_probs, self.bar.update
        )
        return self.reference

    def row(self, evaluated: EvaluatedModel, sample: Sample, scheme: str, caches: MeasuredCaches) -> ComparisonRow:
        start, chunk, advance = time.perf_counter(), self.size.chunk, self.bar.update
        reference, difference, same = self.reference, None, None
        if reference is None:
            reference = self.open_reference(evaluated, sample, caches)
            nll = reference.nll
        else:
            nll, difference = score.compare_windows(evaluated.model, caches, sample, chunk, reference, advance)
            same = score.score_greedy(evaluated.model, caches, sample, chunk, reference, advance)
        needles = score.score_needles(evaluated.model, caches, sample, chunk, advance)
        chats = score.score_chats(evaluated.model, evaluated.tokenizer, caches, sample, chunk, advance)
        return ComparisonRow(
            label=evaluated.target.label,
            path=evaluated.target.where,
            fingerprint=self.prints[evaluated.target.where, scheme],
            weights=evaluated.weights,
            kv=scheme,
            is_reference=difference is None,
            perplexity=perplexity(nll),
            change=None if difference is None else change(nll, reference.nll),
            divergence=difference,
            greedy=same,
            needles=needles,
            chats=chats,
            footprint=caches.footprint(),
            seconds=time.perf_counter() - start,
        )

    def report(self, others: bool = False) -> Report:
        """The rows in the order asked for; with `others`, then those of the file that were not asked for."""
        asked = [(t, s) for t in self.targets for s in self.schemes]
        rows = [self.rows[key] for t, s in asked if (key := (t.where, s)) in self.rows]
        missing = tuple(f"{t.label} {s}" for t, s in asked if (t.where, s) not in self.rows)
        if others and self.found:
            rows += [row for row in self.found.rows if (row.path, row.kv) not in self.prints]
        seconds = time.perf_counter() - self.start + (self.found.seconds if self.found else 0)
        conditions = self.found.conditions if self.found and self.reference is None else self.conditions()
        return Report(conditions, rows, machine(), seconds, missing)

    def conditions(self) -> Conditions:
        assert self.sample is not None
        size, sample = self.size, self.sample
        return Conditions(
            reference=self.first.label,
            reference_path=self.first.where,
            reference_weights=self.weights,
            reference_fingerprint=fingerprint(self.first, EXACT),
            text=self.text_name,
            text_digest=hashlib.sha256(self.text.encode()).hexdigest()[:16],
            text_tokens=len(sample.tokens),
            windows=len(sample.windows),
            window=size.window,
            chunk=size.chunk,
            needles=len(sample.needles),
            needle_lengths=size.lengths,
            depths=size.depths,
            chats=len(sample.chats),
            greedy=len(sample.prompts),
            greedy_repeating=greedy.repeating(self.reference.continuations) if self.reference else 0,
            seed=size.seed,
            protection=self.protection,
            spool_bytes=self.log_probs.bytes,
            spool_dtype=np.dtype(self.log_probs.dtype).name,
        )
