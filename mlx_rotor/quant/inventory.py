"""The parameters of a model, by its config.json and a checkpoint's names: role, shape and placement of each.

A placement says which tensors of the checkpoint hold a parameter, and which rows of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import models
from ..errors import RotorError
from ..host.skeleton import parameters, skeleton, takes_formats
from ..models import Architecture, Fused, Tensor, pattern


@dataclass(frozen=True)
class Layout:
    """How the parts of a weight lie in source tensors of `shape` that aren't just one part each.

    The tensor is seen as rows of its last dimension. Part p, if the parts share a tensor, begins at row
    `p * stride + start` and takes every `step`-th row; of each row, `columns` (first, step). `turned`: what was read
    are the part's columns. `plus` is added to the values.
    """

    shape: tuple[int, ...]
    stride: int = 0
    start: int = 0
    step: int = 1
    columns: tuple[int, int] = (0, 1)
    turned: bool = False
    plus: float = 0.0


@dataclass(frozen=True)
class Placement:
    """A parameter's source tensors, one a part, and the layout if it isn't plain. `stacked`: its first dimension
    counts the parts."""

    sources: tuple[str, ...]
    layout: Layout | None = None
    stacked: bool = False


class Placements:
    """Finds the placement of the parameters `shapes` of a model of a family.

    `present`: names in the checkpoint; empty if they aren't known, which takes it to be one as first published.
    """

    def __init__(self, arch: Architecture, shapes: Mapping[str, tuple[int, ...]], present: Collection[str]) -> None:
        self.shapes, self.present = shapes, present
        # A checkpoint in mlx_lm's own form has every name of the tree, and its values need no change.
        self.own = bool(present) and all(name in present for name in shapes)
        self._fused = [(re.compile(pattern(member)), member, f) for f in arch.fused for member in f.members]

    def of(self, name: str, tensor: Tensor, layer: int | None) -> Placement:
        """The placement of parameter `name`, which `tensor` describes."""
        shape = self.shapes[name]
        # A stack of matrices; any other third dimension belongs to a convolution.
        stacked = len(shape) == 3 and (tensor.role.startswith("expert.") or tensor.role == "attn.kv_b")
        if self.own:
            return _same(name, shape, stacked)
        known = [*self._in_fused(name, shape, stacked), *_renamed(tensor, layer, shape, stacked)]
        for placement in known:
            if any(source in self.present for source in placement.sources):
                return placement
        if known and name not in self.present:  # nothing is known, or it is missing where it should be
            return known[0]
        if len(shape) == 3 and not stacked:
            # PyTorch has a convolution's width last, which changes nothing but the shape: one channel a group.
            return Placement((name,), Layout((shape[0], shape[2], shape[1])))
        return _same(name, shape, stacked, tensor.plus)

    def _in_fused(self, name: str, shape: tuple[int, ...], stacked: bool) -> Iterator[Placement]:
        for matcher, member, fused in self._fused:
            if match := matcher.fullmatch(name):
                where = match.groupdict()
                yield self._part_of(fused, member, _fill(fused.source, where), where, shape, stacked)

    def _part_of(
        self, fused: Fused, member: str, source: str, where: Mapping[str, str], shape: tuple[int, ...], stacked: bool
    ) -> Placement:
        rows = []  # that each member has in one part of the source
        for other in fused.members:
            its = self.shapes[_fill(other, where)]
            rows.append(its[-1] if other in fused.turned or (fused.columns and len(its) < 3) else its[-2])
        at, total = fused.members.index(member), sum(rows)
        start, step = (at, len(rows)) if fused.alternate else (sum(rows[:at]), 1)
        parts = shape[0] if stacked else 1
        if fused.columns:
            if not stacked:  # a bias of each expert
                return Placement((source,), Layout((*shape[:-1], total), columns=(start, step)))
            layout = Layout((parts, shape[-1], total), shape[-1], columns=(start, step), turned=True)
            return Placement((source,) * parts, layout, True)
        turned = member in fused.turned
        width = shape[-2] if turned else shape[-1]
        full = (parts, total, width) if stacked and not fused.flat else (parts * total, width)
        return Placement((source,) * parts, Layout(full, total, start, step, turned=turned), stacked)


def _renamed(tensor: Tensor, layer: int | None, shape: tuple[int, ...], stacked: bool) -> Iterator[Placement]:
    for form in tensor.sources:
        experts = range(shape[0] if stacked else 1)
        yield Placement(tuple(_fill(form, {"layer": str(layer), "expert": str(e)}) for e in experts), None, stacked)


def _same(source: str, shape: tuple[int, ...], stacked: bool, plus: float = 0.0) -> Placement:
    if stacked:
        return Placement((source,) * shape[0], Layout(shape, stride=shape[1]), True)
    return Placement((source,), Layout(shape, plus=plus) if plus else None)


def _fill(name: str, where: Mapping[str, str]) -> str:
    for key, value in where.items():
        name = name.replace(f"{{{key}}}", value)
    return name


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
