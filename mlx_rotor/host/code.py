"""Telling whether code of mlx_lm's is still the code that something here stands in for."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from functools import cache
from typing import Any


@cache
def digest(kind: Any, uses: tuple[str, ...]) -> str:
    """Of the text of a class's `__call__` and of what its module has by the names `uses`, without white space; "" if
    one is not there."""
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
