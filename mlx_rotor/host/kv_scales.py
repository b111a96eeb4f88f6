"""Calibrated KV schemes that come with a checkpoint: a `kv_scheme.json` beside it, or compressed-tensors' scales in it.

Only headers and scalars are read, whatever a checkpoint's size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import codec
from ..cache import Scheme, scheme_file
from ..cache.scheme_file import Sidecar
from ..errors import RotorError
from .notes import note, noted

FILE = "kv_scheme.json"
# compressed-tensors keeps a KV scale at attention or at its projections' output; a value is its code times the scale.
_NAME = re.compile(
    r"(?:^|\.)layers\.(?P<layer>\d+)\.(?:self_attn|self_attention|attention|attn)\.(?:attn\.)?"
    r"(?:(?:(?P<a>[kv])_proj\.)?(?P<b>[kv])_scale|(?P<c>[kv])_proj\.output_scale)$"
)
_HEADER_LIMIT = 100 << 20  # safetensors' own


def scheme(folder: str | Path) -> Sidecar | None:
    """The scheme that comes with a checkpoint folder: its `kv_scheme.json`, else its scales as fp8, else None.

    Raises:
        RotorError: see `cache.scheme_file.read` and `scales`.
    """
    file = Path(folder) / FILE
    if file.is_file():
        return scheme_file.read(file)
    found = scales(folder)
    if found is None:
        return None
    layers = tuple((codec.with_parameter("fp8", k), codec.with_parameter("fp8", v)) for k, v in found)
    return scheme_file.check(Sidecar("fp8", layers), str(folder))


def came_from(model: Any, folder: str | Path) -> None:
    """Remembers the folder that `model` was loaded from, where its scales are read when they are asked for."""
    note(model, "_rotor_own_scheme", cache(partial(scheme, folder)))


def with_own_scales(wanted: Scheme, model: Any) -> Scheme:
    """Plain `fp8` with the scales that came with the model, where there are any; other schemes as they are.

    Raises:
        RotorError: see `scheme`; scales for another number of layers than the model has are one of `Scheme.codecs`.
    """
    own = noted(model, "_rotor_own_scheme")
    if own is None or wanted.layers is not None or (wanted.k, wanted.v) != ("fp8", "fp8"):
        return wanted
    found: Sidecar | None = own()
    if found is None or any(name.partition(":")[0] != "fp8" for layer in found.layers for name in layer):
        return wanted
    return replace(wanted, layers=found.layers, label="fp8", model=found.model)


def scales(folder: str | Path) -> list[tuple[float, float]] | None:
    """(scale of K, of V) of every layer that has them, in order of layers; None if there are none.

    Raises:
        RotorError: K's scale without V's, two different ones of a layer, one that is no finite number above 0 or no
            scalar, a damaged file.
    """
    found: dict[tuple[int, str], float] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, value in _scalars(file):
            match = _NAME.search(name)
            assert match is not None
            at = int(match["layer"]), match["b"] or match["c"]
            if match["a"] and match["a"] != match["b"]:
                raise RotorError(f"{file}: {name} is a scale of {match['b']} at {match['a']}_proj")
            if not (math.isfinite(value) and value > 0):
                raise RotorError(f"{file}: {name} is {value}; a KV scale must be a finite number above 0")
            if found.setdefault(at, value) != value:
                raise RotorError(f"{file}: {name} is {value}, and another scale of the same layer is {found[at]}")
    layers = sorted({layer for layer, _ in found})
    for layer in layers:
        for side, other in (("k", "v"), ("v", "k")):
            if (layer, side) not in found:
                raise RotorError(
                    f"{folder}: layer {layer} has a KV scale of {other.upper()} and none of {side.upper()}"
                )
    return [(found[layer, "k"], found[layer, "v"]) for layer in layers] or None


def _scalars(file: Path) -> Iterator[tuple[str, float]]:
    """Names and values of a safetensors file's KV scales."""
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        try:
            if size > _HEADER_LIMIT:
                raise ValueError("its header is too long")
            header: dict[str, Any] = json.loads(f.read(size))
            named = {n: t for n, t in header.items() if _NAME.search(n)}
            for name, tensor in sorted(named.items()):
                begin, end = tensor["data_offsets"]
                if math.prod(tensor["shape"]) != 1:
                    raise RotorError(f"{file}: {name} is {tensor['shape']}; only one scale a layer can be used")
                f.seek(8 + size + begin)
                yield name, _number(f.read(end - begin), tensor["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise RotorError(f"{file}: no safetensors file ({type(e).__name__}: {e})") from e


def _number(data: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return float(np.frombuffer(b"\0\0" + data, "<f4")[0])
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    if dtype not in kinds:
        raise ValueError(f"a scale of type {dtype}")
    return float(np.frombuffer(data, kinds[dtype])[0])
