"""mlx_lm's own model of a config.json without weights: the names and shapes of its parameters.

From tensors' names, shapes and dtypes it follows what mlx_lm's loader makes of a checkpoint; no weight is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.utils
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

from ..errors import RotorError
from ..experts import formats, layers


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
    except Exception as e:  # each architecture fails on its own keys
        raise RotorError(f"config.json: mlx_lm can't make a {model_type} of it: {e}") from e


def parameters(model: Any) -> dict[str, tuple[int, ...]]:
    """Name in the module tree -> shape, of every parameter, in the tree's order."""
    flat: Any = mlx.utils.tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in flat}


def takes_formats(module: Any) -> bool:
    """Whether a module can hold weights in the formats that MLX doesn't have."""
    return isinstance(module, nn.Linear | nn.Embedding | SwitchLinear | MultiLinear)


# The dtypes that mx.load gives safetensors dtypes. FP8 comes as bytes.
DTYPES = {
    "BOOL": mx.bool_,
    **{"U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64},
    **{"I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64},
    **{"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "F64": mx.float32},
    **{"F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8},
}

Placeholders = dict[str, mx.array]


class StockReader:
    """mlx_lm's loader without weights: what it would make of a checkpoint with given names, shapes and dtypes.

    All arrays are lazy and stay so: memory doesn't grow with the model.

    Raises:
        RotorError: as `skeleton`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model = skeleton(config)
        self.modules = self._leaves()

    def sanitized(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Placeholders:
        """name -> (safetensors dtype, shape) as the files have them -> arrays as the model's `sanitize` leaves them.

        Raises:
            RotorError: `sanitize` trips over what is there or missing.
        """
        weights = {name: mx.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
        if not hasattr(self.model, "sanitize"):
            return weights
        try:
            weights = dict(self.model.sanitize(weights))
        except Exception as e:  # each architecture fails in its own way
            raise RotorError(f"mlx_lm's sanitize fails with {type(e).__name__}: {e}") from e
        self.modules = self._leaves()  # some models drop their head where there are no weights for one
        return weights

    def keeps_float32(self, name: str) -> bool:
        """Whether mlx_lm's convert leaves a parameter's dtype alone, which it does where float32 is needed."""
        return not getattr(self.model, "cast_predicate", lambda _: True)(name)

    def is_float(self, path: str, part: str) -> bool:
        """Whether the model itself holds a module's parameter in floating point, before anything is quantized."""
        own = self.modules[path].get(part) if path in self.modules else None
        return isinstance(own, mx.array) and mx.issubdtype(own.dtype, mx.floating)

    def inner(self, path: str) -> int:
        """Input dimension of a module that can be quantized."""
        return int(self.modules[path].weight.shape[-1])

    def dimensions(self, path: str) -> tuple[tuple[int, ...], int]:
        """(leading dimensions, input dimension) of the weight of a module that isn't quantized yet."""
        shape = self.modules[path].weight.shape
        return tuple(shape[:-1]), int(shape[-1])

    def quantize(self, section: Mapping[str, Any], weights: Placeholders) -> dict[str, str]:
        """Puts quantized modules where the loader would under config.json's `quantization`, with mlx_rotor imported;
        the others stay.

        Returns:
            path -> why, of modules it could not be done for; they stay as they are.
        """
        failed: dict[str, str] = {}
        made: list[tuple[str, nn.Module]] = []
        default = {"group_size": section["group_size"], "bits": section["bits"], "mode": section.get("mode", "affine")}
        for path, module in self.modules.items():
            stated = section[path] if path in section else self._inferred(path, module, weights)
            if not stated:
                continue
            try:
                made.append((path, _quantized(module, default if stated is True else stated)))
            except Exception as e:  # to_quantized and mx.quantize raise several kinds
                failed[path] = str(e).splitlines()[0] if str(e) else type(e).__name__
        self.model.update_modules(mlx.utils.tree_unflatten(made))
        return failed

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The weights that the loader expects: every name, and its shape."""
        return parameters(self.model)

    def _leaves(self) -> dict[str, nn.Module]:
        leaves: Any = mlx.utils.tree_flatten(self.model.leaf_modules(), is_leaf=nn.Module.is_module)
        return dict(leaves)

    def _inferred(self, path: str, module: nn.Module, weights: Placeholders) -> Any:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        inner, scales, weight = self.inner(path), weights[f"{path}.scales"], weights.get(f"{path}.weight")
        if weight is None or not scales.shape or not scales.shape[-1]:
            return False
        spec = stored_spec(inner, weight, scales)
        stated: dict[str, Any] = {"bits": spec[0], "group_size": spec[1], "mode": spec[2]}
        if f"{path}.global_scale" in weights and "global_scale" in inspect.signature(module.to_quantized).parameters:
            stated["global_scale"] = True
        return stated


def ours(stated: Any) -> bool:
    """Whether a module's settings are of a format that MLX doesn't have."""
    return isinstance(stated, dict) and stated.get("mode") in formats.ours()


def _quantized(module: Any, stated: Any) -> Any:
    if ours(stated):
        return layers.of(module, stated["mode"], stated.get("bits"), stated.get("group_size"))
    if not hasattr(module, "to_quantized"):
        raise ValueError(f"a {type(module).__name__} can't be quantized")
    if not isinstance(stated, dict):
        raise ValueError(f"expected settings, found {stated!r}")
    return module.to_quantized(**stated)


def stored_spec(inner: int, weight: mx.array, scales: mx.array) -> tuple[int, int, str]:
    """(bits, group size, mode) that packed codes and scales of a weight with `inner` input dimensions have."""
    group, bits = inner // scales.shape[-1], weight.shape[-1] * 32 // inner
    if scales.dtype != mx.uint8:
        return bits, group, "affine"
    modes = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
    return bits, group, modes.get((bits, group), "unknown")
