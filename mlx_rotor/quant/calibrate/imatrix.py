"""A guide from llama.cpp's importance matrix: mean squares of inputs that `llama-imatrix` wrote for the same model.

GGUF form: float32 tensors `<name>.in_sum2` [matrices, K], sums of squared inputs, and `<name>.counts` [matrices, 1],
rows seen, where <name> is llama.cpp's of the weight: `blk.3.ffn_down_exps.weight`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RotorError
from ..guide import Statistics, Weights
from ..plan import Entry, Plan

# Role -> what llama.cpp calls such weights. Others that take the same input come after the role's own.
NAMES: dict[str, tuple[str, ...]] = {
    "head": ("output",),
    "attn.q": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "attn.k": ("attn_k", "attn_q", "attn_v", "attn_qkv"),
    "attn.v": ("attn_v", "attn_q", "attn_k", "attn_qkv"),
    "attn.qkv": ("attn_qkv", "attn_q"),
    "attn.gate": ("attn_gate", "attn_q"),
    "attn.o": ("attn_output",),
    "attn.q_a": ("attn_q_a", "attn_kv_a_mqa"),
    "attn.q_b": ("attn_q_b",),
    "attn.kv_a": ("attn_kv_a_mqa", "attn_q_a"),
    "mlp.gate": ("ffn_gate", "ffn_up"),
    "mlp.up": ("ffn_up", "ffn_gate"),
    "mlp.gate_up": ("ffn_up", "ffn_gate"),
    "mlp.down": ("ffn_down",),
    "router": ("ffn_gate_inp",),
    "shared.gate": ("ffn_gate_shexp", "ffn_up_shexp"),
    "shared.up": ("ffn_up_shexp", "ffn_gate_shexp"),
    "shared.down": ("ffn_down_shexp",),
    "expert.gate": ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    "expert.up": ("ffn_up_exps", "ffn_gate_exps", "ffn_gate_up_exps"),
    "expert.down": ("ffn_down_exps",),
}
# Whose experts' inputs have a basis of their own each: no other expert's stand in for them.
PRIVATE = {"expert.down"}
SUMS, COUNTS = ".in_sum2", ".counts"


class Imatrix:
    """A guide, see `quant.guide`, and the statistics it hands out: importance only.

    Attributes:
        missing: modules with bits in the plan of whose inputs the file says nothing.
    """

    disk = 0

    def __init__(self, path: str | Path, plan: Plan, weights: Weights) -> None:
        """
        Raises:
            RotorError: no imatrix file in GGUF form, or one of a model of other dimensions.
        """
        self._path, self._weights = Path(path), weights
        self._sums, self._counts = _read(self._path)
        self._names: dict[str, str] = {}
        for entry in plan.entries:
            name = next((n for n in self._candidates(entry) if n in self._sums), None)
            if name is not None:
                self._check(entry, name)
                self._names[entry.module] = name
        if not self._names:
            some = ", ".join(sorted(self._sums)[:3])
            raise RotorError(f"{path}: no weight of this model is in it; it has {some}")
        with_bits = (entry for entry in plan.entries if entry.spec is not None and entry.role != "embed")
        self.missing = tuple(entry.module for entry in with_bits if entry.module not in self._names)

    @cached_property
    def digest(self) -> str:
        """sha256 of the file."""
        with open(self._path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        return self._weights, self

    def describe(self) -> dict[str, Any]:
        """For the output's metadata."""
        return {"imatrix": self._path.name, "digest": self.digest, "weights_without": len(self.missing)}

    def files(self) -> dict[str, str]:
        return {}

    def importance(self, entry: Entry, part: int = 0) -> mx.array | None:
        """[K]. An expert without rows gets the layer's mean, or None where its inputs are its own."""
        name = self._names.get(entry.module)
        if name is None:
            return None
        sums, counts = self._sums[name], self._counts[name]
        row = part if len(sums) > 1 else 0
        if counts[row]:
            return sums[row] / float(counts[row])
        if entry.role in PRIVATE:
            return None
        total = float(counts.sum())
        return mx.sum(sums, axis=0) / total if total else None

    def hessian(self, entry: Entry, part: int = 0) -> mx.array | None:
        """None: the file has no products."""
        return None

    def inputs(self, entry: Entry) -> str:
        return entry.module

    def _candidates(self, entry: Entry) -> list[str]:
        where = "" if entry.layer is None else f"blk.{entry.layer}."
        return [f"{where}{name}.weight" for name in NAMES.get(entry.role, ())]

    def _check(self, entry: Entry, name: str) -> None:
        parts, inputs = self._sums[name].shape
        if inputs != entry.source_shape[-1] or parts not in (1, entry.parts):
            raise RotorError(
                f"{self._path}: {name} has {parts} x {inputs} inputs, {entry.module} takes {entry.parts} x"
                f" {entry.source_shape[-1]}: it was made for another model"
            )


def _read(path: Path) -> tuple[Mapping[str, mx.array], Mapping[str, np.ndarray]]:
    """(sums [matrices, K], counts [matrices]) by name of the weight."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise RotorError(
                f"{path}: not a GGUF file; an imatrix of the older form becomes one with llama.cpp's"
                " `llama-imatrix --in-file OLD -o NEW.gguf`"
            )
        tensors = mx.load(str(path), format="gguf")
    except (OSError, RuntimeError, ValueError) as e:
        raise RotorError(f"{path}: not readable as an imatrix: {e}") from e
    assert isinstance(tensors, dict)
    sums: dict[str, mx.array] = {}
    counts: dict[str, np.ndarray] = {}
    for key, values in tensors.items():
        if not key.endswith(SUMS):
            continue
        name = key.removesuffix(SUMS)
        rows = tensors.get(name + COUNTS)
        sums[name] = values.astype(mx.float32).reshape(-1, values.shape[-1])
        if rows is None or rows.size != len(sums[name]):
            raise RotorError(f"{path}: {name} has no counts, or not one for each of its {len(sums[name])} matrices")
        counts[name] = np.array(rows.astype(mx.float32)).reshape(-1)
        for found in (sums[name], mx.array(counts[name])):
            if not mx.all(mx.isfinite(found) & (found >= 0)).item():
                raise RotorError(f"{path}: {name} holds negative values or values that are not finite; it is damaged")
    if not sums:
        raise RotorError(f"{path}: a GGUF file, but no imatrix: no tensor is called *{SUMS}")
    return sums, counts
