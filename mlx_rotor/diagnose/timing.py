"""Repeated measurements of time, and the memory that they may take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import mlx.core as mx

SHARE = 0.6  # of the memory at hand that a measurement may take
REPEATS, SECONDS = 15, 1.0


def memory() -> int:
    """Bytes MLX may take here: the recommended working set of a GPU, else the machine's memory, less what is in use."""
    total = mx.device_info().get("max_recommended_working_set_size")
    if total is None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, int(total) - mx.get_active_memory())


def repeated(once: Callable[[], float]) -> Iterator[float]:
    """What `once` returns, REPEATS times; fewer, but at least 3, where that takes longer than SECONDS."""
    end = time.perf_counter() + SECONDS
    for i in range(REPEATS):
        if i >= 3 and time.perf_counter() > end:
            return
        yield once()
