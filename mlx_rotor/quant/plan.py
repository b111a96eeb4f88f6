"""The plan: every tensor of the output with its spec, shape and bytes, before a weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from ..errors import RotorError
from ..experts.formats.base import DTYPE_NAMES
from .inventory import Layout, inventory, listed
from .policy import BITS, GROUP_SIZES, OURS, Policy, Spec
from .safetensors_io import ITEMSIZE
from .selectors import kept_unasked


@dataclass(frozen=True)
class Output:
    """One tensor of an output file: safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Entry:
    """One weight of the model. The experts of a layer are one entry a projection, read expert by expert.

    Attributes:
        module: path in mlx_lm's module tree.
        role: what the weight is for, a name of `selectors.ROLES`.
        layer: None for embeddings, head and the like.
        shape: of the weight itself, experts first.
        spec: how it is stored; None keeps the source's precision.
        sources: the checkpoint's tensors, one a part; parts that share a tensor repeat its name.
        outputs: the packed weight and what its mode has beside it, or the one tensor that is kept.
        fit: the policy's own; empty where the job decides.
        name: of the parameter; empty where it is the module's weight.
        kept: safetensors dtype of the unquantized weight.
        layout: how the parts lie in the sources; None where each is a whole tensor.
        stacked: whether the first dimension of `shape` counts the parts.
    """

    module: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    spec: Spec | None
    sources: tuple[str, ...]
    outputs: tuple[Output, ...]
    fit: str = ""
    name: str = ""
    kept: str = "BF16"
    layout: Layout | None = None
    stacked: bool = False

    @property
    def parts(self) -> int:
        """How many pieces it is read in: its experts, or one."""
        return len(self.sources)

    def source(self, part: int) -> str:
        """What to call a part in an error: its tensor in the source, and the expert where experts share that."""
        return f"{self.sources[part]}, expert {part}" if len(set(self.sources)) < self.parts else self.sources[part]

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each part as it is read: [rows, K], or [n] of a vector."""
        return self.shape[1:] if self.stacked or self.parts > 1 else self.shape

    def stored(self, spec: Spec | None) -> Entry:
        """This entry under another spec (None: kept), its outputs as MLX names and shapes them."""
        outputs: tuple[Output, ...]
        if spec is None:
            outputs = (Output(self.name or f"{self.module}.weight", self.kept, self.shape),)
        elif spec.format is not None:
            tensors = spec.format.tensors(self.shape[:-1], self.shape[-1])
            outputs = tuple(Output(f"{self.module}.{t.kind}", DTYPE_NAMES[t.dtype], t.shape) for t in tensors)
        else:
            lead, columns = self.shape[:-1], self.shape[-1]
            groups = (*lead, columns // spec.group_size)
            dtype, kinds = ("BF16", ("scales", "biases")) if spec.mode == "affine" else ("U8", ("scales",))
            packed = Output(f"{self.module}.weight", "U32", (*lead, columns * spec.bits // 32))
            outputs = (packed, *(Output(f"{self.module}.{kind}", dtype, groups) for kind in kinds))
        return replace(self, spec=spec, outputs=outputs)


@dataclass(frozen=True)
class Row:
    """Entries of one role with one spec: a line of the table that is printed. `layers`: as `0-1, 60-61`, or empty."""

    role: str
    layers: str
    count: int
    spec: Spec | None
    dtype: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Solved:
    """The size that a plan's bits were solved for, and by which sensitivities.

    Attributes:
        nbytes: of all weight files, headers included.
        sensitivities: where they are from; sha256: of their content.
    """

    nbytes: int
    sensitivities: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """Every weight of the output, before anything runs.

    Attributes:
        policy: whose rules it follows.
        layers: of the model.
        entries: in file order, layer by layer.
        drop: regular expressions of source tensors that nothing reads.
        extra: how many layers after the last may be among those.
        packable: modules that mlx_lm has a quantized form of; packable_ours: those that our own formats have one of.
        solved: None where the bits follow from the policy's rules alone.
    """

    policy: Policy
    layers: int
    entries: tuple[Entry, ...]
    drop: tuple[str, ...] = ()
    extra: int = 0
    packable: frozenset[str] = frozenset()
    packable_ours: frozenset[str] = frozenset()
    solved: Solved | None = None

    def drops(self, name: str) -> bool:
        """Whether a source tensor is known to be of no use: what mlx_lm leaves out, layers that predict ahead."""
        for pattern in self.drop:
            if match := re.fullmatch(pattern, name):
                beyond = match.groupdict().get("beyond")
                if beyond is None or 0 <= int(beyond) - self.layers < self.extra:
                    return True
        return False

    def with_specs(self, specs: Mapping[str, Spec | None]) -> Plan:
        """This plan with other specs (None: kept) for some modules; `fit` and everything else as the policy says.

        Raises:
            RotorError: an unknown module, or a spec that it can't have: see `check`.
        """
        unknown = sorted(specs.keys() - {entry.module for entry in self.entries})
        if unknown:
            raise RotorError(f"the model has no {listed(unknown)}")
        entries = []
        for entry in self.entries:
            spec = specs.get(entry.module, entry.spec)
            if spec != entry.spec:
                self.check(entry, spec)
                entry = entry.stored(spec)
            entries.append(entry)
        return replace(self, entries=tuple(entries))

    def options(self, entry: Entry) -> tuple[Spec, ...]:
        """The affine specs an entry may have, fewest bytes first: bits not below the policy's floor for its role,
        group sizes that divide its rows. None for what is never quantized, and for what the policy keeps."""
        if entry.spec is None:
            return ()
        floor, columns = self.policy.floors.get(entry.role, 0), entry.shape[-1]
        found = [Spec(b, g) for b in BITS if b >= floor for g in GROUP_SIZES if columns % g == 0]
        return tuple(sorted(found, key=lambda spec: (spec.bits + 32 / spec.group_size, spec.bits)))

    def check(self, entry: Entry, spec: Spec | None) -> None:
        """RotorError if an entry can't have a spec: a role that is kept, no quantized form in mlx_lm, a group size
        that doesn't divide, bits below the policy's floor. None, its source's precision, is always possible."""
        if spec is None:
            return
        where, floor = f"policy {self.policy.name}: {entry.module}", self.policy.floors.get(entry.role, 0)
        if entry.spec is None and kept_unasked(entry.role):
            raise RotorError(f"{where}: role {entry.role!r} is not quantized")
        if entry.module not in self.packable:
            raise RotorError(f"{where}: mlx_lm has no quantized form of it")
        if spec.mode in OURS and entry.module not in self.packable_ours:
            raise RotorError(f"{where}: there is no layer for it in mode {spec.mode}")
        if not spec.divides(entry.shape[-1]):
            raise RotorError(f"{where}: group_size {spec.group_size} does not divide its {entry.shape[-1]} columns")
        if spec.bits < floor:
            raise RotorError(f"{where}: {spec.bits} bits are below the policy's floor of {floor} for {entry.role}")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all output tensors, file headers not counted."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def parameters(self) -> int:
        return sum(entry.parameters for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.parameters

    @property
    def notes(self) -> list[str]:
        """What a reader of the errors of its formats must know (`Format.note`); mostly nothing."""
        found = (e.spec.format.note for e in self.entries if e.spec is not None and e.spec.format is not None)
        return sorted({note for note in found if note})

    def total(self) -> str:
        """`92.871 GB = 86.49 GiB, 3.2488 bits a weight`."""
        return amount(self.nbytes, self.parameters)

    def rows(self) -> list[Row]:
        """The entries grouped by role and spec; roles and, within one, specs in order of first appearance."""
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.role, entry.spec, entry.outputs[0].dtype), []).append(entry)
        roles = list(dict.fromkeys(role for role, _, _ in groups))
        return [
            Row(
                role,
                _ranges(sorted({e.layer for e in group if e.layer is not None})),
                len(group),
                spec,
                dtype,
                sum(e.parameters for e in group),
                sum(e.nbytes for e in group),
            )
            for (role, spec, dtype), group in sorted(groups.items(), key=lambda item: roles.index(item[0][0]))
        ]


