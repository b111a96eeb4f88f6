"""Models with weights in formats MLX does not have, for every loader that stands on mlx_lm.

From `import mlx_rotor` on, `mlx.nn.quantize` makes our layers where a module's mode is one of ours, and what splits
layers over machines splits them too. Everything else goes to MLX's own functions as it came.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx.utils import tree_unflatten

from ..errors import RotorError
from . import checkpoints

Predicate = Callable[[str, nn.Module], Any]

# MLX's own.
stock_quantize = nn.quantize
stock_shard_inplace = distributed.shard_inplace
SHARDED = {
    "all-to-sharded": distributed.QuantizedAllToShardedLinear,
    "sharded-to-all": distributed.QuantizedShardedToAllLinear,
}
stock_sharded = {sharding: kind.__dict__["from_quantized_linear"] for sharding, kind in SHARDED.items()}


def _quantizable(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized")


@functools.wraps(stock_quantize)
def _quantize(
    model: nn.Module,
    group_size: int | None = None,
    bits: int | None = None,
    *,
    mode: str = "affine",
    class_predicate: Predicate | None = None,
    **more: Any,
) -> None:
    from ..experts import formats, layers

    default: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    made: list[tuple[str, nn.Module]] = []

    def others(path: str, module: nn.Module) -> Any:
        how = (class_predicate or _quantizable)(path, module)
        spec = default if how is True else how
        if not isinstance(spec, dict) or spec.get("mode") not in formats.ours():
            return how
        if missing := [name for name in ("bits", "group_size") if not isinstance(spec.get(name), int)]:
            raise RotorError(f"{path}: config.json says no {' and no '.join(missing)} for its {spec['mode']} weights")
        made.append((path, layers.of(module, spec["mode"], spec["bits"], spec["group_size"], path)))
        return False

    stock_quantize(model, **default, class_predicate=others, **more)
    model.update_modules(tree_unflatten(made))
    for _, layer in made:
        if isinstance(layer, layers.RotorEmbedding):
            layer.follow(model)


@functools.wraps(stock_shard_inplace)
def _shard_inplace(module: nn.Module, sharding: Any, *, segments: Any = 1, group: Any = None) -> None:
    from ..experts.sharding import check_split

    group = group or mx.distributed.init()
    check_split(module, sharding, segments, group)
    stock_shard_inplace(module, sharding, segments=segments, group=group)


def _sharded(sharding: str) -> Any:
    stock = stock_sharded[sharding].__func__

    @functools.wraps(stock)
    def from_quantized_linear(cls: Any, layer: nn.Module, *, segments: Any = 1, group: Any = None) -> Any:
        from ..experts.layers import RotorLinear
        from ..experts.sharding import shard_linear

        if not isinstance(layer, RotorLinear):
            return stock(cls, layer, segments=segments, group=group)
        return shard_linear(layer, sharding, segments, group or mx.distributed.init())

    return classmethod(from_quantized_linear)


def install() -> None:
    """Puts the wrappers in place; again does nothing."""
    if installed():
        return
    nn.quantize = _quantize
    distributed.shard_inplace = _shard_inplace
    for sharding, kind in SHARDED.items():
        setattr(kind, "from_quantized_linear", _sharded(sharding))  # noqa: B010
    checkpoints.install()


def uninstall() -> None:
    """Puts MLX's and mlx_lm's own functions back. Models that were loaded keep working."""
    nn.quantize = stock_quantize
    distributed.shard_inplace = stock_shard_inplace
    for sharding, kind in SHARDED.items():
        setattr(kind, "from_quantized_linear", stock_sharded[sharding])  # noqa: B010
    checkpoints.uninstall()


def installed() -> bool:
    return nn.quantize is _quantize
