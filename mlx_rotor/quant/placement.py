"""Where a checkpoint keeps each parameter of the module tree: tensor names, and which rows of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

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
