"""The folder that a job writes, new, unfinished or finished, and what stays of it when the job fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import RotorError
from ...files import sync_folder
from ..plan import decimal
from .journal import NAME

WORK = ".mlx_rotor-job"
KEPT = "what is finished is kept: give the same command with --resume to go on, or delete {out} to start again"


class Workplace:
    """`out` and its work folder `work`. `keep`: something is there that a later run can use. `ours`: it is this job's.

    `fetched`: so are source shards. `names`: the files that the job makes in `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.work = out, out / WORK
        # Before the job is known to be this one, nothing that an earlier run made is this one's to remove.
        self.keep = (self.work / NAME).exists() or (out / "config.json").exists()
        self.ours = self.fetched = False
        self.names: list[str] = []

    @property
    def left(self) -> str:
        """What a user whose job failed is to know; empty where the folder isn't this job's."""
        if not self.keep:
            return "nothing was left behind"
        return KEPT.format(out=self.out) if self.ours else ""

    def fetching(self) -> None:
        """A source shard is being fetched: what came of it is kept for a resumed job."""
        self.keep = self.fetched = True

    def close(self) -> None:
        """Removes the work folder, the journal last: a crash in between leaves what `resume` can finish."""
        if self.work.is_dir():
            for path in self.work.iterdir():
                if path.name != NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self.work / NAME).unlink(missing_ok=True)
            self.work.rmdir()
            sync_folder(self.out)

    def clear(self) -> None:
        """Removes everything the job has made in `out`."""
        for name in self.names:
            (self.out / name).unlink(missing_ok=True)
            (self.out / f"{name}.tmp").unlink(missing_ok=True)
        self.close()


@contextmanager
def working(place: Workplace) -> Iterator[None]:
    """Makes the folders. If the body fails with nothing to keep, all is as it was.

    Raises:
        RotorError: from the body, with what to do next; in place of OSError.
    """
    made = [path for path in (place.out, *place.out.parents) if not path.exists()]
    try:
        place.work.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as e:
        if not place.keep:
            _undo(place, made)
        after = f"; {place.left}" if place.left else ""
        if isinstance(e, OSError):
            raise RotorError(f"--out {place.out}: {e.strerror or e}{after}") from e
        if isinstance(e, RotorError) and place.keep:
            raise RotorError(f"{e}{after}") from e
        raise


def _undo(place: Workplace, made: Iterable[Path]) -> None:
    place.clear()
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def check_out(out: Path, resume: bool) -> None:
    """Raises RotorError unless a job can write `out`: it is absent, empty, or unfinished and `resume` says to go on."""
    if out.exists() and not out.is_dir():
        raise RotorError(f"--out {out} is a file")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / WORK).is_dir():
        if (out / "config.json").exists():
            raise RotorError(f"--out {out} holds a checkpoint already; choose a new folder")
        raise RotorError(f"--out {out} is not empty; choose a new folder")
    if not resume:
        raise RotorError(f"--out {out} holds an unfinished job; add --resume to go on with it, or delete the folder")


def check_disk(out: Path, need: int) -> None:
    """Raises RotorError if less than `need` bytes are free where `out` is or will be."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise RotorError(f"not enough disk for --out {out}: needs {decimal(need)}, {decimal(free)} are free")


def occupied(paths: Iterable[Path]) -> int:
    """Bytes on disk of those files that exist, holes not counted."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())
