"""The Metal text that `mx.fast.metal_kernel` generates around a kernel's body, byte for byte.

What MLX passes depends on the body: thread indices and shapes appear as parameters where the body names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .entry import INDICES

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}
SMALL = 8  # inputs of fewer elements are passed in constant memory
SHAPE = (("_shape", "int*"), ("_strides", "int64_t*"), ("_ndim", "int&"))
Template = Sequence[tuple[str, bool | int | mx.Dtype]]


@dataclass(frozen=True)
class Generated:
    """The kernel's name, its text, and how many lines stand before the body's first."""

    name: str
    text: str
    lines_before: int


def template_argument(value: bool | int | mx.Dtype) -> str:
    return str(int(value)) if isinstance(value, bool | int) else TYPES[value]


def generate(
    name: str,
    source: str,
    header: str,
    inputs: Sequence[tuple[str, mx.array]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Template = (),
    atomic_outputs: bool = False,
) -> Generated:
    """The text MLX compiles for a body `source` with `header` before it; arrays count by dtype, rank and size."""
    kernel = f"custom_kernel_{name}"
    if template:
        kernel += "__" + "_".join(template_argument(value) for _, value in template).replace("-", "_")
    for _, a in inputs:
        kernel += "_" + TYPES[a.dtype] + ("s" if a.ndim == 0 else "c" if a.size < SMALL else "")
    kernel += "".join("_" + TYPES[dtype] for _, dtype in outputs)

    declared: list[str] = []
    for n, a in inputs:
        space, mark = "constant" if a.size < SMALL else "device", "&" if a.ndim == 0 else "*"
        declared.append(f"const {space} {TYPES[a.dtype]}{mark} {n}")
        if a.ndim:
            declared += [f"const constant {kind} {n}{end}" for end, kind in SHAPE if n + end in source]
    for n, dtype in outputs:
        declared.append(f"device {f'atomic<{TYPES[dtype]}>' if atomic_outputs else TYPES[dtype]}* {n}")
    lines = [f"  {what} [[buffer({i})]]" for i, what in enumerate(declared)]
    for index in sorted(INDICES):
        if index in source:
            lines.append(f"  {'uint3' if INDICES[index] == 3 else 'uint'} {index} [[{index}]]")

    head = header
    if template:
        kinds = [
            f"{'bool' if isinstance(v, bool) else 'int' if isinstance(v, int) else 'typename'} {n}" for n, v in template
        ]
        head += f"template <{', '.join(kinds)}>\n"
    head += f"[[kernel]] void {kernel}(\n" + ",\n".join(lines) + ") {\n"
    return Generated(kernel, f"{head}{source}\n}}\n", head.count("\n"))
