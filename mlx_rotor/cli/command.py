"""What every command shares: how it starts, fails and stops, and where it may write, how numbers are
read. No flags, no logic."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import RotorError


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main(argv)` and returns its exit status.

    A `RotorError` becomes one line on stderr and status 1, Ctrl-C status 130 without a traceback, a closed
    stdout (`| head`) status 141. Anything else is a defect and keeps its traceback.
    """
    try:
        return main(argv) or 0
    except RotorError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def check_writable(flag: str, file: Path) -> None:
    """Raises RotorError where `file`, given with `flag`, can't be written: before the work whose result it is for."""
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise RotorError(f"{flag} {file}: can't write a file there; give one in a folder that can be written")


def whole(text: str, low: int = 0) -> int:
    """An argument's type: a whole number from `low`."""
    if not text.strip().isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low}")
    return int(text)


def positive(text: str) -> int:
    """An argument's type: a whole number from 1."""
    return whole(text, 1)
