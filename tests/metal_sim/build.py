"""Rewritten Metal source to a shared library, kept by content.

A mode says how code is compiled:

* `fast`: optimised, nothing watched; an access out of bounds ends the process.
* `count`: loads and stores are reported to the runtime, for traffic figures.
* `check`: those, and stack variables, undefined behaviour, values never written.
* `arithmetic`: optimised, not vectorised, for any x86-64-v3; every block of code counts how often it runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx

from . import arithmetic, tools
from .rewrite import rewrite

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime" / "runtime.cpp"
MLX_KERNELS = Path("mlx/backend/metal/kernels")
KERNEL_FILE = "kernel.clcpp"  # the name in debug information and messages
PRELUDE = '#include <metal_stdlib>\n#include "mlx/backend/metal/kernels/utils.h"\nusing namespace metal;\n'
LANGUAGE = [
    *("-target", "x86_64-linux-gnu", "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc"),
    *("-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"),  # Metal has no double
    *("-Wno-unknown-attributes", "-Wno-unused-command-line-argument"),
]
COMMON = ["-march=native", "-fno-math-errno", "-fPIC"]


def _llvm(*options: str, prefix: str = "-asan-") -> list[str]:
    return [word for option in options for word in ("-mllvm", f"{prefix}{option}")]


# The kernel flavour of the address sanitizer calls a function per access, of any size, and brings no runtime.
WATCHED = [
    *("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-gline-tables-only", "-gdwarf-4"),
    "-fsanitize=kernel-address",
    *_llvm("instrumentation-with-call-threshold=0", "globals=0", "opt=0", "kernel-mem-intrinsic-prefix=1"),
]
MODES = {
    "fast": [*COMMON, "-O2"],
    "count": [*COMMON, *WATCHED, *_llvm("stack=0")],
    "check": [
        *(*COMMON, *WATCHED, "-fno-omit-frame-pointer"),
        *_llvm("stack=1", "mapping-offset=0x7fff8000", "instrument-dynamic-allocas=0"),
        "-fno-sanitize-address-use-after-scope",
        "-fsanitize=array-bounds,shift,integer-divide-by-zero,float-cast-overflow,signed-integer-overflow",
        *("-fsanitize-recover=all", "-ftrivial-auto-var-init=pattern"),
    ],
    # As a GPU's compiler: everything inlined, loops of known length unrolled, no table for a switch. The address spaces
    # get numbers, which the processor ignores.
    "arithmetic": [
        *("-march=x86-64-v3", "-fno-math-errno", "-fPIC", "-O2", "-DMSL_COUNTED"),
        *("-fno-vectorize", "-fno-slp-vectorize", "-fno-jump-tables", "-Xclang", "-ffake-address-space-map"),
        *_llvm("inline-threshold=100000", "unroll-threshold=4000", "unroll-runtime=false", prefix="-"),
        *_llvm("unroll-allow-partial=false", "disable-loop-idiom-all", "indvars-widen-indvars=false", prefix="-"),
    ],
}
# From LLVM's code to machine code: no pass over the counters, and the quickest choice of instructions, as code that
# is watched spends its time in the runtime.
CODE = ["-target", "x86_64-linux-gnu", "-fPIC", "-O0", "-w", "-Xclang", "-disable-llvm-passes"]
COUNTING = ("arithmetic.py", "operations.py", "ir.py")
LINK = ["-shared", "-O2", "-fno-sanitize=all"]


def mlx_kernels() -> Path:
    """The folder of Metal headers that the MLX wheel carries."""
    return Path(mx.__file__).parent / "include" / MLX_KERNELS


def kept(key: str, name: str, make: Callable[[Path], None]) -> Path:
    """The file or folder that `make(path)` writes, made once for `key` and this machine's compilers."""
    digest = hashlib.sha256(f"{key}\n{tools.identity()}".encode()).hexdigest()[:24]
    kept_at = tools.cache_folder() / f"{digest}{name}"
    if not kept_at.exists():
        with tempfile.TemporaryDirectory(dir=tools.cache_folder()) as folder:
            made = Path(folder) / "made"
            make(made)
            try:
                os.replace(made, kept_at)
            except OSError:  # a folder that another process has put there meanwhile
                if not kept_at.is_dir():
                    raise
    return kept_at


