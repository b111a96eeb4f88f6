"""Every command starts, fails, stops, reads stdin and checks its outputs in the same way. No flags, no logic."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..errors import RotorError

CLOSED = 141  # what a shell reports of a program that a closed pipe ended

Main = Callable[[Sequence[str] | None], int | None]


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main(argv)` and returns its exit status.

    One line on stderr and status 1 stand for a `RotorError`, for what the system refuses (an unreadable folder, a full
    disk under stdout) and for input that isn't UTF-8. Ctrl-C gives status 130, a closed stdout (`| head`) 141, a
    mistake in the flags 2. Anything else is a defect and keeps its traceback.
    """
    try:
        try:
            status = main(argv) or 0
        except SystemExit:  # --help, which has printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # Python's own flush, when it exits, could not be told from success
        return status
    except RotorError as e:
        return _failed(str(e))
    except UnicodeError as e:
        return _failed(f"text that is not UTF-8: {e}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return CLOSED
    except OSError as e:
        return _failed(f"{e.filename or 'stdout'}: {e.strerror or e}")
    finally:
        _settle(sys.stdout)


def _failed(why: str) -> int:
    """Prints the whole cause as one line."""
    print("error:", " ".join(line.strip() for line in why.splitlines() if line.strip()), file=sys.stderr)
    return 1


def _settle(stream: TextIO) -> None:
    """Throws away what `stream` can't take, so that Python doesn't try it again, and complain, when it exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Unbroken:
    """stdout that stops taking text where its reader has closed it, and raises nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._closed = stream, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self._closed:
            return
        try:
            action()
        except BrokenPipeError:
            self._closed = True
            _settle(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbroken_stdout() -> Iterator[None]:
    """Within it a closed stdout (`--json | head -1`) loses what is printed and does not end the work."""
    before = sys.stdout
    sys.stdout = _Unbroken(before)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before


def finishes(main: Main) -> Main:
    """Decorates a command's `main` whose work is worth more than what it prints: a closed stdout doesn't end it."""

    def wrapped(argv: Sequence[str] | None = None) -> int | None:
        with unbroken_stdout():
            return main(argv)

    return wrapped


def read_stdin() -> str:
    """All of stdin. Raises RotorError where it isn't UTF-8 text."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise RotorError(f"stdin is not UTF-8 text: {e.reason} at byte {e.start}") from e


def read_text(flag: str, file: Path) -> str:
    """The text of `file`, given with `flag`. Raises RotorError where there is none, or none in UTF-8."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RotorError(f"{flag} {file}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from e
    if not text.strip():
        raise RotorError(f"{flag} {file}: holds no text")
    return text


def check_writable(flag: str, file: Path) -> None:
    """Raises RotorError where `file`, given with `flag`, can't be written: before the work whose result it is for."""
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise RotorError(f"{flag} {file}: can't write a file there; give one in a folder that can be written")
