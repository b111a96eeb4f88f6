"""A file of a Hugging Face repository into a folder, so that a broken download goes on where it stopped.

huggingface_hub's own download starts a file again after every failure, and checks no digest: a job that fetches 230 GB
shard by shard and is resumed after a crash needs both.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ...errors import RotorError
from ..safetensors_io import TensorInfo, tensors_of

ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt; doubled for each after it
STEP = 1 << 24  # bytes between two reports of a download; what counts as getting on
TIMEOUT = 20.0  # seconds without a byte; a job that is stopped waits for them too

Out = TypeVar("Out")


@dataclass(frozen=True)
class Shard:
    """A weight file of a repository: bytes, and sha256 where the hub knows it."""

    name: str
    size: int
    sha256: str | None


class Stopped(Exception):
    """`Remote.stop` was called while a file was being fetched."""


class Remote:
    """One commit of a repository. From `stop` on everything that is under way raises Stopped."""

    def __init__(self, name: str, commit: str) -> None:
        self.name, self.commit = name, commit
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def header(self, shard: Shard) -> dict[str, TensorInfo]:
        """The tensors of a shard, from its header alone. RotorError where it can't be fetched or isn't one."""
        path = Path(self.name, shard.name)  # no such file: what errors call it
        try:
            found = self._retried(
                shard.name,
                lambda: HfApi().parse_safetensors_file_metadata(self.name, shard.name, revision=self.commit),
            )
        except SafetensorsParsingError as e:
            raise RotorError(f"{self.name}: {shard.name} is not a safetensors file ({reason(e)})") from e
        table = {name: vars(info) for name, info in found.tensors.items()}
        data = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        return tensors_of(table, path, shard.size - data, shard.size)

    def fetch(self, shard: Shard, path: Path, report: Callable[[int], None]) -> None:
        """Downloads a file to `path`, from where an earlier attempt stopped (in `<path>.part`). `report`: bytes so far.

        Raises:
            RotorError: it can't be fetched.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        self._retried(shard.name, lambda: self._download(shard, part, report), lambda: _size(part))
        part.replace(path)

    def _download(self, shard: Shard, part: Path, report: Callable[[int], None]) -> None:
        with open(part, "ab") as file:
            got = file.tell()
            if got > shard.size:
                file.truncate(got := 0)
            told = -STEP
            with self._response(shard.name, got, shard.size) as blocks:
                for block in blocks:
                    if self._stop.is_set():
                        raise Stopped
                    file.write(block)
                    got += len(block)
                    if got >= told + STEP:
                        report(told := got)
            file.flush()
            os.fsync(file.fileno())  # its name says that it is complete
        if got < shard.size:
            raise ConnectionError(f"the connection ended after {got:,} of {shard.size:,} bytes")
        if got > shard.size or (shard.sha256 and _sha256(part) != shard.sha256):
            part.unlink()
            raise ConnectionError("what came is not what the hub says the file is")

    @contextmanager
    def _response(self, name: str, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """Bytes [start, stop) of a file, in blocks."""
        if start >= stop:
            yield iter(())
            return
        url = hf_hub_url(self.name, name, revision=self.commit)
        asked = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=asked, timeout=TIMEOUT, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and start > 0:
                raise ConnectionError("the server sends whole files only")
            yield _at_most(response.iter_bytes(), stop - start)

    def _retried(self, name: str, attempt: Callable[[], Out], progress: Callable[[], int] = lambda: 0) -> Out:
        """What `attempt` returns, made up to ATTEMPTS times in a row of which none gets STEP bytes further."""
        failures = furthest = 0
        while True:
            try:
                return attempt()
            except (RotorError, Stopped, SafetensorsParsingError):
                raise
            except Exception as e:  # HTTP, connection and hub errors share no base class but this and OSError
                if isinstance(e, OSError) and e.errno is not None and not isinstance(e, ConnectionError):
                    raise  # the disk, not the net
                failures = 1 if progress() >= furthest + STEP else failures + 1
                furthest = max(furthest, progress())
                if failures == ATTEMPTS or _final(e):
                    times = f" after {failures} attempts" if failures > 1 else ""
                    raise RotorError(f"{self.name}: {name} can't be fetched{times}: {reason(e)}") from e
            if self._stop.wait(PAUSE * 2 ** (failures - 1)):
                raise Stopped


def reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _at_most(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The first `count` bytes of `blocks`: a server that knows no ranges sends all."""
    for block in blocks:
        yield block[:count]
        count -= len(block)
        if count <= 0:
            return


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _final(error: Exception) -> bool:
    """Whether asking again won't help: the hub refuses."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 429)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
