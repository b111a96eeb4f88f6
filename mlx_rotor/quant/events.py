"""Events of a job, told one at a time as they happen, for a progress bar or for JSON lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["start", "resumed", "layer", "unit", "bytes", "unit_done", "fetch", "fetched", "note", "done"]


@dataclass(frozen=True)
class Event:
    """One thing that happened, with the totals as they stand.

    `kind`: start; resumed (a unit that an earlier run finished is there); layer and unit (work on it begins); bytes
    (source bytes were worked off); unit_done; fetch and fetched (`name` is a source shard, `size` its bytes, `got`
    those that are here); note (`text` is for people); done.
    `name`: module or shard. `done` of `total`: source bytes. `units_done` of `units`. `seconds` since the start.
    """

    kind: Kind
    done: int
    total: int
    units_done: int
    units: int
    seconds: float
    name: str = ""
    layer: int | None = None
    got: int | None = None
    size: int | None = None
    text: str = ""

    def as_json(self) -> dict[str, Any]:
        """The event without what doesn't apply to its kind."""
        return {k: v for k, v in asdict(self).items() if v is not None and v != ""}


Progress = Callable[[Event], None]


class Reporter:
    """Keeps the totals and calls `progress` under a lock, from whichever thread something happened in."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock = progress, threading.RLock()
        self._started = time.monotonic()
        self.total = self.units = 0
        self._done = self._units_done = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def start(self, total: int, units: int) -> None:
        self.total, self.units = total, units
        self.tell("start")

    def advance(self, count: int, name: str = "", layer: int | None = None) -> None:
        with self._lock:
            self._done += count
            self.tell("bytes", name, layer)

    def unit_done(self, name: str, layer: int | None) -> None:
        with self._lock:
            self._units_done += 1
            self.tell("unit_done", name, layer)

    def resumed(self, count: int, name: str, layer: int | None) -> None:
        with self._lock:
            self._units_done += 1
            self._done += count
            self.tell("resumed", name, layer)

    def tell(
        self,
        kind: Kind,
        name: str = "",
        layer: int | None = None,
        *,
        got: int | None = None,
        size: int | None = None,
        text: str = "",
    ) -> None:
        with self._lock:
            if self._progress is not None:
                totals = (self._done, self.total, self._units_done, self.units, self.seconds)
                self._progress(Event(kind, *totals, name, layer, got, size, text))
