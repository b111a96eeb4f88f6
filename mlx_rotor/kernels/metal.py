"""Metal sources as text, and kernels made of them.

A source is found below `kernels_metal`, and its local includes are inlined. A kernel is such text as header and one
generated call line. `mx.fast.metal_kernel` makes it on a Mac; a simulator with the same signature makes it elsewhere.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ..errors import RotorError

FOLDER = "kernels_metal"
SUFFIXES = (".h", ".metal")
_LOCAL_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)".*$', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One Metal source, complete: the compiler in MLX has no include path.

    Attributes:
        path: relative to `kernels_metal`; several paths are separated by spaces.
        text: with every local include inlined.
        files: the paths whose text it holds, each after the files that it includes.
        digest: SHA-256 of `text` in hexadecimal.
    """

    path: str
    text: str
    files: tuple[str, ...]
    digest: str


def find_root(candidates: Sequence[Traversable]) -> Traversable:
    """The first of `candidates` that is a folder. Raises RotorError, naming all of them, if none is."""
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " or ".join(str(c) for c in candidates)
    raise RotorError(f"the Metal sources are missing: no folder {tried}; reinstall mlx_rotor")


@cache
def root() -> Traversable:
    """The `kernels_metal` folder: inside the installed package, or beside it in a source tree or editable install."""
    return find_root([files("mlx_rotor") / FOLDER, Path(__file__).resolve().parents[2] / FOLDER])


def names(folder: Traversable | None = None) -> tuple[str, ...]:
    """Paths of all Metal sources relative to `folder` (default: `root()`), sorted."""
    return tuple(sorted(_walk(folder or root(), "")))


def load(path: str, folder: Traversable | None = None) -> Source:
    """Reads `path` (relative to `folder`, default `root()`) and inlines each local `#include "..."` once.

    A local include is looked up beside the file that names it, as the Metal compiler does; `#include <...>` stays.
    Raises RotorError, naming the file and line, for a missing source, an include that leaves the folder or a cycle.
    """
    return join((path,), folder)


def join(paths: Sequence[str], folder: Traversable | None = None) -> Source:
    """Several sources one behind another, a file that more than one of them includes only once. Raises as `load`."""
    done: list[str] = []
    text = ""
    for path in paths:
        if (name := posixpath.normpath(path)) not in done:
            text += _inline(name, folder or root(), done, (), "")
    return Source(
        " ".join(map(posixpath.normpath, paths)), text, tuple(done), hashlib.sha256(text.encode()).hexdigest()
    )


def _walk(folder: Traversable, prefix: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(SUFFIXES):
            yield prefix + entry.name


def _inline(path: str, folder: Traversable, done: list[str], stack: tuple[str, ...], asked_by: str) -> str:
    """The text of `path`; appends it and what it includes to `done`. `asked_by` starts an error, "file:line: "."""
    if path in stack:
        raise RotorError(f"{asked_by}include cycle: {' -> '.join((*stack, path))}")
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        raise RotorError(f"{asked_by}{path} lies outside {FOLDER}; name files relative to the file that includes them")
    file = folder.joinpath(*path.split("/"))
    if not file.is_file():
        raise RotorError(f"{asked_by}no Metal source {path} in {folder}")
    text = file.read_text(encoding="utf-8")

    def included(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        if target in done:
            return ""
        line = text.count("\n", 0, match.start()) + 1
        return _inline(target, folder, done, (*stack, path), f"{FOLDER}/{path}:{line}: ")

    text_with_includes = _LOCAL_INCLUDE.sub(included, text)
    done.append(path)
    return f"// {FOLDER}/{path}\n{text_with_includes}"


# Takes the arguments of mx.fast.metal_kernel and returns a callable of the same kind.
Maker = Callable[..., Any]
Made = TypeVar("Made", bound=Callable[..., Any])
_maker: list[Maker] = []
_forgetful: list[Callable[[], None]] = []


def use_maker(maker: Maker | None) -> None:
    """Makes kernels with `maker` from now on; None: with MLX's own."""
    _maker[:] = [] if maker is None else [maker]
    for forget in _forgetful:
        forget()


def simulated() -> bool:
    """Whether something else than MLX makes the kernels."""
    return bool(_maker)


def kept(make: Made) -> Made:
    """Calls `make` once for equal arguments: putting a kernel's text together takes longer than a launch."""
    known = cache(make)
    _forgetful.append(known.cache_clear)
    return known  # type: ignore[return-value]


@cache
def constant(value: float) -> mx.array:
    """A float32 that kernels take, evaluated: made once."""
    array = mx.array(value, mx.float32)
    mx.eval(array)
    return array


@kept
def kernel(
    name: str,
    headers: tuple[str, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    body: str,
    contiguous: bool = False,
) -> Callable[..., list[mx.array]]:
    """The kernel `name` with the source `body`, behind `headers` (paths below kernels_metal).

    Inputs keep their strides, and the body reads `<input>_strides`; with `contiguous`, MLX copies inputs that are not
    row-contiguous first. MLX keeps compiled kernels by name: the name it gets ends in a digest of the whole text.
    """
    header = join(headers)
    digest = hashlib.sha256(f"{header.digest}\n{body}".encode()).hexdigest()[:12]
    make: Maker = _maker[0] if _maker else mx.fast.metal_kernel
    made: Callable[..., list[mx.array]] = make(
        name=f"mlx_rotor_{name}_{digest}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header.text,
        ensure_row_contiguous=contiguous,
    )
    return made
