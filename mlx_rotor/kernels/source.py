"""Metal sources as text: finds `kernels_metal`, inlines local includes, names the result by its content.

Knows folders and text only: not what a kernel computes, nor how it is launched.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from ..errors import RotorError

FOLDER = "kernels_metal"
SUFFIXES = (".h", ".metal")
_LOCAL_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)".*$', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One Metal source, complete: the JIT that compiles it has no include path.

    `path` is relative to `kernels_metal`, `text` has every local include inlined, `files` are the paths whose text
    it holds, each after what it includes, and `digest` is the SHA-256 of `text` in hexadecimal.
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
