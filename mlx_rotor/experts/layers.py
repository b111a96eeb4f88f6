"""Layers that hold weights in formats MLX does not have, in the place of mlx's and mlx_lm's own.

Their tensors are unset until a checkpoint fills them. Expert layers of mlx_lm are known by the arguments they are
called with, not by class.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import RotorError
from ..kernels import experts
from ..kernels.spec import PackedWeight
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


SWITCH, MULTI = ("x", "indices", "sorted_indices"), ("x", "transpose")  # how mlx_lm calls its layers of matrices


class RotorLinear(PackedLayer):
    """x [.., K] times a packed matrix [N, K] transposed, plus a bias: [.., N] in x's dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        return experts.matmul(x, self.packed)


class RotorEmbedding(PackedLayer):
    """Rows of a packed matrix [V, K]."""

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens x [..] -> [.., K] in `dtype`. Only the rows asked for are expanded."""
        packed = self.packed
        rows = packed.format.decode([part[x] for part in packed.parts], packed.columns)
        return rows.astype(self.dtype)

    @property
    def dtype(self) -> mx.Dtype:
        """Of what it gives, and so of a model's activations: that of the norms after `follow`. Alone it is that of
        the arrays beside the codes, for float16 bfloat16, which has the range that activations need."""
        norm: nn.Module | None = self.__dict__.get("_norm")
        stored = self.packed.parts[1].dtype if norm is None else norm["weight"].dtype
        return mx.bfloat16 if norm is None and stored == mx.float16 else stored

    def follow(self, model: nn.Module) -> None:
        """Takes its dtype from here on from `model`'s first norm of its width."""
        norms = [m for _, m in reversed(model.named_modules()) if _shape(m) == (self.columns,)]
        if norms:
            self.__dict__["_norm"] = norms[0]  # beside the parameters: it is no part of this layer

    def as_linear(self, x: mx.array) -> mx.array:
        """x [.., K] -> [.., V], for heads tied to the embedding."""
        return experts.matmul(x, self.packed)


class RotorSwitchLinear(PackedLayer):
    """A packed matrix for each expert, [E, N, K]; called and described as mlx_lm's SwitchLinear."""

    @property
    def input_dims(self) -> int:
        return self.columns

    @property
    def output_dims(self) -> int:
        return int(self["weight"].shape[1])

    @property
    def num_experts(self) -> int:
        return int(self["weight"].shape[0])

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [.., M, K] with `indices` [..], whose leading axes broadcast: [.., M, N] in x's dtype.

        `sorted_indices` promises that the indices ascend.
        """
        lead = tuple(mx.broadcast_shapes(x.shape[:-2], indices.shape))
        shape = (*lead, *x.shape[-2:])
        each = math.prod(shape[max(len(lead) - 1, 1) : -1])  # rows of a token: its experts, and the rows of one
        few = not sorted_indices and 0 < math.prod(shape[:-1]) <= each * experts.MAX_ROWS
        if not few and not sorted_indices and x.shape[:-1] == (*indices.shape[:-1], 1, 1):
            # One row a token, for all its experts: it need not be repeated.
            out = experts.gather_unsorted(x.reshape(-1, shape[-1]), self.packed, indices.reshape(-1, lead[-1]))
            return out.reshape(*shape[:-1], -1)
        rows = mx.broadcast_to(x, shape).reshape(-1, shape[-1])
        chosen = mx.broadcast_to(indices[..., None], shape[:-1]).flatten().astype(mx.uint32)
        if few:
            out = experts.down(rows.reshape(-1, each, shape[-1]), self.packed, chosen.reshape(-1, each))
        elif sorted_indices:
            out = experts.gather(rows, self.packed, chosen)
        else:
            out = experts.gather_unsorted(rows, self.packed, chosen[:, None])
        return out.reshape(*shape[:-1], -1)


class RotorMultiLinear(PackedLayer):
    """A packed matrix for each head, [H, N, K]; called as the MultiLinear of mlx_lm's latent attention."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """x [.., H or 1, L, K] -> [.., H, L, N], or, not transposed, [.., L, N] -> [.., L, K]. Expands all heads."""
        weight = self.packed.decoded().astype(x.dtype)
        return x @ (weight.swapaxes(-1, -2) if transpose else weight)


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight = module.get("weight")
    return () if weight is None else tuple(weight.shape)


def of(module: nn.Module, mode: str, bits: int, group_size: int, name: str = "") -> PackedLayer:
    """The layer of a format that takes `module`'s place, with its tensors still unset.

    Args:
        module: an unquantized nn.Linear, nn.Embedding, or one of mlx_lm's SwitchLinear or MultiLinear.
        name: its path in the model, for errors.

    Raises:
        RotorError: a kind of module that has no packed form, or as `PackedLayer`.
    """
    kind = _kind(module)
    if kind is None:
        where = f"{name}: " if name else ""
        raise RotorError(f"{where}{type(module).__name__} has no form with {mode} weights; use a mode of MLX for it")
    return kind(tuple(module["weight"].shape), mode, bits, group_size, "bias" in module, name)


def _kind(module: nn.Module) -> type[PackedLayer] | None:
    weight = module.get("weight")
    if isinstance(module, PackedLayer) or weight is None or not mx.issubdtype(weight.dtype, mx.floating):
        return None
    if type(module).__call__ is nn.Linear.__call__:
        return RotorLinear
    if type(module).__call__ is nn.Embedding.__call__:
        return RotorEmbedding
    called = tuple(inspect.signature(type(module).__call__).parameters)[1:] if weight.ndim == 3 else ()
    return {SWITCH: RotorSwitchLinear, MULTI: RotorMultiLinear}.get(called)  # type: ignore[return-value]


def packed_of(module: nn.Module) -> PackedWeight | None:
    """The weights of one of these layers, or of one of MLX's in mode affine; None for any other module.

    None too where the module does more than multiply: one that sums over machines.

    Raises:
        RotorError: a tensor of the layer was never loaded, see `PackedLayer.packed`.
    """
    if isinstance(module, nn.QuantizedShardedToAllLinear) or getattr(module, "group", None) is not None:
        return None
    if isinstance(module, PackedLayer):
        return module.packed
    names = ("weight", "scales", "biases")
    if getattr(module, "mode", None) != formats.MLX or any(module.get(name) is None for name in names):
        return None
    bits, group_size = formats.known(formats.MLX)
    if module.bits not in bits or module.group_size not in group_size:
        return None
    parts = tuple(module[name] for name in names)
    columns = int(parts[1].shape[-1]) * module.group_size
    return PackedWeight(formats.get(formats.MLX, module.bits, module.group_size), parts, columns, module.get("bias"))


def check(model: nn.Module) -> None:
    """Raises RotorError, naming every one of these layers in `model` with a tensor that was never loaded."""
    found = [(name, m) for name, m in reversed(model.named_modules()) if isinstance(m, PackedLayer)]
    missing = [f"{name}.{tensor}" for name, module in found for tensor in module.unset()]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise RotorError(f"the checkpoint lacks {shown}; download or quantize it again")
    for _, module in found:
        module.check()
