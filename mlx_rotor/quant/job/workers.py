"""Threads that fit pieces: MLX gives each its own stream, and reading, hashing and writing overlap with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from types import TracebackType
from typing import Self, TypeVar

import mlx.core as mx

Item = TypeVar("Item")
Out = TypeVar("Out")

MOST = 4  # each holds a piece in several float32 copies
MOST_GPU = 2  # one keeps it busy while the other reads and writes; a piece's copies are larger there


def usual() -> int:
    """How many workers a job has that isn't told."""
    most = MOST if mx.default_device() == mx.Device(mx.cpu) else MOST_GPU
    return max(1, min(most, os.cpu_count() or 1))


class Workers:
    """A pool for the length of a `with`. Its threads have the device that is the default where it is made."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "fit", mx.set_default_device, (mx.default_device(),))

    def each(
        self,
        work: Callable[[Item], Out],
        items: Iterable[Item],
        done: Callable[[Item, Out], None],
        stop: Callable[[], None],
    ) -> None:
        """Calls `work` on every item in the pool, and `done` with each result here, in the order they come.

        The first exception, of either or an interrupt, is raised when no worker works any more; items not begun are
        dropped, and `stop` is called to end what a worker may wait for.
        """
        futures = {self._pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            stop()
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