def amount(nbytes: int, parameters: int) -> str:
    """Bytes in decimal and binary units and per weight: GB are 1e9 bytes, GiB 2**30; MB and MiB below one GB."""
    binary = f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1e9 else f"{nbytes / 2**20:.2f} MiB"
    return f"{decimal(nbytes)} = {binary}, {nbytes * 8 / parameters:.4f} bits a weight"


def decimal(nbytes: int) -> str:
    """`92.871 GB`, or MB below one GB."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3f} MB"


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder; RotorError where there is none or it isn't a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise RotorError(f"{folder} has no config.json: not a checkpoint folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RotorError(f"{path}: not readable as JSON: {e}") from e
    if not isinstance(config, dict):
        raise RotorError(f"{path}: expected a JSON object")
    return config


def make_plan(config: Mapping[str, Any], policy: Policy, dtypes: Mapping[str, str] | None = None) -> Plan:
    """The plan for a checkpoint with this config.json under the rules of `policy`; a budget of it is not solved for
    here, but by `budget.planned`.

    `dtypes`: source tensor name -> safetensors dtype, from the headers where there are any. Without them kept
    tensors are taken to have the config's dtype (bf16 if it has none).

    Raises:
        RotorError: a model without names here, parameters or roles that nothing covers, a group size that doesn't
            divide a dimension.
    """
    known = inventory(config, dtypes or {})
    entries = []
    uncovered: dict[str, list[str]] = {}
    for p in known.parameters:
        rule = policy.rule(p.role, p.module, p.layer, known.layers)
        if rule is None and not kept_unasked(p.role):
            uncovered.setdefault(p.role, []).append(p.module)
            continue
        spec, fit = None, ""
        if rule is not None and rule.specs and (p.packable or not rule.where_possible):
            try:
                if not p.packable:
                    raise RotorError("mlx_lm has no quantized form of it: give it a rule with keep = true")
                if rule.specs[0].mode in OURS and not p.packable_ours:
                    raise RotorError(f"there is no layer for it in mode {rule.specs[0].mode}: give it one of MLX's")
                spec, fit = policy.spec(rule, p.role, p.shape[-1]), rule.fit
            except RotorError as e:
                number = policy.rules.index(rule) + 1
                raise RotorError(f"policy {policy.name}, rule {number}: {p.name}: {e}") from None
        at = p.placement
        entry = Entry(
            p.module, p.role, p.layer, p.shape, None, at.sources, (), fit, p.name, p.kept, at.layout, at.stacked
        )
        entries.append(entry.stored(spec))
    if uncovered:
        named = "; ".join(f"role {role!r} ({listed(modules)})" for role, modules in uncovered.items())
        raise RotorError(f"policy {policy.name}: no rule covers {named}; add one (`keep = true` leaves it)")
    packable = frozenset(p.module for p in known.parameters if p.packable)
    ours = frozenset(p.module for p in known.parameters if p.packable_ours)
    return Plan(policy, known.layers, tuple(entries), known.drop, known.extra, packable, ours)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 60, 61] -> '0-1, 60-61'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
