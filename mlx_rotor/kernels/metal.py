"""Metal kernels as callables: header text with includes inlined, one generated call line, one name for one source.

`mx.fast.metal_kernel` makes them on a Mac; a simulator with the same signature makes them elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from . import source

# What takes mx.fast.metal_kernel's arguments and gives a callable of its kind.
Maker = Callable[..., Any]
_maker: list[Maker] = []


def use_maker(maker: Maker | None) -> None:
    """Makes kernels with `maker` from now on; None: with MLX's own."""
    _maker[:] = [] if maker is None else [maker]
    kernel.cache_clear()


def simulated() -> bool:
    """Whether kernels are made by something else than MLX."""
    return bool(_maker)


@cache
def kernel(
    name: str, headers: tuple[str, ...], inputs: tuple[str, ...], outputs: tuple[str, ...], body: str
) -> Callable[..., list[mx.array]]:
    """The kernel `name` whose source is `body`, behind `headers` (paths below kernels_metal).

    Inputs keep their strides: the body reads `<input>_strides`. The name MLX sees ends in a digest of the whole text,
    as MLX keeps compiled kernels by name.
    """
    header = source.join(headers)
    digest = hashlib.sha256(f"{header.digest}\n{body}".encode()).hexdigest()[:12]
    make: Maker = _maker[0] if _maker else mx.fast.metal_kernel
    made: Callable[..., list[mx.array]] = make(
        name=f"mlx_rotor_{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header.text,
        ensure_row_contiguous=False,
    )
    return made
