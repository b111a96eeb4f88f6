"""Bits by budget: of all specs that the policy's floors allow, those of the least summed cost whose files fit a size.

What a weight costs is of `sensitivity`, what it takes is of the plan. No weight is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import RotorError
from ..plan import Entry, Plan, Solved, decimal
from ..policy import Spec
from ..shards import file_bytes
from .knapsack import Infeasible, Option, choose
from .sensitivity import Sensitivities


class TooSmall(RotorError):
    """A target below the smallest possible size, which is `least` bytes."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Choice:
    """An entry that the budget decides on, and the specs it may have."""

    entry: Entry
    specs: tuple[Spec, ...]


def worth(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """Those of the affine specs that a budget chooses from: for each number of bits the widest group, and from 3 bits
    on one of 64 beside one of 128. Narrower groups buy less than the same bytes do as bits: on Gaussian weights 2 bits
    in groups of 32 take nearly what 3 bits in groups of 128 do, and err almost three times as much."""
    out: list[Spec] = []
    for bits in sorted({s.bits for s in specs}):
        sizes = sorted((s.group_size for s in specs if s.bits == bits), reverse=True)
        out += [Spec(bits, size) for size in sizes[:1]]
        out += [Spec(bits, size) for size in sizes[1:] if bits > 2 and size == 64]
    return tuple(out)


def solve(plan: Plan, target: int, sensitivities: Sensitivities, *, shard_bytes: int) -> Plan:
    """The plan with the specs of the least summed cost whose weight files take `target` bytes or less.

    Decides on every quantized affine entry; others stay as the policy has them. Of equal stacks the ones nearest either
    end of the model get the larger share.

    Raises:
        TooSmall: the target is below the smallest possible size.
        RotorError: sensitivities of another model, or nothing to decide on.
    """
    sensitivities.check(plan)
    choices = [Choice(e, specs) for e in plan.entries if (specs := worth(_affine(plan, e)))]
    if not choices:
        raise RotorError(
            f"policy {plan.policy.name}: a budget decides on weights in mode affine, of which it has none; use another"
            " policy, such as rotor"
        )
    groups = [
        [Option(c.entry.stored(spec).nbytes, sensitivities.cost(c.entry.module, spec)) for spec in c.specs]
        for c in choices
    ]
    smallest = plan.with_specs({c.entry.module: c.specs[_least(g)] for c, g in zip(choices, groups, strict=True)})
    least = file_bytes(smallest, shard_bytes)
    if least > target:
        raise TooSmall(_too_small(smallest, target, least), least)
    basis = Solved(target, sensitivities.source, sensitivities.digest)
    fixed = plan.nbytes - sum(c.entry.nbytes for c in choices) + least - smallest.nbytes
    while True:
        try:
            taken = choose(groups, target - fixed)
        except Infeasible:
            return replace(smallest, solved=basis)
        taken = _ends_first(choices, groups, taken, plan.layers)
        solved = plan.with_specs({c.entry.module: c.specs[i] for c, i in zip(choices, taken, strict=True)})
        excess = file_bytes(solved, shard_bytes) - target
        if excess <= 0:
            return replace(solved, solved=basis)
        fixed += excess  # a header's length depends on how many digits its offsets have


def _affine(plan: Plan, entry: Entry) -> list[Spec]:
    if entry.spec is None or entry.spec.mode != "affine":
        return []
    return [spec for spec in plan.options(entry) if spec.mode == "affine"]


def _least(group: Sequence[Option]) -> int:
    return min(range(len(group)), key=lambda i: group[i].size)


def _ends_first(
    choices: Sequence[Choice], groups: Sequence[Sequence[Option]], taken: Sequence[int], layers: int
) -> list[int]:
    """The same choices dealt out anew among entries that the costs can't tell apart, larger ones to the ends first:
    every published ablation finds the first and last layers the most sensitive, or no different."""
    alike: dict[tuple[Option, ...], list[int]] = defaultdict(list)
    for n, group in enumerate(groups):
        alike[tuple(group)].append(n)
    out = list(taken)
    for group, members in alike.items():
        dealt = sorted((taken[n] for n in members), key=lambda i: -group[i].size)
        order = sorted(members, key=lambda n: _depth(choices[n].entry, layers))
        for n, i in zip(order, dealt, strict=True):
            out[n] = i
    return out


def _depth(entry: Entry, layers: int) -> int:
    """Layers between the entry and the nearer end of the model."""
    return -1 if entry.layer is None else min(entry.layer, layers - 1 - entry.layer)


def _too_small(smallest: Plan, target: int, nbytes: int) -> str:
    """What a target too small to be met is told: the least size, and what takes it."""
    held = smallest.policy.floors
    rows = sorted(smallest.rows(), key=lambda row: -row.nbytes)
    parts = []
    for row in rows[:5]:
        if row.spec is None:
            how = f"kept {row.dtype.lower()}"
        else:
            how = f"{row.spec.bits} bits g{row.spec.group_size}"
            how += f", floor {held[row.role]}" if held.get(row.role) == row.spec.bits else ""
        parts.append(f"{row.role} {decimal(row.nbytes)} ({how})")
    return (
        f"{decimal(target)} is too small: policy {smallest.policy.name} needs {decimal(nbytes)} ({nbytes:,} bytes) at"
        f" the least; most of it is {'; '.join(parts)}. Give more bytes, or lower the policy's floors"
    )
