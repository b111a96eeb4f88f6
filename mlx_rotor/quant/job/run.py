"""One run of a quantize job: carries out what is left of its plan, layer by layer, and writes the journal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import mlx.core as mx

from ...errors import RotorError
from .. import shards
from ..events import Reporter
from ..guide import Guide, Unguided
from ..plan import Entry, Plan, read_config
from ..source import INDEX, Checkpoint, Source, companions
from . import journal, manifest, stream, weight_files, workplace
from .workers import Workers
from .workplace import Workplace

# What may have to be done again after a crash, beside the units that were being worked on.
COMMIT_BYTES = 256_000_000  # of output
COMMIT_SECONDS = 30.0

Task = tuple[Entry, stream.Piece]
GuideFactory = Callable[[Checkpoint, Plan, Path], Guide]  # with the work folder, which lives as long as the job


@dataclass(frozen=True)
class Result:
    """What a job made.

    Attributes:
        plan: that it carried out.
        out: the folder.
        files: names of the weight files.
        source_bytes: of the source's tensors.
        seconds: that this run took.
        errors: role -> |w - stored| / |w| over the `measured` share of all weights.
        resumed: units that an earlier run had finished.
    """

    plan: Plan
    out: Path
    files: tuple[str, ...]
    source_bytes: int
    seconds: float
    errors: dict[str, float]
    measured: float = 1.0
    resumed: int = 0


class Run:
    """One run of a job over what is left of it. Made only if all that can be checked beforehand is right."""

    def __init__(
        self,
        source: Source,
        place: Workplace,
        plan: Plan,
        fit: str,
        guide: GuideFactory | None,
        shard_bytes: int,
        reporter: Reporter,
    ) -> None:
        self.source, self.place, self.plan, self.fit, self.reporter = source, place, plan, fit, reporter
        self.checkpoint = source.checkpoint
        self.config = read_config(source.folder)
        self.checkpoint.verify(plan)
        source.place(place.work, place.fetching, reporter)
        self.groups = [list(group) for _, group in groupby(self.plan.entries, key=lambda entry: entry.layer)]
        self.files = shards.cut(self.plan, shard_bytes)
        self.extra = companions(source.folder)
        for path in self.extra:
            if not os.access(path, os.R_OK):
                raise RotorError(f"{path}: can't be read; it is to be copied into the output")
        beside = [*(p.name for p in self.extra), *manifest.formats_file(self.config, self.plan)]
        place.names = [*beside, *self.files, INDEX, manifest.PROVENANCE, "config.json"]
        self._check_disk(0)
        self.guide = Unguided(self.checkpoint) if guide is None else guide(self.checkpoint, plan, place.work)
        self._check_disk(self.guide.disk)
        self.job = {
            "format": 1,
            "policy": {"name": self.plan.policy.name, "sha256": self.plan.policy.digest},
            "plan": manifest.digest(self.plan),
            "fit": fit,
            "guide": self.guide.digest,
            "shard_bytes": shard_bytes,
            **manifest.versions(),
            "device": mx.default_device().type.name,
            "source": source.identity,
        }
        self.piece = stream.GUIDED_PIECE if self.guide.digest else stream.PIECE

    def all(self, count: int) -> Result:
        """Does what is left, with `count` workers."""
        if (self.place.out / "config.json").exists():
            return self._complete()
        self.journal = journal.Journal(self.place.work / journal.NAME)
        try:
            self.journal.begin(self.job)
            self.place.ours = True
            self.place.keep = self.place.fetched or bool(self.journal.units)
            self.weights = weight_files.WeightFiles(self.place.out, self.files, self.journal)
            try:
                resumed = self._restore()
                with Workers(count) as pool:
                    for group in self.groups:
                        self._layer(group, pool)
            finally:
                self.weights.close()
            self.source.check()
            made = manifest.Made(self.plan, self.source, self.config, self.fit, self.guide, self.files, self.extra)
            outcome = manifest.write(self.place.out, made, self.journal)
        finally:
            self.journal.close()
        return self._result(outcome, resumed)

    def _complete(self) -> Result:
        """An earlier run got to the end, but not to removing its work folder."""
        path = self.place.work / journal.NAME
        if path.exists():
            found = journal.Journal(path)
            try:
                found.begin(self.job)
            finally:
                found.close()
        return self._result(manifest.read(self.place.out), len(self.plan.entries))

    def _result(self, outcome: manifest.Outcome, resumed: int) -> Result:
        self.place.close()
        self.reporter.tell("done")
        size, seconds = self.checkpoint.nbytes, self.reporter.seconds
        files = tuple(self.files)
        return Result(self.plan, self.place.out, files, size, seconds, outcome.errors, outcome.measured, resumed)

    def _check_disk(self, beside: int) -> None:
        made = [self.place.out / f"{name}{end}" for name in self.files for end in ("", ".tmp")]
        need = shards.size(self.files) - workplace.occupied(made) + sum(p.stat().st_size for p in self.extra)
        workplace.check_disk(self.place.out, max(0, need) + self.source.room(self.groups) + beside)

    def _restore(self) -> int:
        bytes_of = self.checkpoint.source_bytes
        self.reporter.start(sum(bytes_of(entry) for entry in self.plan.entries), len(self.plan.entries))
        self.done, wrong = self.weights.restore(
            self.checkpoint.block[0], lambda entry: self.reporter.resumed(bytes_of(entry), entry.module, entry.layer)
        )
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            self.reporter.tell("note", text=f"{wrong[0]}{more}: not on disk as the journal says; done again")
        self.source.begin([entry for entry in self.plan.entries if entry.module not in self.done])
        self.source.release([entry for entry in self.plan.entries if entry.module in self.done])
        return len(self.done)

    def _layer(self, group: Sequence[Entry], pool: Workers) -> None:
        left = [entry for entry in group if entry.module not in self.done]
        if not left:
            return
        try:
            self.source.check()
            self.reporter.tell("layer", layer=group[0].layer)
            self._fit(left, stream.Fitting(*self.guide.layer(group[0].layer, group), self.fit), pool)
            self._commit()
        except BaseException as e:
            with suppress(RotorError, OSError):  # what failed is told; units that are done count all the same
                self._commit()
            if isinstance(e, (RotorError, OSError)):
                self._blame_source(e)
            raise
        self.source.release(left)

    def _blame_source(self, error: Exception) -> None:
        """Raises RotorError if the source changed, of which `error` is then only a sign."""
        try:
            self.source.check()
        except RotorError as changed:
            raise changed from error

    def _fit(self, entries: Sequence[Entry], fitting: stream.Fitting, pool: Workers) -> None:
        """Fits and writes entries, all their pieces in one queue."""
        writers = {entry.module: self.weights.writer(entry) for entry in entries}
        tasks = [(entry, p) for entry in entries for p in stream.pieces(entry, self.checkpoint.block[0], self.piece)]
        bundles = fitting.together(tasks)
        parts: dict[str, dict[int, stream.Done]] = {entry.module: {} for entry in entries}
        counts = Counter(entry.module for entry, _ in tasks)
        began: dict[str, float] = {}
        uncommitted, since = 0, self.reporter.seconds

        def work(bundle: list[Task]) -> list[stream.Done]:
            found = []
            for entry, piece in bundle:
                if piece.number == 0:
                    began[entry.module] = self.reporter.seconds
                    self.reporter.tell("unit", entry.module, entry.layer)
                found.append(fitting.write(entry, piece, writers[entry.module]))
            return found

        def done(bundle: list[Task], results: list[stream.Done]) -> None:
            for (entry, piece), result in zip(bundle, results, strict=True):
                keep(entry, piece, result)

        def keep(entry: Entry, piece: stream.Piece, result: stream.Done) -> None:
            nonlocal uncommitted, since
            found = parts[entry.module]
            found[piece.number] = result
            size, rows = self.checkpoint.source_bytes(entry), entry.parts * entry.source_shape[0]
            before, after = (size * row // rows for row in (piece.row, piece.row + piece.rows))
            self.reporter.advance(after - before, entry.module, entry.layer)
            if len(found) < counts[entry.module]:
                return
            self.weights.finished(self._unit(entry, found, self.reporter.seconds - began[entry.module]))
            self.reporter.unit_done(entry.module, entry.layer)
            mx.clear_cache()  # the next entry's arrays may have other sizes
            uncommitted += entry.nbytes
            if uncommitted >= COMMIT_BYTES or self.reporter.seconds - since >= COMMIT_SECONDS:
                self._commit()
                uncommitted, since = 0, self.reporter.seconds

        pool.each(work, bundles, done, self.source.stop)

    def _unit(self, entry: Entry, found: dict[int, stream.Done], seconds: float) -> journal.Unit:
        ordered = [found[number] for number in sorted(found)]
        return journal.Unit(
            entry.module,
            stream.joined([part.digest for part in ordered]),
            self.piece,
            sum(part.error for part in ordered),
            sum(part.norm for part in ordered),
            sum(part.measured for part in ordered),
            seconds,
        )

    def _commit(self) -> None:
        self.source.check()  # units made of a source that changed don't count
        self.weights.commit()
        self.place.keep = self.place.keep or bool(self.journal.units)
