"""Metal kernels as callables: header text with includes inlined, one generated call line, one name for one source.

`mx.fast.metal_kernel` makes them on a Mac; a simulator with the same signature makes them elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx

from . import source

# What takes mx.fast.metal_kernel's arguments and gives a callable of its kind.
Maker = Callable[..., Any]
Made = TypeVar("Made", bound=Callable[..., Any])
_maker: list[Maker] = []
_forgetful: list[Callable[[], None]] = []


def use_maker(maker: Maker | None) -> None:
    """Makes kernels with `maker` from now on; None: with MLX's own."""
    _maker[:] = [] if maker is None else [maker]
    for forget in _forgetful:
        forget()


def simulated() -> bool:
    """Whether kernels are made by something else than MLX."""
    return bool(_maker)


def kept(make: Made) -> Made:
    """Calls `make` once for equal arguments: putting a kernel's text together takes longer than a launch."""
    known = cache(make)
    _forgetful.append(known.cache_clear)
    return known  # type: ignore[return-value]


@cache
def constant(value: float) -> mx.array:
    """A float32 that kernels take, evaluated: made once."""
    array = mx.array(value, mx.float32)
    mx.eval(array)
    return array


@kept
def kernel(
    name: str,
    headers: tuple[str, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    body: str,
    contiguous: bool = False,
) -> Callable[..., list[mx.array]]:
    """The kernel `name` whose source is `body`, behind `headers` (paths below kernels_metal).

    Inputs keep their strides: the body reads `<input>_strides`; `contiguous`: those that are not in the order of rows
    are copied first. The name MLX sees ends in a digest of the whole text,
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
        ensure_row_contiguous=contiguous,
    )
    return made
