"""What mlx_lm reads of a checkpoint in our formats: its config.json, and its weights to the last tensor.

mlx_lm takes a second to import, so its functions are wrapped when something else imports it.
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


def install() -> None:
    """Wraps mlx_lm's functions, now or when it is imported; again does nothing."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    if MODULE in sys.modules:
        _wrap(sys.modules[MODULE])


def uninstall() -> None:
    """Puts mlx_lm's own functions back."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    module = sys.modules.get(MODULE)
    for name in WRAPPERS:
        if stock := getattr(getattr(module, name, None), "_rotor_stock", None):
            setattr(module, name, stock)
