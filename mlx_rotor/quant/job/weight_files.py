"""The weight files of an output while a job fills them, and which of their units are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..plan import Entry
from ..safetensors_io import ShardWriter
from . import stream
from .journal import Journal, Unit


class WeightFiles:
    """Opens a file when its first unit begins and publishes it when its last unit is in the journal.

    One thread calls everything here; writers may be used from others.
    """

    def __init__(self, out: Path, files: Mapping[str, list[Entry]], journal: Journal) -> None:
        self._out, self._files, self._journal = out, files, journal
        self._file = {entry.module: name for name, entries in files.items() for entry in entries}
        self._writers: dict[str, ShardWriter] = {}
        self._left = {name: {entry.module for entry in entries} for name, entries in files.items()}
        self._pending: dict[str, list[Unit]] = {}

    def restore(self, block_rows: int, found: Callable[[Entry], None]) -> tuple[set[str], list[str]]:
        """Takes up what the journal says is finished: (modules that are, those whose bytes are not what it says).

        `found` is called with each of the former. `block_rows`: of the source, see `stream.pieces`.
        """
        done: set[str] = set()
        wrong: list[str] = []
        for name in self._files:
            path = self._out / name
            if not path.exists() and not path.with_name(f"{name}.tmp").exists():
                wrong += [e.module for e in self._files[name] if e.module in self._journal.units]
                continue
            writer = self._open(name, resume=True)
            for entry in self._files[name]:
                unit = self._journal.units.get(entry.module)
                if unit is None:
                    continue
                pieces = stream.pieces(entry, block_rows, unit.piece)
                if stream.joined([stream.digest_of(entry, piece, writer) for piece in pieces]) != unit.sha256:
                    wrong.append(entry.module)
                    continue
                for output in entry.outputs:
                    writer.keep(output.name)
                done.add(entry.module)
                found(entry)
                self._left[name].discard(entry.module)
            self._publish(name, known=not any(e.module in wrong for e in self._files[name]))
        return done, wrong

    def writer(self, entry: Entry) -> ShardWriter:
        """The writer of the file the entry goes to."""
        name = self._file[entry.module]
        return self._writers.get(name) or self._open(name, resume=True)

    def finished(self, unit: Unit) -> None:
        """A unit is written; it counts from the next `commit` on."""
        self._pending.setdefault(self._file[unit.module], []).append(unit)

    def commit(self) -> None:
        """Makes finished units durable, writes them to the journal and publishes the files that are complete."""
        pending = self._pending
        for name in pending:
            self._writers[name].sync()
        self._journal.add_units([unit for units in pending.values() for unit in units])
        self._pending = {}
        for name, units in pending.items():
            self._left[name] -= {unit.module for unit in units}
            self._publish(name, known=False)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _open(self, name: str, *, resume: bool) -> ShardWriter:
        outputs = [output for entry in self._files[name] for output in entry.outputs]
        self._writers[name] = ShardWriter(self._out / name, outputs, resume=resume)
        return self._writers[name]

    def _publish(self, name: str, *, known: bool) -> None:
        """Publishes a file if all its units are in the journal; `known`: the digest there, if any, still holds."""
        if self._left[name]:
            return
        writer = self._writers.pop(name)
        if not known or name not in self._journal.files:
            self._journal.add_file(name, writer.seal())
        writer.publish()
