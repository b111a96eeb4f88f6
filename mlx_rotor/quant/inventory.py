"""What a model consists of, by its config.json and a checkpoint's names: each parameter's role, shape and placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import models
from ..errors import RotorError
from ..host.skeleton import parameters, skeleton, takes_formats
from .placement import Placement, Placements

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of mlx_lm's model. `layer` None: unlayered. `kept`: the safetensors dtype it has unquantized.
    `packable`: its module has a quantized form in mlx_lm. `packable_ours`: and one in our own formats."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    placement: Placement
    kept: str
    packable: bool
    packable_ours: bool

    @property
    def module(self) -> str:
        """Path of the module it is the weight of; its own name if it is none."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Inventory:
    """`parameters`: embeddings, layer by layer, the rest; within each, mlx_lm's order. `drop`: regular expressions of
    tensor names that mlx_lm makes no use of, `extra`: how many layers after the last may be among them."""

    parameters: tuple[Parameter, ...]
    layers: int
    drop: tuple[str, ...]
    extra: int


def inventory(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> Inventory:
    """The inventory of a checkpoint with this config.json. `dtypes`: as `make_plan`.

    Raises:
        RotorError: an architecture without names here, a parameter that none covers, a source in MXFP4.
    """
    arch = models.lookup(config)
    refuse_mxfp4(config, dtypes)
    model = skeleton(config)
    shapes = {n: shape for n, shape in parameters(model).items() if n not in arch.optional or n in dtypes}
    packable = {name for name, module in model.named_modules() if hasattr(module, "to_quantized")}
    ours = {name for name, module in model.named_modules() if takes_formats(module)}
    placements = Placements(arch, shapes, dtypes)
    stated = str(config.get("torch_dtype") or config.get("dtype"))
    default = FLOATS.get(stated.removeprefix("torch."), "BF16")
    found, unknown = [], []
    for name, shape in shapes.items():
        match = arch.find(name)
        if match is None:
            unknown.append(name)
            continue
        tensor, layer = match
        placement = placements.of(name, tensor, layer)
        kept = _kept(tensor, dtypes.get(placement.sources[0], default))
        module = name.removesuffix(".weight")
        found.append(Parameter(name, tensor.role, layer, shape, placement, kept, module in packable, module in ours))
    if unknown:
        raise RotorError(
            f"model_type {config['model_type']!r}: no role is known for {listed(unknown)}; it is a variant of the"
            " architecture that mlx_rotor has no names for"
        )
    layers = 1 + max((p.layer for p in found if p.layer is not None), default=-1)
    found.sort(key=lambda p: p.layer if p.layer is not None else -1 if p.role == "embed" else layers)
    extra = config.get("num_nextn_predict_layers")
    extra = extra if type(extra) is int and extra > 0 else 1
    return Inventory(tuple(found), layers, tuple(models.pattern(name) for name in arch.drop), extra)


def refuse_mxfp4(config: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """RotorError if a checkpoint's weights are in MXFP4, by its config.json or the names of its tensors."""
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method == "mxfp4" or any(name.endswith("_blocks") for name in names):
        raise RotorError(
            "the source is already quantized (to MXFP4, as gpt-oss is published) and would only lose precision; mlx_lm"
            " runs it as it is, or start from a bfloat16 copy"
        )


def listed(names: list[str]) -> str:
    """`a, b, c and 5 more`."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kept(tensor: models.Tensor, source: str) -> str:
    # bfloat16 but for what mlx_lm itself computes with in float32, such as the router: any other float32 or float16
    # tensor would promote bf16 activations.
    if tensor.dtype == "source" or tensor.role == "router":
        return source if source in FLOATS.values() else "BF16"
    return tensor.dtype or "BF16"
