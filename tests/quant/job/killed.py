"""A job in another process that kills itself at a chosen one of the things it does to the disk or tells."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATCHED = ("pwrite", "write", "fsync", "ftruncate", "replace", "rename", "unlink", "rmdir", "mkdir")


class Ticks:
    """Counts calls; `at` the given one the process kills itself, in the middle of it if it writes."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.kinds = at, []

    def __call__(self, kind: str, before: Callable[[], Any] | None = None) -> None:
        self.kinds.append(kind)
        if len(self.kinds) == self.at:
            if before:
                before()
            os.kill(os.getpid(), signal.SIGKILL)


def watched(ticks: Ticks, run: Callable[[Callable[[Any], None]], Any]) -> Any:
    """Calls `run(progress)` with every operation on files counted."""
    saved = {name: getattr(os, name) for name in PATCHED}

    def patch(name: str) -> Callable[..., Any]:
        real = saved[name]

        def call(*args: Any, **options: Any) -> Any:
            half = None
            if name in ("pwrite", "write"):
                half = lambda: real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])  # noqa: E731
            ticks(name, half)
            return real(*args, **options)

        return call

    for name in PATCHED:
        setattr(os, name, patch(name))
    try:
        return run(lambda event: ticks(event.kind))
    finally:
        for name, real in saved.items():
            setattr(os, name, real)


def job(folder: Path, out: Path, options: dict[str, Any], at: int) -> None:
    """Quantizes until the `at`-th tick. `options` may name a policy."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    from quantizing import quantize

    from mlx_rotor.quant.policy import load

    policy = load(options.pop("policy", "config-i"))
    watched(Ticks(at), lambda progress: quantize(folder, out, policy, progress=progress, **options))
