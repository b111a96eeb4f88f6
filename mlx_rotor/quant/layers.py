"""Sets of layers as policies write them: ends that depend on how many layers there are, and what lies between.

first N      layers 0 to N-1                        last N     the last N
A..B         A to B, both counted in                A-B        the same, for numbers that are not negative
..B  A..     from the first layer, to the last      N          one layer
middle       all but those that some rule of the policy selects as an end

Negative numbers count from the end: -1 is the last layer. `0..1` and `..1` are `first 2`, `-2..` is `last 2`. A layer
beyond the model is an error; `first N` and `last N` take what there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import RotorError

FORMS = "'first N', 'last N', 'A..B', 'A-B', N, 'middle'"


@dataclass(frozen=True)
class Layers:
    """A set of layers: `first` and `last` at the ends, `ranges` (both counted in, None is open), and perhaps what
    lies between the policy's ends."""

    first: int = 0
    last: int = 0
    ranges: tuple[tuple[int, int | None], ...] = ()
    middle: bool = False

    def covers(self, layer: int, count: int, ends: tuple[int, int] = (0, 0)) -> bool:
        """Whether `layer` of a model with `count` layers is in the set.

        `ends`: how many layers at each end the policy's rules select, which `middle` leaves out.

        Raises:
            RotorError: a range names a layer beyond the model.
        """
        if layer < self.first or layer >= count - self.last:
            return True
        if self.middle and ends[0] <= layer < count - ends[1]:
            return True
        return any(low <= layer <= high for low, high in (_resolve(r, count) for r in self.ranges))


def parse(items: Any) -> Layers:
    """The set that a rule's `layers` (a list, or one item) selects; RotorError on an item that isn't understood."""
    items = items if isinstance(items, list) else [items]
    if not items:
        raise RotorError("layers: an empty list selects nothing; leave it out for all layers")
    first = last = 0
    ranges: list[tuple[int, int | None]] = []
    for item in items:
        if item == "middle":
            continue
        low, high = _span(item)
        if low == 0 and high is not None and high >= 0:
            first = max(first, high + 1)
        elif low < 0 and high in (None, -1):
            last = max(last, -low)
        else:
            ranges.append((low, high))
    return Layers(first, last, tuple(ranges), "middle" in items)


def ends(sets: Iterable[Layers | None]) -> tuple[int, int]:
    """How many layers at each end the sets select as `first N` and `last N`."""
    known = [s for s in sets if s is not None]
    return max((s.first for s in known), default=0), max((s.last for s in known), default=0)


def _span(item: Any) -> tuple[int, int | None]:
    text = str(item).strip()
    if not isinstance(item, (bool, float)):
        if match := re.fullmatch(r"(first|last) ([1-9]\d*)", text):
            n = int(match[2])
            return (0, n - 1) if match[1] == "first" else (-n, None)
        if re.fullmatch(r"-?\d+", text):
            return int(text), int(text)
        if (match := re.fullmatch(r"(\d+)-(\d+)|(-?\d+)?\.\.(-?\d+)?", text)) and text != "..":
            low = int(match[1] or match[3] or 0)
            high = int(match[2] or match[4]) if match[2] or match[4] else None
            if high is not None and (low < 0) == (high < 0) and high < low:
                raise RotorError(f"layers: {item!r} runs backwards")
            return low, high
    raise RotorError(f"layers: {item!r} is none of {FORMS}")


def _resolve(span: tuple[int, int | None], count: int) -> tuple[int, int]:
    low, high = span[0], -1 if span[1] is None else span[1]
    for end in (low, high):
        if not -count <= end < count:
            raise RotorError(f"a rule selects layer {end}, but the model has layers 0-{count - 1}")
    return low % count, high % count
