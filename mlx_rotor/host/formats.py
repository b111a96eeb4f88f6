"""Models with weights in formats that MLX doesn't have, for every loader that stands on mlx_lm.

From `import mlx_rotor` on, `mlx.nn.quantize` makes our layers where a module's mode is one of ours, and MLX's functions
that split layers over machines split ours too. Everything else reaches MLX's own functions unchanged. mlx_lm takes a
second to import, so its functions are wrapped when something else imports it.
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx.utils import tree_unflatten

from ..errors import RotorError

MODULE = "mlx_lm.utils"
INDEX = "model.safetensors.index.json"


def _load_config(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(stock)
    def load_config(model_path: Path) -> dict[str, Any]:
        from ..experts import standalone

        return standalone.without_model_file(stock(model_path))

    return load_config


def _load_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load_model(model_path: Path, lazy: bool = False, strict: bool = True, *args: Any, **kwargs: Any) -> Any:
        from ..experts import standalone

        model, config = stock(model_path, lazy, strict or _is_whole(Path(model_path)), *args, **kwargs)
        return model, standalone.with_model_file(config)

    return load_model


def _is_whole(folder: Path) -> bool:
    """Whether the folder has a checkpoint in our formats with all of its files: one that loads strictly, or is broken.
    Loaders for several machines ask for no strictness, as a machine may have only its part of the files."""
    from ..experts import standalone

    config = folder / "config.json"
    if not config.is_file() or not standalone.modes(json.loads(config.read_text(encoding="utf-8"))):
        return False
    index = folder / INDEX
    if not index.is_file():
        return any(folder.glob("model*.safetensors"))
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return all((folder / file).is_file() for file in set(files))


WRAPPERS = {"load_config": _load_config, "load_model": _load_model}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds mlx_lm's module where Python finds it, and wraps its functions as soon as it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _wrap(module)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


FINDER = _Finder()


def _wrap(module: ModuleType) -> None:
    for name, wrapper in WRAPPERS.items():
        stock = getattr(module, name, None)  # an mlx_lm without it is refused by `versions` where we load a model
        if stock is not None and not hasattr(stock, "_rotor_stock"):
            wrapped = wrapper(stock)
            setattr(wrapped, "_rotor_stock", stock)  # noqa: B010
            setattr(module, name, wrapped)


def install_reader() -> None:
    """Wraps mlx_lm's functions, now or when it is imported; a second call does nothing."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    if MODULE in sys.modules:
        _wrap(sys.modules[MODULE])


def uninstall_reader() -> None:
    """Puts mlx_lm's own functions back."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    module = sys.modules.get(MODULE)
    for name in WRAPPERS:
        if stock := getattr(getattr(module, name, None), "_rotor_stock", None):
            setattr(module, name, stock)


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
    """Puts the wrappers in place; a second call does nothing."""
    if installed():
        return
    nn.quantize = _quantize
    distributed.shard_inplace = _shard_inplace
    for sharding, kind in SHARDED.items():
        setattr(kind, "from_quantized_linear", _sharded(sharding))  # noqa: B010
    install_reader()


def uninstall() -> None:
    """Puts MLX's and mlx_lm's own functions back. Models that were loaded keep working."""
    nn.quantize = stock_quantize
    distributed.shard_inplace = stock_shard_inplace
    for sharding, kind in SHARDED.items():
        setattr(kind, "from_quantized_linear", stock_sharded[sharding])  # noqa: B010
    uninstall_reader()


def installed() -> bool:
    return nn.quantize is _quantize
