"""What every layer with packed weights has: stored tensors, unset until a checkpoint fills them, and their check."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import RotorError
from ..kernels.weights import PackedWeight
from . import formats

UNSET = mx.bool_  # a tensor of this dtype was never loaded: no stored tensor has it, and casting a model leaves it


class PackedLayer(nn.Module):
    """Holds a matrix [N, K] or a stack of them [E, N, K] as a format's stored tensors, named as in the checkpoint.

    They start as arrays of the right shape and dtype `UNSET`, which is what a tensor missing from a checkpoint stays
    through evaluation, casts of the model and sharding; using the layer then is an error. Frozen, as MLX's are.

    Args:
        shape: of the weights, (N, K) or (E, N, K).
        bias: whether there is one, [N] or [E, N].
        name: the layer's path in its model, for errors.

    Raises:
        RotorError: a mode, bits or group size there is no format of, or rows that are no whole groups.
    """

    def __init__(
        self, shape: tuple[int, ...], mode: str, bits: int, group_size: int, bias: bool = False, name: str = ""
    ) -> None:
        super().__init__()
        self.mode, self.bits, self.group_size, self.name = mode, bits, group_size, name
        self.whole = shape[-1]  # columns before any sharding
        try:
            self.format = formats.get(mode, bits, group_size)
            tensors = self.format.tensors(shape[:-1], shape[-1])
        except RotorError as e:
            raise RotorError(f"{self.label}: {e}") from e
        for tensor in tensors:
            self[tensor.kind] = mx.zeros(tensor.shape, UNSET)
        if bias:
            self["bias"] = mx.zeros(shape[:-1], UNSET)
        self.freeze()

    def __setitem__(self, key: str, value: Any) -> None:
        """Every way of replacing a tensor ends here."""
        self.__dict__.pop("_packed", None)
        super().__setitem__(key, value)

    @property
    def label(self) -> str:
        return self.name or type(self).__name__

    @property
    def packed(self) -> PackedWeight:
        """The weights as kernels take them.

        Raises:
            RotorError: naming the tensor that was never loaded or does not fit the others.
        """
        packed: PackedWeight | None = self.__dict__.get("_packed")
        if packed is None:
            self.check()
            parts = tuple(self[name] for name in ("weight", *self.format.beside))
            packed = self.__dict__["_packed"] = PackedWeight(self.format, parts, self.columns, self.get("bias"))
        return packed

    @property
    def columns(self) -> int:
        """K, of the part that a sharded layer holds."""
        return int(self["weight"].shape[-1]) * 32 // self.bits

    def unset(self) -> list[str]:
        """Names of the tensors that were never loaded."""
        return [name for name, value in self.items() if isinstance(value, mx.array) and value.dtype == UNSET]

    def check(self) -> None:
        """Raises as `packed`."""
        if unset := self.unset():
            raise RotorError(
                f"{self.label}: the checkpoint has no {' and no '.join(unset)} for it, which {self.mode} weights need; "
                "download or quantize it again"
            )
        weight = self["weight"]
        if weight.dtype != mx.uint32:
            raise RotorError(f"{self.label}.weight is {weight.dtype}, not the uint32 codes of {self.mode} weights")
        if self.columns % self.group_size:
            raise RotorError(self.no_whole_groups(f"a part of {self.columns}"))
        for tensor in self.format.tensors(tuple(weight.shape[:-1]), self.columns)[1:]:
            found = self[tensor.kind]
            if tuple(found.shape) != tensor.shape or not mx.issubdtype(found.dtype, mx.floating):
                raise RotorError(
                    f"{self.label}.{tensor.kind} is {found.dtype} {list(found.shape)}; beside a weight "
                    f"{list(weight.shape)} of {self.bits} bits in groups of {self.group_size} it has to be "
                    f"{list(tensor.shape)}"
                )

    def no_whole_groups(self, part: str) -> str:
        """What is wrong where columns are split inside a group, and which splits there are."""
        groups = self.whole // self.group_size
        fitting = [str(n) for n in range(2, groups + 1) if groups % n == 0]
        allowed = f"columns can be split over {', '.join(fitting)} machines" if fitting else "columns can't be split"
        return (
            f"{self.label}: {part} of its {self.whole} columns is no whole number of {self.mode}'s groups of "
            f"{self.group_size}; {allowed}"
        )

    def _extra_repr(self) -> str:
        shape = (*self["weight"].shape[:-1], self.columns)
        parts = [f"shape={list(shape)}", f"bias={'bias' in self}", f"mode={self.mode}", f"bits={self.bits}"]
        return ", ".join([*parts, f"group_size={self.group_size}"])
