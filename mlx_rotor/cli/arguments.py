"""Parsing that commands share: a parser whose errors are one line with "did you mean", and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

from ..errors import RotorError

T = TypeVar("T")
SEEDS = 2**64


def closest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the name most like `name`, or nothing where none is like it."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line and names the flag that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Prints `error: message` to stderr and exits with status 2."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unrecognized arguments: {unknown[1]}{closest(unknown[1].partition('=')[0], flags)}"
        elif choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message):
            message += closest(choice[1], re.findall(r"[\w.-]+", choice[2]))
        self.exit(2, f"error: {message} (`{self.prog} --help` lists the options)\n")


def adopted(parser: argparse.ArgumentParser) -> Parser:
    """mlx_lm's parser as a `Parser`, its numbers and texts checked by `CHECKED`."""
    parser.__class__ = Parser
    for action in parser._actions:
        if action.dest in CHECKED:
            action.type = CHECKED[action.dest]
    assert isinstance(parser, Parser)
    return parser


def replaced_flag(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Makes `old`, a flag's former name, an error that names its successor `new`."""

    class Refuse(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
            parser.error(f"{old} is now {new}")

    parser.add_argument(old, nargs="?", action=Refuse, help=argparse.SUPPRESS)


def parsed(read: Callable[[str], T]) -> Callable[[str], T]:
    """An argument's type out of a function that raises RotorError."""

    def parse(value: str) -> T:
        try:
            return read(value)
        except RotorError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return parse


def whole(value: str, low: int = 0) -> int:
    """An argument's type: a whole number from `low`."""
    if not value.strip().isdecimal() or int(value) < low:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number from {low}")
    return int(value)


def positive(value: str) -> int:
    """An argument's type: a whole number from 1."""
    return whole(value, 1)


def seed(value: str) -> int:
    """An argument's type: what MLX takes as a seed, 64 bits without a sign."""
    if not value.strip().isdecimal() or int(value) >= SEEDS:
        raise argparse.ArgumentTypeError(f"{value!r} is no seed: a whole number from 0, below 2**64")
    return int(value)


def number(value: str, low: float = 0.0, high: float = math.inf) -> float:
    """An argument's type: a finite number from `low` to `high`."""
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high):
        limits = f"from {low:g}" + (f" to {high:g}" if math.isfinite(high) else "")
        raise argparse.ArgumentTypeError(f"{value!r} is no number {limits}")
    return found


def above_zero(value: str) -> float:
    """An argument's type: a finite number above 0."""
    found = number(value)
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r} is no number above 0")
    return found


def share(value: str) -> float:
    """An argument's type: a number from 0 to 1."""
    return number(value, 0.0, 1.0)


def text(value: str) -> str:
    """An argument's type: text, which the system must have handed over as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!a} is not UTF-8 text") from None
    return value


def listed(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    """An argument's type: values that `read` takes, separated by commas."""

    def values(value: str) -> list[T]:
        return [read(part) for part in value.split(",")]

    return values


# Flags of mlx_lm's parsers by the names of their values: mlx_lm checks them late or not at all.
CHECKED: dict[str, Callable[[str], Any]] = {
    "seed": seed,
    "temp": number,
    "top_p": share,
    "min_p": share,
    "top_k": whole,
    "xtc_probability": share,
    "xtc_threshold": share,
    "min_tokens_to_keep": positive,
    "num_draft_tokens": positive,
    "prefill_step_size": positive,
    "quantized_kv_start": whole,
    "prompt": text,
    "system_prompt": text,
    "prefill_response": text,
}
