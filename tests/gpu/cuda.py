"""One launch of PTX: buffers in and out, its time, a file of it. Needs NumPy, and CuPy to run; not clang, not MLX."""

from __future__ import annotations

import hashlib
import importlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import parity

ENTRY = "msl_kernel"
LARGEST_SAVED = 1 << 16  # elements; of more, a file holds the first ones, to be repeated
UNWRITTEN = 0xFF  # the byte in an output before the launch, where no value was asked for
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Argument:
    """A buffer: its bits (bfloat16 as uint16), the name of its dtype, and whether the kernel writes it."""

    name: str
    array: np.ndarray
    dtype: str
    written: bool = False


@dataclass(frozen=True)
class Launch:
    """PTX with an entry `msl_kernel`, its arguments in order, and how many groups of how many threads run it.

    `wanted` are the bits that the written buffers should have afterwards, where that is known.
    """

    name: str
    ptx: str
    arguments: tuple[Argument, ...]
    groups: Size
    threadgroup: Size
    wanted: tuple[np.ndarray, ...] = ()

    def run(self) -> list[np.ndarray]:
        """The buffers that the kernel writes, after it ran on the GPU."""
        arrays = self._upload()
        self._start(arrays)
        _cupy().cuda.get_current_stream().synchronize()
        return [_cupy().asnumpy(a) for a, argument in zip(arrays, self.arguments, strict=True) if argument.written]

    def _upload(self) -> list[Any]:
        return [_cupy().asarray(np.ascontiguousarray(argument.array)) for argument in self.arguments]

    def _start(self, arrays: Sequence[Any]) -> None:
        _function(self.ptx)(self.groups, self.threadgroup, tuple(np.uint64(a.data.ptr) for a in arrays))

    def apart(self) -> dict[str, float]:
        """Runs; name -> difference of the written buffers that are too far from `wanted`."""
        written = [a for a in self.arguments if a.written]
        outputs = zip(written, self.run(), self.wanted, strict=True)
        return {
            a.name: parity.difference(got, wanted, a.dtype)
            for a, got, wanted in outputs
            if not parity.agrees(got, wanted, a.dtype)
        }

    def save(self, path: Path) -> None:
        """Writes the launch to `path` (.npz). Where nothing is wanted, only the first elements of a large buffer."""
        about = [
            {"name": a.name, "dtype": a.dtype, "written": a.written, "shape": a.array.shape} for a in self.arguments
        ]
        record = {"name": self.name, "groups": self.groups, "threadgroup": self.threadgroup, "arguments": about}
        texts = {"record": np.array(json.dumps(record)), "ptx": np.frombuffer(self.ptx.encode(), np.uint8)}
        kept = None if self.wanted else LARGEST_SAVED
        buffers = {f"a{i}": a.array.reshape(-1)[:kept] for i, a in enumerate(self.arguments)}
        np.savez_compressed(path, **texts, **buffers, **{f"w{i}": a for i, a in enumerate(self.wanted)})

    @staticmethod
    def load(path: Path) -> Launch:
        """What `save` wrote; a buffer that was cut holds its first elements again and again."""
        with np.load(path) as file:
            record = json.loads(str(file["record"]))
            arguments = [
                Argument(a["name"], np.resize(file[f"a{i}"], a["shape"]), a["dtype"], a["written"])
                for i, a in enumerate(record["arguments"])
            ]
            text = file["ptx"].tobytes().decode()
            wanted = tuple(file[f"w{i}"] for i in range(sum(name.startswith("w") for name in file.files)))
        sizes = tuple(record["groups"]), tuple(record["threadgroup"])
        return Launch(record["name"], text, tuple(arguments), *sizes, wanted)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: what has to move at least."""
        return sum(a.array.nbytes for a in self.arguments)


def unwritten(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An output that nobody has written: NaN in every floating-point format."""
    return np.full((*shape, dtype.itemsize), UNWRITTEN, np.uint8).view(dtype)[..., 0]


def seconds(launches: Sequence[Launch], copies: int = 20, repeats: int = 15) -> float:
    """Time of `launches` one behind another on the GPU, without uploads and without Python.

    A CUDA graph holds `copies` of them; the time is the median of `repeats` runs of it, divided by `copies`.
    """
    ready = [(launch, launch._upload()) for launch in launches]
    for launch, arrays in ready:
        launch._start(arrays)
    event = _cupy().cuda.Event
    with _cupy().cuda.Stream(non_blocking=True) as stream:
        _cupy().cuda.runtime.deviceSynchronize()
        stream.begin_capture()
        for _ in range(copies):
            for launch, arrays in ready:
                launch._start(arrays)
        graph = stream.end_capture()
        taken = []
        for _ in range(repeats + 3):  # the first ones warm up
            begin, end = event(), event()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            taken.append(_cupy().cuda.get_elapsed_time(begin, end) / 1000)
    return statistics.median(taken[3:]) / copies


def unavailable() -> str | None:
    """Why no launch can run here; None if one can."""
    try:
        count = _cupy().cuda.runtime.getDeviceCount()
    except ImportError as missing:
        return (
            f"CuPy does not load: {str(missing).strip().splitlines()[-1]}; pip install cupy-cuda13x (or cupy-cuda12x)"
        )
    except _cupy().cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no GPU: {error}"
    return None if count else "CuPy finds no GPU"


def device() -> dict[str, Any]:
    """Name, compute capability, driver and CuPy of the GPU that launches run on."""
    runtime = _cupy().cuda.runtime
    about = runtime.getDeviceProperties(_cupy().cuda.Device().id)
    return {
        "gpu": about["name"].decode(),
        "capability": [about["major"], about["minor"]],
        "driver": runtime.driverGetVersion(),
        "cupy": _cupy().__version__,
    }


def _cupy() -> Any:
    return importlib.import_module("cupy")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mlx_rotor_ptx_")


@cache
def _function(ptx: str) -> Any:
    """The entry of `ptx`, loaded; CuPy takes PTX from a file."""
    path = Path(_folder().name) / f"{hashlib.sha256(ptx.encode()).hexdigest()[:24]}.ptx"
    path.write_text(ptx)
    return _cupy().RawModule(path=str(path)).get_function(ENTRY)
