"""Every tensor of the output, with its spec, shape and bytes, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from .. import models
from ..errors import RotorError
from .policy import GROUP_SIZES, Policy, Spec
from .safetensors_io import ITEMSIZE

FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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
    """One weight of the model: for experts the stack of a layer's projection, read from one source an expert.

    `module`: its path in mlx_lm's module tree. `shape`: of the weight itself, experts first. `spec` None: kept.
    `outputs`: packed weight, scales, biases; or the one kept tensor. `fit`: the policy's own, empty where it leaves
    the choice to the job.
    """

    module: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    spec: Spec | None
    sources: tuple[str, ...]
    outputs: tuple[Output, ...]
    fit: str = ""

    @property
    def parts(self) -> int:
        """How many pieces it is read in: its experts, or one."""
        return len(self.sources)

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each of `sources`."""
        return self.shape[1:] if len(self.shape) == 3 else self.shape


@dataclass(frozen=True)
class Row:
    """Entries of one role with one spec: a line of the table people read. `layers`: as `0-1, 60-61`, or empty."""

    role: str
    layers: str
    count: int
    spec: Spec | None
    dtype: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """`entries` in file order, layer by layer."""

    policy: Policy
    layers: int
    entries: tuple[Entry, ...]

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
    """The plan for a checkpoint with this config.json under `policy`.

    `dtypes`: source tensor name -> safetensors dtype, from the headers where there are any. Without them kept
    tensors are taken to have the config's dtype (bf16 if it has none).

    Raises:
        RotorError: unsupported model, a role no rule covers, a group size that doesn't divide a dimension.
    """
    arch = models.lookup(config)
    dims = arch.dims(config)
    stated = str(config.get("torch_dtype") or config.get("dtype"))
    default = FLOATS.get(stated.removeprefix("torch."), "BF16")
    present = [t for t in arch.tensors if not t.when or dims[t.when]]
    first = next(i for i, t in enumerate(present) if t.layered)
    placed: list[tuple[models.Tensor, int | None]] = [(t, None) for t in present[:first]]
    placed += [(t, layer) for layer in range(dims["layers"]) for t in present if t.layered]
    placed += [(t, None) for t in present[first:] if not t.layered]
    entries = tuple(_entry(t, layer, dims, policy, dtypes or {}, default) for t, layer in placed)
    return Plan(policy, dims["layers"], entries)


def _entry(
    tensor: models.Tensor,
    layer: int | None,
    dims: Mapping[str, int],
    policy: Policy,
    dtypes: Mapping[str, str],
    default: str,
) -> Entry:
    name = tensor.name.format(layer=layer)
    module = name.removesuffix(".weight")
    shape = tuple(dims[d] for d in tensor.shape)
    pattern = tensor.source or tensor.name
    experts = range(shape[0] if tensor.stacked else 1)
    sources = tuple(pattern.format(layer=layer, expert=e) for e in experts)
    spec = policy.spec(tensor.role, layer, dims["layers"])
    if spec is None:
        # Only the router keeps its own dtype: it runs in float32, while any other float32 or float16 tensor would
        # promote bf16 activations.
        source = dtypes.get(sources[0], default)
        kept = source if tensor.role == "router" and source in FLOATS.values() else "BF16"
        outputs: tuple[Output, ...] = (Output(name, tensor.dtype or kept, shape),)
    else:
        if shape[-1] % spec.group_size:
            fits = [str(g) for g in GROUP_SIZES if shape[-1] % g == 0] or ["none of MLX's"]
            raise RotorError(
                f"policy {policy.name}: group_size {spec.group_size} does not divide the {shape[-1]} input"
                f" dimensions of {name}; would fit: {', '.join(fits)}"
            )
        packed, groups = shape[-1] * spec.bits // 32, shape[-1] // spec.group_size
        outputs = (
            Output(f"{module}.weight", "U32", (*shape[:-1], packed)),
            Output(f"{module}.scales", "BF16", (*shape[:-1], groups)),
            Output(f"{module}.biases", "BF16", (*shape[:-1], groups)),
        )
    return Entry(module, tensor.role, layer, shape, spec, sources, outputs)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 60, 61] -> '0-1, 60-61'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
