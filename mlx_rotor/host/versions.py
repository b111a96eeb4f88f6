"""The mlx_lm versions that this package fits, and digests that tell whether mlx_lm's code is still the known code."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from functools import cache
from importlib.metadata import version
from typing import Any

from ..errors import RotorError

MLX_LM = (0, 32)
MLX_LM_PATCH = 2


@cache
def check(installed: str | None = None) -> None:
    """Refuses an mlx_lm whose insides are unknown.

    Raises:
        RotorError: with the command that installs a fitting one.
    """
    installed = installed or version("mlx-lm")
    parts = [*installed.split("."), "0", "0"][:3]
    major, minor, patch = (int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
    if (major, minor) != MLX_LM or patch < MLX_LM_PATCH:
        low, high = ".".join(map(str, (*MLX_LM, MLX_LM_PATCH))), f"{MLX_LM[0]}.{MLX_LM[1] + 1}"
        raise RotorError(f'mlx-lm {installed} is not supported; run: pip install "mlx-lm>={low},<{high}"')


@cache
def digest(kind: Any, uses: tuple[str, ...]) -> str:
    """A digest of code: of a class's `__call__` and of the functions `uses` of its module, without white space.

    Args:
        kind: a class.
        uses: names of functions in the class's module, methods as "Class.method".

    Returns:
        12 hex digits; "" if one of them is not there.
    """
    source = inspect.getsource(sys.modules[kind.__module__])
    lines, wanted = source.splitlines(), {f"{kind.__qualname__}.__call__", *uses}
    texts = {}
    for node in ast.parse(source).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for each in inside:
            if isinstance(each, ast.FunctionDef) and f"{prefix}{each.name}" in wanted:
                start = min([each.lineno, *(d.lineno for d in each.decorator_list)]) - 1
                texts[f"{prefix}{each.name}"] = "".join("".join(lines[start : each.end_lineno]).split())
    if texts.keys() != wanted:
        return ""
    return hashlib.sha256("\n".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:12]
