"""`python -m mlx_rotor <command>`, also installed as `mlx_rotor <command>`.

A command is a module or folder of this package with a function `main(argv)`; what it says of itself in `HELP`, or in
the second half of its docstring's first line, is its line in the list. Both are read without importing it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli.arguments import closest
from .cli.command import run

HERE = Path(__file__).parent
ALIASES = {"serve": "server"}


def commands() -> dict[str, tuple[str, str]]:
    """(module, help line) of every command by name, in alphabetical order."""
    found = {}
    for file in sorted([*HERE.glob("*.py"), *HERE.glob("*/__main__.py")]):
        if file.name == "__main__.py" and file.parent == HERE:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            continue
        name = file.stem if file.parent == HERE else file.parent.name
        module = f".{file.stem}" if file.parent == HERE else f".{name}.__main__"
        found[name] = (module, _help(tree))
    return found


def _help(tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
            return str(ast.literal_eval(node.value))
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    return first.partition(": ")[2].rstrip(".") or first.rstrip(".")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` begins with (None: the process's own arguments) and returns its exit status."""
    return run(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(argv: Sequence[str] | None) -> int:
    name, *rest = argv or ["help"]
    if name in ("-V", "--version"):
        from . import __version__

        print(f"mlx_rotor {__version__}")
        return 0
    if name in ("-h", "--help", "help"):
        if name != "help" or not rest:
            _list()
            return 0
        name, rest = rest[0], ["--help"]
    known = commands()
    name = ALIASES.get(name, name)
    if name not in known:
        hint = closest(name, [*known, *ALIASES, "help"])
        print(f"error: unknown command {name!r}{hint} (`mlx_rotor help` lists the commands)", file=sys.stderr)
        return 2
    sys.argv[0] = f"mlx_rotor {name}"
    return run(importlib.import_module(known[name][0], __package__).main, rest)


def _list() -> None:
    lines = {name: told for name, (_, told) in commands().items()}
    lines |= {alias: f"the same as {name}" for alias, name in ALIASES.items()}
    lines["help"] = "this list; `help <command>`: a command's options"
    width = max(map(len, lines))
    print("usage: mlx_rotor <command> [options]\n\ncommands:")
    print("\n".join(f"  {name:<{width}}  {told}" for name, told in lines.items()))
    print("\n`mlx_rotor <command> --help` lists a command's options.")


if __name__ == "__main__":
    sys.exit(main())
