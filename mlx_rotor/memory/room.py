"""The bytes of weights that a Mac has room for beside a KV cache: what macOS lets its GPU have, less other needs.

The limit is Metal's recommendedMaxWorkingSetSize. macOS gives two thirds of the RAM below 36 GiB and three quarters
from there on: 10.7 of 16, 21.3 of 32, 27 of 36, 48 of 64, 96 of 128 GiB are what llama.cpp and MLX print on such
machines. Recent systems give some of them more (107.5 of 128), none less, so this is what fits any. `sudo sysctl
iogpu.wired_limit_mb=N` raises it until the next start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..cache import Scheme
from ..errors import RotorError
from .kv import kv_bytes

GIB = 2**30
# Activations of a prompt's chunk, growing a layer's cache into a larger buffer, MLX's own buffers. At MiniMax-M2.7's
# dimensions a chunk of 2048 tokens has 0.4 GB of expert activations and attention's tiles are of that order.
RESERVE = 2 * GIB


@dataclass(frozen=True)
class Room:
    """All in bytes. `limit`: what the GPU may hold of `ram`. `kv`: the caches at `context` tokens."""

    ram: int
    limit: int
    context: int
    kv: int
    reserve: int

    @property
    def weights(self) -> int:
        """What is left for weights."""
        return self.limit - self.kv - self.reserve

    def text(self) -> str:
        return (
            f"{_gb(self.weights)} for weights: the GPU may have {_gb(self.limit)} of {self.ram / GIB:g} GiB, less"
            f" {_gb(self.kv)} of KV cache at {self.context:,} tokens and {_gb(self.reserve)} in reserve"
        )


def gpu_limit(ram: int) -> int:
    """Bytes of `ram` bytes that macOS lets the GPU have by default."""
    return ram * 3 // 4 if ram >= 36 * GIB else ram * 2 // 3


def room(
    config: Mapping[str, Any],
    ram: int,
    context: int,
    scheme: Scheme | None,
    *,
    limit: int | None = None,
    reserve: int = RESERVE,
) -> Room:
    """Room for the weights of a model with this config.json on a Mac with `ram` bytes, with one sequence of `context`
    tokens cached under `scheme` (None: mlx_lm's own cache, 16 bits). `limit`: the GPU's, where it was raised.

    Raises:
        RotorError: nothing is left for weights; the message has the longest context that leaves something, or says that
            none does. Otherwise as `kv_bytes`.
    """
    if limit is not None and limit > ram:
        raise RotorError(f"a GPU limit of {_gb(limit)} is more than the {_gb(ram)} of RAM there is")
    allowed = gpu_limit(ram) if limit is None else limit
    found = Room(ram, allowed, context, kv_bytes(config, context, scheme), reserve)
    if found.weights > 0:
        return found
    spare, fits = allowed - reserve, 0
    while spare > 0 and context > fits + 1:  # bytes grow with the context
        middle = (fits + context) // 2
        fits, context = (middle, context) if kv_bytes(config, middle, scheme) < spare else (fits, middle)
    hint = f"up to {fits:,} tokens would leave some" if fits else "no context is short enough"
    raise RotorError(
        f"no room for weights: the GPU may have {_gb(allowed)} of {ram / GIB:g} GiB, and {found.context:,} tokens of KV"
        f" cache take {_gb(found.kv)}, the reserve {_gb(reserve)}; {hint}. A narrower KV scheme takes less, and sysctl"
        " iogpu.wired_limit_mb gives the GPU more"
    )


def missing(found: Room, least: int) -> str:
    """What to say where a model's smallest size, `least` bytes, has no room: how much RAM, or GPU limit, would do."""
    need = least + found.kv + found.reserve
    ram = next(size * GIB for size in range(1, 1 << 20) if gpu_limit(size * GIB) >= need)
    limit = -(-need // 2**20)
    raised = f", or sysctl iogpu.wired_limit_mb={limit}" if need < found.ram else ""
    return f"{found.text()}; {_gb(least)} are needed at the least: a Mac with {ram // GIB} GiB or more{raised}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
