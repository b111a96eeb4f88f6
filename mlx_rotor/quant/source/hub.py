"""A Hugging Face repository as a source whose shards are fetched when they are needed and deleted after.

Headers come first, so that the plan is checked against the checkpoint before any weight is fetched.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from tqdm import tqdm

from ...errors import RotorError
from ..events import Reporter
from ..inventory import refuse_mxfp4
from ..plan import Entry, read_config
from ..safetensors_io import TensorInfo, read_header, read_index
from .checkpoint import COMPANIONS, INDEX, Checkpoint, block_of, joined
from .download import Remote, Shard, Stopped, reason
from .origin import headers, shards_of


@dataclass(frozen=True)
class Fetched(TensorInfo):
    """A tensor whose file is fetched when it is read; `fetch` returns the file's path."""

    fetch: Callable[[str], Path] = field(compare=False, repr=False)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return TensorInfo(self.name, self.fetch(self.path.name), self.dtype, self.shape, self.start).read(start, stop)


class _Quiet(tqdm):  # type: ignore[misc]
    """No bar: these files are small."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)
        super().__init__(*args, **options | {"disable": True})


class Repository:
    """One commit of a repository, a `Source`. `place` comes before the first tensor is read."""

    def __init__(self, name: str, commit: str, folder: Path, shards: Sequence[Shard]) -> None:
        self.name, self.commit, self.folder = name, commit, folder
        self._shards = {shard.name: shard for shard in shards}
        self._locks = {shard.name: threading.Lock() for shard in shards}
        self._remote = Remote(name, commit)
        self._needed: list[str] = []
        self._begun: set[str] = set()
        config = read_config(folder)
        refuse_mxfp4(config, {})
        names = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(self._shards, pool.map(self._remote.header, shards), strict=True))
        tensors = {
            name: Fetched(name, info.path, info.dtype, info.shape, info.start, self.ensure)
            for name, info in joined(name, names, found).items()
        }
        self.checkpoint = Checkpoint(folder, tensors, block_of(config))
        self._files = {info.name: info.path.name for info in tensors.values()}
        self._headers = headers(self.checkpoint)
        self._ahead = ThreadPoolExecutor(1, "fetch")

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "commit": self.commit, "files": dict(self._headers)}

    @property
    def provenance(self) -> dict[str, Any]:
        rows = {n: {"bytes": s.size, "header_sha256": self._headers[n]} for n, s in self._shards.items()}
        return {"commit": self.commit, "files": rows}

    def place(self, work: Path, kept: Callable[[], None], reporter: Reporter) -> None:
        self._fetched, self._kept, self._reporter = work / "fetched", kept, reporter

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

    def ensure(self, name: str) -> Path:
        """Fetches a shard that isn't there, and begins to fetch the one after it; the shard's path.

        Raises:
            RotorError: it can't be fetched.
        """
        path = self._fetched / name
        if not path.exists():
            with self._locks[name]:
                if not path.exists():
                    self._fetch(self._shards[name])
        if name not in self._begun:
            self._begun.add(name)
            later = self._needed[self._needed.index(name) + 1 :] if name in self._needed else []
            if later and not self._remote.stopped:
                self._ahead.submit(self._fetch_ahead, later[0])
        return path

    def _fetch_ahead(self, name: str) -> None:
        with self._locks[name]:
            if name in self._needed and not (self._fetched / name).exists():
                with suppress(RotorError, OSError, Stopped):  # whoever needs it tries again, and is told
                    self._fetch(self._shards[name])

    def _fetch(self, shard: Shard) -> None:
        def report(got: int) -> None:
            self._kept()
            self._reporter.tell("fetch", shard.name, got=got, size=shard.size)

        self._remote.fetch(shard, self._fetched / shard.name, report)
        read_header(self._fetched / shard.name)  # places were reckoned from its size: nothing may stand behind the last
        self._reporter.tell("fetched", shard.name, got=shard.size, size=shard.size)


def open_repository(name: str, commit: str | None = None) -> Repository:
    """A repository at `commit`, or where its main branch is now; config and companions are fetched, headers read.

    Raises:
        RotorError: no such repository, or it can't be reached, or its weights are not safetensors.
    """
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
    return Repository(name, str(info.sha), folder, shards)
