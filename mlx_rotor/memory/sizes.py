"""Sizes and counts as people write them: `86GB`, `80 GiB`, `64K`."""

from __future__ import annotations

import re

from ..errors import RotorError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
COUNTS = {"": 1, "K": 2**10, "M": 2**20}


def parse_size(text: str) -> int:
    """`86.2 GB` (1e9 bytes each), `80GiB` (2**30), `500MB` -> bytes.

    Raises:
        RotorError: no unit, not a size, or less than a byte.
    """
    number, unit = _parts(text)
    size = int(number * UNITS.get(unit, 0))
    if size < 1:
        raise RotorError(f"{text!r} is not a size such as 86.2GB, 500MB or 80GiB")
    return size


def ram_size(text: str) -> int:
    """`128GB` -> bytes. RAM is sold in binary units under decimal names: 128 GB, 128 GiB and 128G all are 2**37.

    Raises:
        RotorError: no unit, or not such a size.
    """
    number, unit = _parts(text)
    if unit not in ("G", "GB", "GIB") or number < 1 or number != int(number):
        raise RotorError(f"{text!r} is no amount of RAM such as 128GB")
    return int(number) * UNITS["GIB"]


def token_count(text: str) -> int:
    """`65536`, `64K` (1024 each), `1M` -> tokens.

    Raises:
        RotorError: not such a number.
    """
    match = re.fullmatch(r"(\d+)\s*([km]?)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise RotorError(f"{text!r} is no number of tokens such as 65536 or 64K")
    return int(match[1]) * COUNTS[match[2].upper()]


def _parts(text: str) -> tuple[float, str]:
    """(number, unit in capitals); 0 where it is no number. RotorError for a number without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match and not match[2]:
        raise RotorError(f"{text!r} has no unit: write {match[1]}GB (1e9 bytes each), or MB")
    return (float(match[1]), match[2].upper()) if match else (0.0, "")
