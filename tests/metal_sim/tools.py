"""The compilers the simulator uses, and the folder it keeps their output in.

`METAL_SIM_CLANG` and `METAL_SIM_CXX` name other compilers, `METAL_SIM_CACHE` another folder.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
UNSUPPORTED = "the Metal simulator is for x86-64 Linux; a Mac has a GPU to run kernels on"
OLDEST, NEWEST = 18, 29
INSTALL = (
    f"the Metal simulator needs clang {OLDEST} or later and finds none: "
    "pip install ziglang (part of mlx_rotor's [test] extra), or apt-get install clang-19"
)


class ToolsMissing(Exception):
    """No compiler that can do it is installed."""


class CompileError(Exception):
    """The source is no valid Metal, as far as clang and the rules in lint.py can tell."""


@cache
def clang() -> tuple[str, ...]:
    """Command of a clang that knows C++ for OpenCL with bfloat: an installed one, else PyPI's ziglang.

    Raises ToolsMissing if there is neither.
    """
    if named := os.environ.get("METAL_SIM_CLANG"):
        return tuple(shlex.split(named))
    for name in ("clang", *(f"clang-{n}" for n in range(NEWEST, OLDEST - 1, -1))):
        if (path := shutil.which(name)) and clang_version((path,)) >= OLDEST:
            return (path,)
    if zig := _zig():
        return zig, "clang"
    raise ToolsMissing(INSTALL)


@cache
def cxx() -> tuple[str, ...]:
    """Command of a C++ compiler that can link: builds the runtime, links kernels. Raises ToolsMissing."""
    if named := os.environ.get("METAL_SIM_CXX"):
        return tuple(shlex.split(named))
    for name in ("g++", "c++"):
        if path := shutil.which(name):
            return (path,)
    if zig := _zig():
        return zig, "c++"
    raise ToolsMissing(INSTALL.replace(f"clang {OLDEST} or later", "a C++ compiler").replace("clang-19", "g++"))


def clang_version(command: Sequence[str]) -> int:
    """Major version of a clang; 0 if it does not say."""
    found = re.search(r"clang version (\d+)", _run([*command, "--version"]).stdout)
    return int(found[1]) if found else 0


@cache
def identity() -> str:
    """What compiled code depends on besides its text and flags: compilers and processor (code is for this one)."""
    versions = [f"{Path(c[0]).name} {_run([*c, '--version']).stdout}" for c in (clang(), cxx())]
    processor = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return "\n".join([*versions, processor[0] if processor else platform.processor()])


@cache
def cache_folder() -> Path:
    """Where compiled code is kept: `METAL_SIM_CACHE`, else a folder in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("METAL_SIM_CACHE") or user / "mlx_rotor" / "metal_sim")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile(command: Sequence[str], folder: Path) -> str:
    """Runs a compiler in `folder`; returns what it warned of. Raises CompileError with its messages."""
    done = _run(command, folder)
    if done.returncode:
        raise CompileError(done.stderr or f"{command[0]} ended with status {done.returncode}")
    return done.stderr


def _run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache_folder() / "zig")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _zig() -> str | None:
    found = importlib.util.find_spec("ziglang")
    return str(Path(found.origin).parent / "zig") if found and found.origin else None
