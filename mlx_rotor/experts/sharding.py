"""Layers with packed weights split over machines: rows, or whole groups of columns. Codebooks stay in one piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace

from ..errors import RotorError
from ..kernels import experts
from .layers import PackedLayer, RotorLinear

Sharding = str | Callable[[str, mx.array], Any]


class RotorShardedToAllLinear(RotorLinear):
    """The columns of one machine; the result is the sum over `group`, bias added once."""

    group: Any

    def __call__(self, x: mx.array) -> mx.array:
        packed = self.packed
        out = mx.distributed.all_sum(experts.matmul(x, replace(packed, bias=None)), group=self.group)
        return out if packed.bias is None else (out + packed.bias).astype(x.dtype)


def shard_linear(module: RotorLinear, sharding: str, segments: int | list[Any], group: Any) -> RotorLinear:
    """A layer with this machine's part, as mlx's function of that name for its own layers.

    Args:
        sharding: "all-to-sharded" splits rows, "sharded-to-all" columns, and then sums.
        segments: parts that stand behind each other in the split axis, each split on its own.

    Raises:
        RotorError: see `check_split`.
    """
    check_split(module, sharding, segments, group)
    kind = RotorLinear if sharding == "all-to-sharded" else RotorShardedToAllLinear
    whole = (int(module["weight"].shape[0]), module.whole)
    part = kind(whole, module.mode, module.bits, module.group_size, "bias" in module, module.name)
    for name, value in module.items():
        part[name] = value
    if isinstance(part, RotorShardedToAllLinear):
        part.group = group
    shard_inplace(part, sharding, segments=segments, group=group)
    return part


def check_split(module: nn.Module, sharding: Sharding, segments: int | list[Any], group: Any) -> None:
    """Raises RotorError where splitting `module` would cut through a group of packed weights, naming the layer, its
    columns, the groups, and the numbers of machines that fit. `module` may hold such layers, and others."""
    machines = group.size()
    for path, layer in module.named_modules():
        if not isinstance(layer, PackedLayer) or not _splits_columns(path, layer, sharding):
            continue
        for part in _parts(layer, segments):
            if part % machines or part // machines % layer.group_size:
                raise RotorError(
                    layer.no_whole_groups(f"a part of {part / machines:g} for each of {machines} machines")
                )


def _splits_columns(path: str, layer: PackedLayer, sharding: Sharding) -> bool:
    if isinstance(sharding, str):
        return sharding == "sharded-to-all"
    axis = sharding(f"{path}.weight" if path else "weight", layer["weight"])
    axis = axis[0] if isinstance(axis, tuple) else axis
    return axis is not None and axis % layer["weight"].ndim == layer["weight"].ndim - 1


def _parts(layer: PackedLayer, segments: int | list[Any]) -> list[int]:
    """How many columns each segment has."""
    if isinstance(segments, int):
        return [layer.columns // segments] * segments
    if isinstance(segments[0], int):
        raise RotorError(f"{layer.label}: segments of packed columns are fractions of them, not {segments}")
    ends = [int(end * layer.columns) for end in segments]
    return [b - a for a, b in zip([0, *ends], [*ends, layer.columns], strict=True)]
