"""Notes on a model instance beside its parameters, and a model's fingerprint.

The fingerprint says which weights a prompt cache or a calibration belongs to. A few small tensors are read for it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def noted(model: Any, name: str) -> Any:
    """The note `name` on this very instance, or None."""
    return getattr(model, "__dict__", {}).get(name)


def note(model: Any, name: str, value: Any) -> None:
    """Puts a note into the instance itself: nn.Module's attribute setting would keep it among the parameters."""
    object.__setattr__(model, name, value)


READ, SMALL = 8, 1 << 16


def fingerprint(model: Any) -> str:
    """16 hexadecimal digits of the architecture, every parameter's name and shape, and the values of some small ones.

    Parameters' types don't count: a model cast to run on another device is the same model. Adapters do. Computed once
    for a model.
    """
    known: str | None = noted(model, "_rotor_fingerprint")
    if known:
        return known
    parameters: list[tuple[str, mx.array]] = sorted(tree_flatten(model.parameters()), key=lambda item: item[0])  # type: ignore[arg-type]
    digest = hashlib.sha256(type(model).__module__.encode())
    for name, value in parameters:
        digest.update(f"{name} {value.shape}".encode())
    small = [value for _, value in parameters if value.size <= SMALL and mx.issubdtype(value.dtype, mx.floating)]
    # The first and the last: norms of layers far apart.
    for value in [*small[: READ // 2], *small[-READ // 2 :]]:
        digest.update(np.array(value.astype(mx.float32)).tobytes())
    note(model, "_rotor_fingerprint", digest.hexdigest()[:16])
    return digest.hexdigest()[:16]
