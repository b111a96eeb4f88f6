"""mlx_lm's own model of a config.json, without weights: which parameters it has, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
import mlx.utils
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

from ..errors import RotorError


def skeleton(config: Mapping[str, Any]) -> Any:
    """The model mlx_lm makes for a config.json. Its parameters are lazy random arrays: they take no memory until
    they are evaluated, and are not meant to be.

    Raises:
        RotorError: an architecture mlx_lm doesn't have, or a config it can't make a model of.
    """
    model_type = config.get("model_type")
    try:
        model_class, args_class = _get_classes(dict(config))
    except (KeyError, ValueError) as e:
        raise RotorError(f"config.json: model_type {model_type!r} is not one mlx_lm has: {e}") from e
    try:
        return model_class(args_class.from_dict(dict(config)))
    except Exception as e:  # each architecture checks, or trips over, its own keys
        raise RotorError(f"config.json: mlx_lm can't make a {model_type} of it: {e}") from e


def parameters(model: Any) -> dict[str, tuple[int, ...]]:
    """Name in the module tree -> shape, of every parameter, in the tree's order."""
    flat: Any = mlx.utils.tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in flat}


def takes_formats(module: Any) -> bool:
    """Whether a module can hold weights in the formats that MLX doesn't have."""
    return isinstance(module, nn.Linear | nn.Embedding | SwitchLinear | MultiLinear)