@cache
def headers() -> Path:
    """A folder with <metal_stdlib>, MLX's headers rewritten, and what every kernel starts with, `prelude.h`."""
    ours = {path.relative_to(HERE / "include"): path for path in sorted((HERE / "include").iterdir())}
    theirs = {MLX_KERNELS / p.relative_to(mlx_kernels()): p for p in sorted(mlx_kernels().rglob("*.h"))}

    def make(folder: Path) -> None:
        for place, path in theirs.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(f'#line 1 "{place}"\n{rewrite(path.read_text(), lenient=True)}')
        for place, path in ours.items():
            shutil.copyfile(path, folder / place)
        (folder / "prelude.h").write_text(PRELUDE)

    rules = [HERE / "rewrite.py", HERE / "tokens.py"]
    texts = [f"{path.name}\n{path.read_text()}" for path in (*ours.values(), *theirs.values(), *rules)]
    return kept("\n".join([PRELUDE, *texts]), "", make)


@cache
def front_end(mode: str) -> list[str]:
    """Clang's arguments in `mode`: language, search path, and the compiled prelude."""
    flags = [*LANGUAGE, f"-I{headers()}", *MODES[mode]]

    def make(path: Path) -> None:
        emit = ["-w", "-c", "-Xclang", "-emit-pch", str(headers() / "prelude.h"), "-o", str(path)]
        tools.compile([*tools.clang(), *flags, *emit], path.parent)

    prelude = kept(f"prelude {flags}", ".pch", make)
    return [*flags, "-include-pch", str(prelude)]


def library(text: str, mode: str) -> Path:
    """The shared library of rewritten source `text`. Raises tools.CompileError."""
    flags = front_end(mode)

    def make(path: Path) -> None:
        folder = path.parent
        (folder / KERNEL_FILE).write_text(text)
        front = [*tools.clang(), *flags, "-w", KERNEL_FILE]
        if mode == "fast":
            tools.compile([*front, "-c", "-o", "kernel.o"], folder)
        elif mode == "arithmetic":
            tools.compile([*front, "-S", "-emit-llvm", "-o", "plain.ll"], folder)
            (folder / "kernel.ll").write_text(arithmetic.instrument((folder / "plain.ll").read_text()))
            tools.compile([*tools.clang(), *CODE, "-march=x86-64-v3", "-c", "kernel.ll", "-o", "kernel.o"], folder)
        else:
            tools.compile([*front, "-c", "-emit-llvm", "-o", "kernel.bc"], folder)
            tools.compile([*tools.clang(), *CODE, "-march=native", "-c", "kernel.bc", "-o", "kernel.o"], folder)
        tools.compile([*tools.cxx(), *LINK, "-o", str(path), "kernel.o", "-lm", "-Wl,-z,now"], folder)

    key = f"{text}\n{flags} {CODE} {LINK}"
    if mode == "arithmetic":
        key = "\n".join([key, *((HERE / name).read_text() for name in COUNTING)])
    return kept(key, ".so", make)


@cache
def runtime() -> Path:
    """The library that runs threads, holds memory and watches it."""
    sources = "".join(path.read_text() for path in sorted(RUNTIME.parent.iterdir()))
    flags: Sequence[str] = ["-std=c++17", "-fPIC", *LINK]

    def make(path: Path) -> None:
        tools.compile([*tools.cxx(), *flags, "-o", str(path), str(RUNTIME)], path.parent)

    return kept(f"{sources} {flags}", ".so", make)
