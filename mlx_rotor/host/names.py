"""Schemes under the names other packages gave their cache classes: `IsoQuantCache(bits=4)` and its like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cache import Scheme
from ..errors import RotorError
from .attachment import make_prompt_cache


@dataclass(frozen=True)
class Recipe(Scheme):
    """A scheme that makes a model's caches when it is called with the model; `attach` takes it too."""

    def __call__(self, model: Any) -> list[Any]:
        """The prompt cache of `model`, one cache a layer; see `make_prompt_cache`."""
        return make_prompt_cache(model, self)


def _recipe(family: str, bits: int, k_bits: int | None, v_bits: int | None, parts: dict[str, Any]) -> Recipe:
    k, v = (f"{family}{bits if own is None else own}" for own in (k_bits, v_bits))
    unknown = parts.keys() - {"sinks", "ring", "protect_layers", "centre"}
    if unknown:
        raise RotorError(
            f"no part of a scheme: {', '.join(sorted(unknown))}; there are sinks, ring, protect_layers, centre"
        )
    return Recipe(k, v, **parts)


def IsoQuantCache(
    bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, mode: str = "fast", **parts: Any
) -> Recipe:
    """Quaternion blocks, multiplied from the left (`mode="fast"`) or from both sides ("full"), 2 to 4 bits.

    Args:
        k_bits, v_bits: of one side, in place of `bits`.
        parts: sinks, ring, protect_layers, centre, see `Scheme`.

    Raises:
        RotorError: bits there is no codec of, K below V, or an unknown mode.
    """
    if mode not in ("fast", "full"):
        raise RotorError(f"IsoQuantCache has modes fast and full, not {mode!r}")
    return _recipe("iso" if mode == "fast" else "isofull", bits, k_bits, v_bits, parts)


def PlanarQuantCache(bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, **parts: Any) -> Recipe:
    """Plane rotations of pairs; otherwise as `IsoQuantCache`."""
    return _recipe("planar", bits, k_bits, v_bits, parts)


def RotorQuantCache(bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, **parts: Any) -> Recipe:
    """Rotors of triples; otherwise as `IsoQuantCache`."""
    return _recipe("rotor", bits, k_bits, v_bits, parts)


def TurboQuantCache(bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, **parts: Any) -> Recipe:
    """A Hadamard rotation of the whole vector; otherwise as `IsoQuantCache`."""
    return _recipe("turbo", bits, k_bits, v_bits, parts)
