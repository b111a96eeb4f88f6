"""Metal kernels on the GPU behind the interface of `mx.fast.metal_kernel`: `PtxKernel`, and `Recorder`, which keeps
launches to be timed or to be carried to another machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from metal_sim import Kernel, Options, bits, from_bits
from metal_sim.signature import Template, generate, template_argument

from . import cuda
from .cuda import Argument, Launch, Size
from .ptx import architecture, ptx


@dataclass(frozen=True)
class PtxKernel(Kernel):
    """A body and the names it uses, as `mx.fast.metal_kernel` takes them; called, it runs on the GPU.

    `arch` is what it is compiled for; None: the GPU that is there. `run` is still the simulator's.
    """

    arch: str | None = None

    def __call__(
        self,
        inputs: Sequence[Any],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template = (),
        init_value: float | None = None,
    ) -> list[mx.array]:
        """The outputs. `inputs` are MLX or NumPy arrays or numbers. Raises as `launch`, and what CuPy raises."""
        launch = self.launch(inputs, output_shapes, output_dtypes, grid, threadgroup, template, init_value)
        return [from_bits(a, dtype) for a, dtype in zip(launch.run(), output_dtypes, strict=True)]

    def launch(
        self,
        inputs: Sequence[Any],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template = (),
        init_value: float | None = None,
    ) -> Launch:
        """What a call with these arguments would run.

        Raises:
            CompileError, ToolsMissing: as `ptx`.
            ValueError: for a threadgroup of more than 1024 threads, and for a grid whose end cuts off threads from the
                middle of a threadgroup's order, where simdgroups would not be warps.
        """
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        named = list(zip(self.input_names, arrays, strict=True))
        outputs = list(zip(self.output_names, output_dtypes, strict=True))
        group, groups, cut = _split(grid, threadgroup)
        made = generate(self.name, self.source, self.header, named, outputs, list(template), self.atomic_outputs)
        text = ptx(
            made.text,
            made.name,
            [template_argument(value) for _, value in template],
            self.arch or architecture(*cuda.device()["capability"]),
            threadgroup=group,
            grid=grid if cut else None,
        )
        arguments = []
        for name, a in named:
            arguments += [
                Argument(b.name, b.array, _dtype(a) if b.name == name else str(b.array.dtype))
                for b in self._input(name, a)
            ]
        for (name, dtype), shape in zip(outputs, output_shapes, strict=True):
            empty = mx.full(tuple(shape), 0 if init_value is None else init_value, dtype)
            array = bits(empty) if init_value is not None else cuda.unwritten(shape, bits(empty).dtype)
            arguments.append(Argument(name, array, _dtype(empty), written=True))
        return Launch(self.name, text, tuple(arguments), groups, group)


@dataclass
class Recorder:
    """A maker of kernels that keeps what their calls would launch.

    The calls' outputs come from the simulator, and are what the launches want; or zeros, where `simulate` is off.
    """

    arch: str
    simulate: bool = True
    launches: list[Launch] = field(default_factory=list)

    def __call__(self, **fields: Any) -> Callable[..., list[mx.array]]:
        kernel = PtxKernel(**fields, arch=self.arch)

        def call(**arguments: Any) -> list[mx.array]:
            launch = kernel.launch(**arguments)
            if self.simulate:
                outputs = kernel.run(**arguments, options=Options(mode="fast")).outputs
                launch = replace(launch, wanted=tuple(bits(a) for a in outputs))
            else:
                what = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
                outputs = [mx.zeros(shape, dtype) for shape, dtype in what]
            self.launches.append(launch)
            return outputs

        return call


def _split(grid: Size, threadgroup: Size) -> tuple[Size, Size, bool]:
    """(threadgroup, number of threadgroups, whether the grid ends inside of one), as Metal cuts a grid of threads."""
    group = tuple(min(pair) for pair in zip(threadgroup, grid, strict=True))
    if math.prod(threadgroup) > 1024:
        raise ValueError(f"threadgroup {threadgroup} has more than 1024 threads")
    cut = [n % size > 0 for n, size in zip(grid, group, strict=True)]
    if any(c and math.prod(group[axis + 1 :]) > 1 for axis, c in enumerate(cut)):
        raise ValueError(f"grid {grid} cuts threadgroups {group} across their simdgroups: not possible with warps")
    groups = tuple(-(-n // size) for n, size in zip(grid, group, strict=True))
    return group, groups, any(cut)


def _dtype(a: mx.array) -> str:
    return str(a.dtype).removeprefix("mlx.core.")
