"""Metal kernels on the CPU: `Kernel` takes what `mx.fast.metal_kernel` takes, `run_file` any kernel of a Metal file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import build
from .dispatch import Buffer, KernelError, Options, Size, dispatch
from .entry import entry_point
from .lint import lint
from .report import Report
from .rewrite import Constants, rewrite
from .signature import SHAPE, Template, generate, template_argument
from .tools import CompileError

BITS = {mx.bfloat16: mx.uint16}  # dtypes that NumPy has not, as one of the same size


@dataclass(frozen=True)
class Result:
    """Outputs in the order of their names, and what happened on the way to them."""

    outputs: list[mx.array]
    report: Report


@dataclass(frozen=True)
class Kernel:
    """A body and the names it uses, as `mx.fast.metal_kernel` takes them."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def __call__(
        self,
        inputs: Sequence[mx.array | bool | int | float],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template = (),
        init_value: float | None = None,
        options: Options | None = None,
    ) -> list[mx.array]:
        """The outputs. Raises CompileError, and KernelError for any error found while it runs."""
        result = self.run(inputs, output_shapes, output_dtypes, grid, threadgroup, template, init_value, options)
        if result.report.errors:
            raise KernelError("\n".join(result.report.errors))
        return result.outputs

    def run(
        self,
        inputs: Sequence[mx.array | bool | int | float],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template = (),
        init_value: float | None = None,
        options: Options | None = None,
    ) -> Result:
        """The outputs and a report, which holds the errors. Raises CompileError; KernelError if it does not end."""
        options = options or Options()
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        named = list(zip(self.input_names, arrays, strict=True))
        outputs = list(zip(self.output_names, output_dtypes, strict=True))
        made = generate(self.name, self.source, self.header, named, outputs, template, self.atomic_outputs)

        def label(line: int) -> str:
            inside = line - made.lines_before
            return f"source:{inside}" if inside > 0 else f"header:{line}"

        text = rewrite(made.text)
        written = len("\n".join(text.split("\n")[: self.header.count("\n")]))
        text += "\n" + entry_point(made.text, made.name, [template_argument(value) for _, value in template])
        if options.lint and (wrong := lint(text, made.text.count("\n") + 1, written)):
            raise CompileError("\n".join(f"{label(line)}: {message}" for line, message in wrong))

        buffers = [b for name, a in named for b in self._input(name, a)]
        for (name, dtype), shape in zip(outputs, output_shapes, strict=True):
            filled = mx.full(tuple(shape), 0 if init_value is None else init_value, dtype)
            buffers.append(Buffer(name, bits(filled), writable=True, written=init_value is not None))
        arrays_out, report = dispatch(build.library(text, options.mode), buffers, grid, threadgroup, options, label)
        return Result([from_bits(a, dtype) for a, dtype in zip(arrays_out, output_dtypes, strict=True)], report)

    def _input(self, name: str, a: mx.array) -> list[Buffer]:
        """The buffer of an input, and those of its shape, strides and rank where the body names them."""
        values = bits(a)
        memory = np.ascontiguousarray(values) if self.ensure_row_contiguous else _memory(values)
        values = memory if self.ensure_row_contiguous and a.ndim else values
        buffers = [Buffer(name, memory)]
        if a.ndim:
            strides = np.array([s // values.itemsize for s in values.strides], np.int64)
            about = (np.array(values.shape, np.int32), strides, np.array(values.ndim, np.int32))
            extra = zip(SHAPE, about, strict=True)
            buffers += [Buffer(name + end, what) for (end, _), what in extra if name + end in self.source]
        return buffers


def run_file(
    text: str,
    kernel: str,
    template_arguments: list[str],
    buffers: Sequence[Buffer | None],
    grid: Size,
    threadgroup: Size,
    constants: Constants | None = None,
    before: str = "",
    options: Options | None = None,
) -> tuple[list[np.ndarray], Report]:
    """Runs `kernel` of a Metal file `text`, MLX's own for one, with `buffers` in the order of [[buffer(n)]].

    None stands for a buffer the kernel does not touch; `constants` are function constants; `before` is clang's text
    to put first. Returns the writable buffers and the report. Raises CompileError, and KernelError if it does not end.
    """
    options = options or Options()
    full = f"{before}{rewrite(text, constants, lenient=True)}\n{entry_point(text, kernel, template_arguments)}"
    unused = np.zeros(1, np.uint8)
    given = [b or Buffer(f"unused {i}", unused) for i, b in enumerate(buffers)]
    first = before.count("\n")
    library = build.library(full, options.mode)
    return dispatch(library, given, grid, threadgroup, options, lambda line: f"{kernel}:{line - first}")


def mlx_source(name: str) -> str:
    """Text of one of the Metal headers in the MLX wheel."""
    return Path(build.mlx_kernels() / name).read_text()


def bits(a: mx.array) -> np.ndarray:
    """The array's values, or their bits as integers where NumPy lacks the dtype; strides as they are."""
    return np.array(a.view(BITS[a.dtype]) if a.dtype in BITS else a, copy=None)


def from_bits(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The inverse of `bits`."""
    return mx.array(a).view(dtype) if dtype in BITS else mx.array(a)


def _memory(values: np.ndarray) -> np.ndarray:
    """What lies in memory from the first element to the last of a strided array. Raises ValueError for steps back."""
    if any(s < 0 for s in values.strides):
        raise ValueError(f"strides {values.strides}: an input that runs backwards is not supported")
    steps = zip(values.shape, values.strides, strict=True)
    span = sum((n - 1) * s for n, s in steps) // values.itemsize + 1 if values.size else 0
    return np.lib.stride_tricks.as_strided(values, (span,), (values.itemsize,))
