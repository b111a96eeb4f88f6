"""Models and KV schemes compared on one sample, against one reference."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..cache import DEFAULT, EXACT
from ..demo import held_out_text
from ..errors import RotorError
from . import score
from .footprint import Caches
from .machine import machine
from .perplexity import change, perplexity
from .report import Basis, Report, Row
from .sample import Sample, draw, encode
from .score import Reference
from .size import QUICK, Size
from .spool import Spool
from .subject import Subject, Target


def compare(
    models: Sequence[str | None] = (None,),
    kv: Sequence[str] = (EXACT, DEFAULT),
    *,
    against: str | None = None,
    text: str | None = None,
    text_name: str = "given text",
    size: Size = QUICK,
    protection: Mapping[str, int] | None = None,
    progress: bool = False,
) -> Report:
    """Evaluates every model under every KV scheme, one model in memory at a time.

    The reference is `against` with an exact KV cache; its log-probabilities are kept in a temporary file (4 bytes ×
    vocabulary a token, half of that above 4 GiB). A row that *is* the reference is run once.

    Args:
        models: folders, repositories, `NAME=PATH`, or `bundled`/None.
        kv: schemes as `make_prompt_cache` takes them; `exact` is the stock cache.
        against: the reference model; None is the first of `models`.
        text: what windows and filler are taken from; None is the bundled held-out text.
        text_name: what the report calls that text.
        protection: keyword arguments of `make_prompt_cache` (sinks, ring, protect_layers) for every scheme but exact.
        progress: a bar with the time left for the whole job, on stderr.

    Raises:
        RotorError: unknown model or scheme, a sample that doesn't fit text or model, models that don't share a
            tokenizer, a disk too small.
    """
    targets = unique([Target.parse(m) for m in models])
    schemes = list(dict.fromkeys(kv))
    if not targets or not schemes:
        raise RotorError("nothing to evaluate: give at least one model and one KV scheme")
    first = targets[0] if against is None else Target.parse(against)
    if text is None:
        text, text_name = held_out_text(), "bundled held-out text"
    start = time.perf_counter()
    every = 1 if sys.stderr.isatty() else 30
    with tqdm(unit="tok", disable=not progress, smoothing=0.05, delay=1, mininterval=every) as bar, Spool() as spool:
        job = _Job(first, targets, schemes, text, size, dict(protection or {}), bar, spool)
        rows: dict[tuple[str, str], Row] = {}
        for target in job.order():
            rows |= {(target.path, row.kv): row for row in job.evaluate(target)}
            gc.collect()
            mx.clear_cache()
        in_order = [rows[t.path, s] for t in targets for s in schemes]
        basis = job.basis(text_name)
    return Report(basis, in_order, machine(), time.perf_counter() - start)


def unique(targets: Sequence[Target]) -> list[Target]:
    """Each model once; where different models share a label, their paths are the labels."""
    once: dict[str, Target] = {}
    for target in targets:
        once.setdefault(target.path, target)
    labels = [t.label for t in once.values()]
    return [t if labels.count(t.label) == 1 else Target(t.path, t.path) for t in once.values()]


class _Job:
    """The comparison under way. Sample and reference come from the first model and stay; models don't."""

    def __init__(
        self,
        first: Target,
        targets: list[Target],
        schemes: list[str],
        text: str,
        size: Size,
        protection: dict[str, int],
        bar: tqdm,
        spool: Spool,
    ) -> None:
        self.first, self.targets, self.schemes = first, targets, schemes
        self.text, self.size, self.protection = text, size, protection
        self.bar, self.spool = bar, spool
        self.sample: Sample | None = None
        self.reference: Reference | None = None
        self.weights = ""

    def order(self) -> list[Target]:
        """The reference first: everything else is compared with it."""
        return [self.first, *(t for t in self.targets if t.path != self.first.path)]

    def schemes_of(self, target: Target) -> list[str]:
        """None for a reference that isn't itself evaluated. Exact first: it may be the reference."""
        if target.path not in {t.path for t in self.targets}:
            return []
        return sorted(self.schemes, key=lambda s: s != EXACT)

    def evaluate(self, target: Target) -> Iterator[Row]:
        """Loads a model and runs all its rows; the model is free again when the iterator ends."""
        self.say(f"{target.label}: loading")
        subject = Subject(target)
        schemes = self.schemes_of(target)
        caches = {s: Caches(subject, s, {} if s == EXACT else self.protection) for s in schemes}
        for made in caches.values():
            made.new()  # an unknown scheme ends the job here, before a model has run
        sample = self.same_sample(subject)
        if self.reference is None and EXACT not in schemes:
            self.say(f"{target.label}: reference")
            self.open_reference(subject, sample, Caches(subject, EXACT, {}))
        for scheme in schemes:
            self.say(f"{target.label}, {scheme}")
            yield self.row(subject, sample, scheme, caches[scheme])

    def say(self, what: str) -> None:
        # Not drawn before the sample is: most mistakes show until then, and get a line of their own.
        self.bar.set_description(what, refresh=self.sample is not None)

    def same_sample(self, subject: Subject) -> Sample:
        if self.sample is None:
            self.sample = draw(subject.tokenizer, self.text, self.size, subject.context)
            work = score.row_tokens(self.sample) * len(self.targets) * len(self.schemes)
            extra = 0 if EXACT in self.schemes_of(subject.target) else score.window_tokens(self.sample)
            self.bar.reset(work + extra)
        elif encode(subject.tokenizer, self.text) != self.sample.tokens:
            raise RotorError(
                f"{subject.target.label} and {self.first.label} tokenize the text differently: their distributions "
                "can't be compared; evaluate them separately"
            )
        return self.sample

    def open_reference(self, subject: Subject, sample: Sample, caches: Caches) -> Reference:
        self.weights = subject.weights
        self.reference = score.read_reference(
            subject.model, caches, sample, self.size.chunk, self.spool, self.bar.update
        )
        return self.reference

    def row(self, subject: Subject, sample: Sample, scheme: str, caches: Caches) -> Row:
        start, chunk, advance = time.perf_counter(), self.size.chunk, self.bar.update
        reference, difference = self.reference, None
        if reference is None:
            reference = self.open_reference(subject, sample, caches)
            nll = reference.nll
        else:
            nll, difference = score.compare_windows(subject.model, caches, sample, chunk, reference, advance)
        needles = score.score_needles(subject.model, caches, sample, chunk, advance)
        chats = score.score_chats(subject.model, subject.tokenizer, caches, sample, chunk, advance)
        return Row(
            label=subject.target.label,
            path=subject.target.path,
            weights=subject.weights,
            kv=scheme,
            is_reference=difference is None,
            perplexity=perplexity(nll),
            change=None if difference is None else change(nll, reference.nll),
            divergence=difference,
            needles=needles,
            chats=chats,
            footprint=caches.footprint(),
            seconds=time.perf_counter() - start,
        )

    def basis(self, text_name: str) -> Basis:
        assert self.sample is not None
        size, sample = self.size, self.sample
        return Basis(
            reference=self.first.label,
            reference_path=self.first.path,
            reference_weights=self.weights,
            text=text_name,
            text_tokens=len(sample.tokens),
            windows=len(sample.windows),
            window=size.window,
            chunk=size.chunk,
            needles=len(sample.needles),
            needle_lengths=size.lengths,
            depths=size.depths,
            chats=len(sample.chats),
            seed=size.seed,
            protection=self.protection,
            spool_bytes=self.spool.bytes,
            spool_dtype=np.dtype(self.spool.dtype).name,
        )
