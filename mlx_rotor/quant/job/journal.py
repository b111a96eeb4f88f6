"""The journal of a job: what it is, and which units of it are on disk. JSON lines, each durable before the next.

Line 1 describes the job; a job that differs in any of it can't be continued. Every other line is a unit (an entry of
the plan) whose bytes were made durable before the line was written, or a weight file that is complete. A line cut
short by a crash is the last one and is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import RotorError
from ...files import sync_folder

NAME = "journal.jsonl"

LABELS = {
    "format": "the journal's format",
    "policy": "the policy",
    "plan": "the plan (bits and shapes of the tensors)",
    "fit": "--fit",
    "guide": "the calibration",
    "shard_bytes": "--shard-size",
    "mlx_rotor": "mlx_rotor's version",
    "mlx": "MLX's version",
    "device": "the device",
    "source": "the source",
}


@dataclass(frozen=True)
class Unit:
    """A finished entry: digest of its bytes (in `piece`s of so many weights), sums over `measured` of its weights."""

    module: str
    sha256: str
    piece: int
    error: float
    norm: float
    measured: int
    seconds: float


class Journal:
    """An open journal, locked against a second process. `units` and `files` (name -> sha256) are what it says."""

    def __init__(self, path: Path) -> None:
        """Opens the journal at `path`, made if absent; RotorError if another process works on it."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise RotorError(f"{path.parent.parent}: another process is working on this job") from e
            lines, end = _lines(path.read_bytes())
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        except BaseException:
            self.close()
            raise
        self.job: dict[str, Any] | None = lines[0]["job"] if lines else None
        self.units: dict[str, Unit] = {}
        self.files: dict[str, str] = {}
        for line in lines[1:]:
            if "unit" in line:
                unit = Unit(**line["unit"])
                self.units[unit.module] = unit
            else:
                self.files[line["file"]] = line["sha256"]

    def begin(self, job: Mapping[str, Any]) -> None:
        """Writes the first line, or holds it against the one that is there; RotorError says what differs."""
        if self.job is None:
            self._append([{"job": job}])
            sync_folder(self.path.parent)
            self.job = dict(job)
            return
        wrong = [_difference(key, self.job.get(key), job.get(key)) for key in {**job, **self.job}]
        if found := [text for text in wrong if text]:
            raise RotorError(
                f"{self.path.parent.parent} holds another job's unfinished work: {'; '.join(found)}. Resume with what"
                " it was started with, or delete the folder to start again"
            )

    def add_units(self, units: Sequence[Unit]) -> None:
        self._append([{"unit": asdict(unit)} for unit in units])
        self.units |= {unit.module: unit for unit in units}

    def add_file(self, name: str, sha256: str) -> None:
        self._append([{"file": name, "sha256": sha256}])
        self.files[name] = sha256

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)


def described(path: Path) -> dict[str, Any] | None:
    """The job a journal at `path` is of, or None where there is none, or none that was begun."""
    if not path.is_file():
        return None
    lines, _ = _lines(path.read_bytes())
    return lines[0]["job"] if lines else None


def _lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The parsed lines, up to the first that is damaged, and the bytes they take."""
    found: list[dict[str, Any]] = []
    end = 0
    for line in data.splitlines(keepends=True):
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not _known(value, first=not found):
            break
        found.append(value)
        end += len(line)
    return found, end


def _known(value: Any, first: bool) -> bool:
    """Whether a parsed line is one that `Journal` writes."""
    if not isinstance(value, dict):
        return False
    if first:
        return isinstance(value.get("job"), dict)
    if "unit" in value:
        return isinstance(value["unit"], dict) and value["unit"].keys() == {field.name for field in fields(Unit)}
    return value.keys() == {"file", "sha256"}


def _difference(key: str, before: Any, now: Any) -> str:
    """What changed in one field of the job, in words; empty if nothing did."""
    if before == now:
        return ""
    label = LABELS.get(key, key)
    if isinstance(before, dict) and isinstance(now, dict):
        old, new = _leaves(before), _leaves(now)
        if old.get("name") != new.get("name"):
            return f"{label} was {old.get('name')}, is {new.get('name')}"
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{label} has changed ({', '.join(names[:3])}{more})"
    return f"{label} has changed" if key in ("plan", "guide") else f"{label} was {before}, is {now}"


def _leaves(value: Mapping[str, Any]) -> dict[str, Any]:
    """Its fields, one in `files` by the file's name."""
    return {k: v for k, v in value.items() if k != "files"} | dict(value.get("files", {}))
