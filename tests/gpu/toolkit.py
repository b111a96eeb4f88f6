"""The parts of NVIDIA's toolkit that are used where they are found: libdevice, ptxas, compute-sanitizer.

They come with a toolkit (`CUDA_HOME`, the `PATH`, /usr/local/cuda) or PyPI's nvidia-cuda-nvcc, nvidia-nvvm, triton.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LIBDEVICE = "libdevice.10.bc"
INSTALL = "install a CUDA toolkit (and set CUDA_HOME), or pip install nvidia-cuda-nvcc nvidia-nvvm"


@cache
def libdevice() -> Path | None:
    """The bitcode of NVIDIA's maths functions, which exp, sin, pow and the like need."""
    return next((path for folder in _folders() for path in sorted(folder.glob(f"**/{LIBDEVICE}"))), None)


@cache
def ptxas() -> Path | None:
    """The assembler that checks PTX without a GPU."""
    return _program("ptxas")


@cache
def sanitizer() -> Path | None:
    """compute-sanitizer, which watches a process's kernels."""
    return _program("compute-sanitizer")


def _program(name: str) -> Path | None:
    if found := shutil.which(name):
        return Path(found)
    places = (folder / sub / name for folder in _folders() for sub in ("bin", "compute-sanitizer"))
    return next((path for path in places if path.is_file()), None)


def _folders() -> Iterator[Path]:
    """Folders that hold `bin` or libdevice, where they exist: the toolkit that was named, the usual one, wheels."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if compiler := shutil.which("nvcc"):
        named.append(Path(compiler).resolve().parents[1])
    places = [folder / "nvvm" for folder in (*named, Path("/usr/local/cuda"))] + [*named, Path("/usr/local/cuda")]
    for wheel, below in (("nvidia", "*"), ("triton", "backends/nvidia")):
        spec = importlib.util.find_spec(wheel)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            places += sorted(Path(folder).glob(below))
    yield from (folder for folder in places if folder.is_dir())
