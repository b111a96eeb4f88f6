"""A checkpoint's parameters as float32, each read when it is asked for: MLX's own files, or a source under a plan."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import RotorError
from ..experts import formats
from ..host.layerwise import Parameters
from ..host.skeleton import DTYPES, ours, parameters, skeleton, stored_spec
from ..quant import policy
from ..quant.guide import EntryParameters
from ..quant.plan import make_plan, read_config
from ..quant.safetensors_io import TensorInfo, read_header
from ..quant.source import Checkpoint

AS_IT_IS = '[[rule]]\nroles = ["*"]\nkeep = true\n'
RAW = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32, mx.uint32: np.uint32, mx.uint8: np.uint8}


class StoredParameters:
    """Parameters of an MLX checkpoint, quantized or not, expanded as they are read. See `host.layerwise.Parameters`.

    Bits, group size and mode follow from the tensors, as in mlx_lm; those of our own formats from config.json.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """
        Raises:
            RotorError: damaged files, or a config.json that mlx_lm can't make a model of.
        """
        self._folder, self._tensors = folder, dict[str, TensorInfo]()
        for file in sorted(folder.glob("model*.safetensors")):
            self._tensors |= read_header(file)
        self._shapes = parameters(skeleton(config))
        section = config.get("quantization") or {}
        self._formats = {
            path: formats.get(stated["mode"], stated.get("bits"), stated.get("group_size"))
            for path, stated in section.items()
            if ours(stated)
        }

    def names(self) -> Collection[str]:
        return {name for name in self._shapes if name in self._tensors}

    def whole(self, name: str) -> mx.array:
        return self._read(name, None)

    def part(self, name: str, expert: int) -> mx.array:
        return self._read(name, expert)

    def _read(self, name: str, part: int | None) -> mx.array:
        path, _, what = name.rpartition(".")
        values = self._array(name, part)
        if what == "weight" and path in self._formats:
            parts = [values, *(self._array(f"{path}.{kind}", part) for kind in self._formats[path].beside)]
            return self._formats[path].decode(parts, self._shapes[name][-1])
        scales = self._tensors.get(f"{path}.scales") if what == "weight" else None
        if scales is None:
            return values.astype(mx.float32)
        factors = self._array(scales.name, part)
        bits, group, mode = stored_spec(self._shapes[name][-1], values, factors)
        if mode == "affine":
            biases = self._array(f"{path}.biases", part).astype(mx.float32)
            return mx.dequantize(values, factors.astype(mx.float32), biases, group, bits, mode)
        whole = self._tensors.get(f"{path}.global_scale")
        factor = None if whole is None else self._array(whole.name, part)
        return mx.dequantize(values, factors, None, group, bits, mode, factor, dtype=mx.float32)

    def _array(self, name: str, part: int | None) -> mx.array:
        if name not in self._tensors:
            where = f"{self._folder}: {name} is not there"
            raise RotorError(f"{where}; `mlx_rotor quantize --check {self._folder}` says what else is wrong")
        info = self._tensors[name]
        shape, size, kind = info.shape, info.nbytes, DTYPES[info.dtype]
        if part is not None:
            shape, size = shape[1:], size // shape[0]
        data = np.frombuffer(info.read((part or 0) * size, ((part or 0) + 1) * size), RAW[kind]).reshape(shape)
        return mx.array(data).view(kind) if kind == mx.bfloat16 else mx.array(data)


def parameters_of(folder: Path) -> tuple[dict[str, Any], Parameters]:
    """config.json and parameters of a checkpoint folder: one for MLX, or one that can be quantized from.

    Raises:
        RotorError: neither, or damaged files.
    """
    config = read_config(folder)
    if config.get("quantization"):
        return config, StoredParameters(folder, config)
    checkpoint = Checkpoint.open(folder, config)
    plan = make_plan(config, policy.parse(AS_IT_IS, "as it is"), checkpoint.dtypes)
    checkpoint.verify(plan)
    return config, EntryParameters(plan, checkpoint)
