"""The one way this package writes a file: complete, or not at all.

A file is written under a temporary name beside its own, made durable, and renamed. A crash or a full disk leaves the
file that was there before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import RotorError


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Gives a temporary path for somebody else to write, and renames it to `path` when the block ends without an error.

    Args:
        temporary: a name beside `path`, by default `<path>.tmp`. What stood there is removed first, links too.

    Raises:
        OSError: the file can't be written or renamed. The temporary file is then gone, and `path` as it was.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """An open binary file that becomes `path` when the block ends without an error; see `replacing`."""
    with replacing(path, temporary) as place, open(place, "xb") as file:
        yield file


def write_bytes(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Writes the file whole or not at all. Raises OSError where it can't."""
    with writing(path, temporary) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. Raises OSError where it can't."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Writes a file that a user named, in UTF-8, whole or not at all. Raises RotorError where it can't."""
    try:
        write_bytes(path, text.encode())
    except OSError as e:
        raise RotorError(f"{path}: {e.strerror}; give a file in a folder that can be written") from e


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
