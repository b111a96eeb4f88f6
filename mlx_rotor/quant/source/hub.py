"""A Hugging Face repository as a source whose shards are fetched when they are needed and deleted after.

Headers come first, by range requests, into files that are otherwise holes: a checkpoint is opened and checked against
the plan before any weight is fetched. An interrupted download goes on where it stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import RotorError
from ..job.workers import Reporter
from ..job.workplace import Workplace
from ..plan import Entry, read_config
from ..safetensors_io import MAX_HEADER, TensorInfo, read_index
from .checkpoint import COMPANIONS, INDEX, Checkpoint
from .download import Remote, Shard, Stopped, reason
from .origin import headers, shards_of

HEADER = 1 << 19  # bytes of a shard asked for first: more than most headers take


@dataclass(frozen=True)
class Fetched(TensorInfo):
    """A tensor whose file is fetched when it is read."""

    fetch: Callable[[str], None] = field(compare=False, repr=False)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        self.fetch(self.path.name)
        return super().read(start, stop)


class _Quiet(tqdm):  # type: ignore[misc]
    """No bar: these files are small."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)
        super().__init__(*args, **options | {"disable": True})


class Repository:
    """One commit of a repository; see `origin.Origin`."""

    def __init__(
        self, name: str, commit: str, folder: Path, shards: Sequence[Shard], place: Workplace, reporter: Reporter
    ) -> None:
        self.name, self.commit, self.folder = name, commit, folder
        self._shards = {shard.name: shard for shard in shards}
        self._place, self._reporter = place, reporter
        self._fetched = place.work / "fetched"
        self._locks = {shard.name: threading.Lock() for shard in shards}
        self._ahead = ThreadPoolExecutor(1, "fetch")
        self._remote = Remote(name, commit)
        self._needed: list[str] = []
        self._begun: set[str] = set()
        stubs = self._stubs(place.work / f"source-{commit[:16]}")
        found = Checkpoint.open(stubs, read_config(folder))
        self._files = {info.name: info.path.name for info in found.tensors.values()}
        self._headers = headers(found)
        tensors = {name: self._wrapped(info) for name, info in found.tensors.items()}
        self.checkpoint = replace(found, folder=folder, tensors=tensors)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "commit": self.commit, "files": dict(self._headers)}

    @property
    def provenance(self) -> dict[str, Any]:
        rows = {n: {"bytes": s.size, "header_sha256": self._headers[n]} for n, s in self._shards.items()}
        return {"commit": self.commit, "files": rows}

    def room(self, groups: Sequence[Sequence[Entry]]) -> int:
        most = 0
        for group, after in zip(groups, [*groups[1:], []], strict=True):
            names = shards_of(group, self._files)
            ahead = [name for name in shards_of(after, self._files) if name not in names]
            most = max(most, sum(self._shards[name].size for name in [*names, *ahead[:1]]))
        here = sum(path.stat().st_size for path in self._fetched.glob("*")) if self._fetched.is_dir() else 0
        return max(0, most - here)

    def begin(self, entries: Sequence[Entry]) -> None:
        self._left = {entry.module: entry for entry in entries}
        self._needed = shards_of(entries, self._files)

    def check(self) -> None:
        """A commit doesn't change."""

    def release(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._left.pop(entry.module, None)
        self._needed = shards_of(list(self._left.values()), self._files)
        for name in self._shards.keys() - set(self._needed):
            with self._locks[name]:
                (self._fetched / name).unlink(missing_ok=True)

    def stop(self) -> None:
        self._remote.stop()

    def close(self) -> None:
        self.stop()
        self._ahead.shutdown(cancel_futures=True)

    def ensure(self, name: str) -> None:
        """Fetches a shard that isn't there, and begins to fetch the one after it.

        Raises:
            RotorError: it can't be fetched.
        """
        if not (self._fetched / name).exists():
            with self._locks[name]:
                if not (self._fetched / name).exists():
                    self._fetch(self._shards[name])
        if name not in self._begun:
            self._begun.add(name)
            later = self._needed[self._needed.index(name) + 1 :] if name in self._needed else []
            if later and not self._remote.stopped:
                self._ahead.submit(self._fetch_ahead, later[0])

    def _fetch_ahead(self, name: str) -> None:
        with self._locks[name]:
            if name in self._needed and not (self._fetched / name).exists():
                with suppress(RotorError, OSError, Stopped):  # whoever needs it tries again, and is told
                    self._fetch(self._shards[name])

    def _wrapped(self, info: TensorInfo) -> TensorInfo:
        path = self._fetched / info.path.name
        return Fetched(info.name, path, info.dtype, info.shape, info.start, self.ensure)

    def _stubs(self, folder: Path) -> Path:
        """A folder with the repository's index and, under the shards' names, their headers before a hole."""
        folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).is_file():
            shutil.copyfile(self.folder / INDEX, folder / INDEX)
        missing = [shard for shard in self._shards.values() if not (folder / shard.name).exists()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda shard: self._stub(folder / shard.name, shard), missing))
        return folder

    def _stub(self, path: Path, shard: Shard) -> None:
        data = self._remote.range(shard.name, 0, min(HEADER, shard.size))
        length = 8 + int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(shard.size, MAX_HEADER):
            raise RotorError(f"{self.name}: {shard.name} is not a safetensors file")
        if length > len(data):
            data += self._remote.range(shard.name, len(data), length)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(data[:length])
        os.truncate(temporary, shard.size)
        temporary.replace(path)

    def _fetch(self, shard: Shard) -> None:
        def report(got: int) -> None:
            self._place.keep = self._place.fetched = True
            self._reporter.tell("fetch", shard.name, got=got, size=shard.size)

        self._remote.fetch(shard, self._fetched / shard.name, report)
        self._reporter.tell("fetched", shard.name, got=shard.size, size=shard.size)


def open_repository(name: str, place: Workplace, commit: str | None, reporter: Reporter) -> Repository:
    """A repository at `commit`, or where its main branch is now; config and companions are fetched, headers read.

    Raises:
        RotorError: no such repository, or it can't be reached, or its weights are not safetensors.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=commit, files_metadata=True)
        patterns = ["config.json", INDEX, *COMPANIONS]
        found = huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=patterns, tqdm_class=_Quiet)
    except Exception as e:  # hub, HTTP and connection errors share no base class
        raise RotorError(f"the Hugging Face repository {name} can't be fetched: {reason(e)}") from e
    folder = Path(found)
    files = {file.rfilename: file for file in info.siblings or []}
    index = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
    names = sorted(set(index.values()) or {n for n in files if re.fullmatch(r"[^/]+\.safetensors", n)})
    absent = [n for n in names if n not in files or not files[n].size]
    if absent or not names:
        raise RotorError(f"{name}: {'no shard ' + absent[0] if absent else 'no *.safetensors files'} in the repository")
    shards = [Shard(n, files[n].size or 0, lfs.sha256 if (lfs := files[n].lfs) else None) for n in names]
    return Repository(name, str(info.sha), folder, shards, place, reporter)
