"""Sources of a job's weights: what any source does, and a checkpoint in a local folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...errors import RotorError
from ..events import Reporter
from ..plan import Entry, read_config
from .checkpoint import FACTORS, Checkpoint, is_repository, locate


class Source(Protocol):
    """A checkpoint and what a job must know of the files it is in. `name`: what the output calls it."""

    @property
    def name(self) -> str: ...

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def folder(self) -> Path:
        """Where config.json, tokenizer and the like are."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the journal keeps to know the source again."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What the output says of its source: nothing that differs from one copy of the files to another."""

    def room(self, groups: Sequence[Sequence[Entry]]) -> int:
        """Bytes that fetching needs, at most, while `groups` of entries are worked off."""

    def place(self, work: Path, kept: Callable[[], None], reporter: Reporter) -> None:
        """Where fetched files go; `kept` is called when something is there that a resumed job can use."""

    def begin(self, entries: Sequence[Entry]) -> None:
        """These are left, in this order."""

    def check(self) -> None:
        """Raises RotorError if the files are not what they were."""

    def release(self, entries: Sequence[Entry]) -> None:
        """These are done, durably."""

    def stop(self) -> None:
        """Ends what is being fetched: whoever waits for it fails."""

    def close(self) -> None: ...


class Folder:
    """A checkpoint in a local folder, whose files are left alone."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, name: str) -> None:
        self.folder, self.checkpoint, self.name = folder, checkpoint, name
        self._headers = headers(checkpoint)
        self._stats = {name: _stat(path) for name, path in self._paths().items()}

    @property
    def identity(self) -> dict[str, Any]:
        rows = {
            name: {"bytes": size, "mtime_ns": mtime, "header": self._headers[name]}
            for name, (size, mtime, _) in self._stats.items()
        }
        return {"files": rows}

    @property
    def provenance(self) -> dict[str, Any]:
        return {"files": {n: {"bytes": s[0], "header_sha256": self._headers[n]} for n, s in self._stats.items()}}

    def room(self, groups: Sequence[Sequence[Entry]]) -> int:
        return 0

    def place(self, work: Path, kept: Callable[[], None], reporter: Reporter) -> None:
        pass

    def begin(self, entries: Sequence[Entry]) -> None:
        pass

    def check(self) -> None:
        for name, path in self._paths().items():
            if _stat(path) != self._stats[name]:
                raise RotorError(f"{path} changed while it was read; the job needs the source as it was at the start")

    def release(self, entries: Sequence[Entry]) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _paths(self) -> dict[str, Path]:
        return {path.name: path for path in sorted({info.path for info in self.checkpoint.tensors.values()})}


def headers(checkpoint: Checkpoint) -> dict[str, str]:
    """File name -> digest of the names, dtypes, shapes and places of its tensors."""
    rows: dict[str, list[str]] = {}
    for info in sorted(checkpoint.tensors.values(), key=lambda info: info.start):
        rows.setdefault(info.path.name, []).append(f"{info.name} {info.dtype} {info.shape} {info.start}")
    return {name: hashlib.sha256("\n".join(rows[name]).encode()).hexdigest() for name in sorted(rows)}


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError as e:
        raise RotorError(f"{path}: {e.strerror}; the job needs the source as it was at the start") from e
    return found.st_size, found.st_mtime_ns, found.st_ino


def shards_of(entries: Sequence[Entry], files: Mapping[str, str]) -> list[str]:
    """The files entries are read from, in order of first use; `files`: tensor name -> file."""
    names = (name for entry in entries for source in entry.sources for name in (source, f"{source}{FACTORS}"))
    return list(dict.fromkeys(files[name] for name in names if name in files))


def open_folder(model: str | Path) -> Folder:
    """A checkpoint folder, or a Hugging Face repository, fetched whole where it isn't cached, with its headers read.

    Raises:
        RotorError: as `locate` and `Checkpoint.open`.
    """
    folder = locate(model)
    return Folder(folder, Checkpoint.open(folder, read_config(folder)), source_name(model))


def source_name(model: str | Path) -> str:
    """What the output calls its source: a repository, or a folder without where it was."""
    return str(model) if is_repository(model) else Path(model).resolve().name
