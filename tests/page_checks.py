"""Checks of Markdown pages: tables, links, commands, flags, Python, maps. Each returns what is wrong, or nothing.

`test_docs.py` applies them to the README and docs, and shows that each can fail.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from markdown_it import MarkdownIt
from markdown_it.token import Token

from mlx_rotor.__main__ import commands as all_commands

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = MarkdownIt("commonmark").enable("table")
MODULE = re.compile(r"(?:\S*/)?python3? -m ((?:mlx_rotor|tests)\b[\w.]*)(.*)")
COMMAND = re.compile(r"(?:\S*/)?mlx_rotor( .*|$)")
SCRIPT = re.compile(r"(?:\S*/)?(?:python3?|bash) ([\w./]+\.(?:py|sh)|\.ci/run)\b")
PYTEST = re.compile(r"(?:\S*/)?(?:python3? -m )?pytest\b(.*)")


@functools.cache
def tokens(text: str) -> list[Token]:
    return MARKDOWN.parse(text)


def broken_tables(text: str) -> list[str]:
    """Rows that no renderer shows as a row, and rows whose cells are not as many as their header's."""
    bad, lines, inside = [], text.splitlines(), set()
    for token in tokens(text):
        if token.type in ("table_open", "fence", "code_block"):
            first, end = token.map
            inside.update(range(first, end))
            if token.type == "table_open":
                expected = cells(lines[first])
                for n in range(first, end):
                    if (count := cells(lines[n])) != expected:
                        bad.append(f"{n + 1}: {count} cells under a header of {expected}")
    stray = (n for n, line in enumerate(lines) if n not in inside and line.lstrip().startswith("|"))
    return [*bad, *(f"{n + 1}: a row outside a table" for n in stray)]


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))) + 1


def dead_links(page: Path, text: str) -> list[str]:
    """Links and pictures to files or headings that are not there, and addresses that are none."""
    bad = []
    for inline in (t for t in tokens(text) if t.type == "inline"):
        for token in inline.children or ():
            target = token.attrGet("href" if token.type == "link_open" else "src")
            if token.type not in ("link_open", "image") or target is None:
                continue
            name, _, anchor = str(target).partition("#")
            if "://" in name:
                if not re.fullmatch(r"https?://[\w.-]+\.\w+(:\d+)?(/\S*)?", name):
                    bad.append(f"{target}: no address")
                continue
            file = (page.parent / name).resolve() if name else page
            if name and not file.exists():
                bad.append(f"{target}: no such file")
            elif anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
                bad.append(f"{target}: no such heading")
    return bad


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    titles = [after.content for t, after in itertools.pairwise(tokens(text)) if t.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def fences(text: str, language: str) -> list[str]:
    return [t.content for t in tokens(text) if t.type == "fence" and t.info.strip() == language]


def commands(text: str) -> list[str]:
    """What a reader may type: lines of bash blocks, and `mlx_rotor …` inside sentences, one simple command each."""
    lines = "\n".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    for token in tokens(text):
        inline = token.children or () if token.type == "inline" else ()
        lines += [
            t.content for t in inline if t.type == "code_inline" and "<" not in t.content and "…" not in t.content
        ]
    found = []
    for line in lines:
        found += [
            part.strip() for part in re.split(r"&&|\|\||;|(?<!\|)\|(?!\|)", without_comment(line)) if part.strip()
        ]
    return found


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line)


class Parsed(BaseException):
    """A parser took its arguments: the command itself is not to run."""


@functools.cache
def refused_command(command: str) -> str | None:
    """Why `command` would not start; None where it would, or where it is none of ours."""
    command = re.sub(r"^(?:[A-Z_]+=\S* )+", "", re.sub(r"\s[<>]\s*\S+", "", command))
    if script := SCRIPT.match(command):
        return None if (ROOT / script[1]).is_file() else f"{command}: no such file"
    if run := PYTEST.match(command):
        paths = [word for word in shlex.split(run[1]) if word.startswith("tests/")]
        return next((f"{command}: no {path}" for path in paths if not (ROOT / path).exists()), None)
    if run := MODULE.match(command):
        return refused_arguments(command, run[1], shlex.split(run[2]))
    if run := COMMAND.match(command):
        return refused_arguments(command, "mlx_rotor", shlex.split(run[1]))
    return None


@functools.cache
def flags() -> frozenset[str]:
    """All long options of all commands."""
    found: set[str] = set()

    def collect(parser: argparse.ArgumentParser, *_given: object) -> None:
        for action in parser._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for part in action.choices.values():
                    with contextlib.suppress(Parsed):
                        collect(part)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", collect):
        for module, _ in all_commands().values():
            with contextlib.suppress(Parsed):
                importlib.import_module(module, "mlx_rotor").main([])
    return frozenset(name for name in found if name.startswith("--"))


def unknown_flags(text: str) -> list[str]:
    """Flags that sentences name alone and no command has."""
    inline = (c for t in tokens(text) if t.type == "inline" for c in t.children or ())
    named = {
        c.content.split()[0].split("=")[0] for c in inline if c.type == "code_inline" and c.content.startswith("--")
    }
    return sorted(named - flags())


def missing_files(page: Path, text: str) -> list[str]:
    """Files and folders that sentences name, by path from page, clone or package, and that are not there."""
    inline = (c for t in tokens(text) if t.type == "inline" for c in t.children or ())
    named = {c.content for c in inline if c.type == "code_inline"}
    paths = {name for name in named if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|/[\w-]+\.(py|toml|md|h|json))", name)}
    return sorted(p for p in paths if not any((f / p).exists() for f in (page.parent, ROOT, ROOT / "mlx_rotor")))


def refused_arguments(command: str, name: str, argv: list[str]) -> str | None:
    try:
        with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
            module = importlib.import_module(name)
            main = module.main if hasattr(module, "main") else importlib.import_module(f"{name}.__main__").main
    except (ImportError, AttributeError) as e:
        return f"{command}: {e}"
    parse, told = argparse.ArgumentParser.parse_args, []

    def parse_only(self, *given):
        parse(self, *given)
        raise Parsed

    def error(self, message):
        told.append(message)
        raise SystemExit(2)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(argparse.ArgumentParser, "error", error),
    ):
        try:
            status = main(argv)
        except Parsed:
            return None
        except SystemExit as e:
            status = e.code
    return f"{command}: {'; '.join(told) or f'status {status}'}" if status else None


def broken_python(code: str) -> list[str]:
    """Why `code` does not compile, and which names it imports, or takes from mlx_rotor, that are not there."""
    try:
        tree = ast.parse(code)
    except SyntaxError as e:
        return [f"{e.lineno}: {e.msg}"]
    wanted: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mlx_rotor":
            wanted.append(("mlx_rotor", node.attr))
    return [f"no {f'{module}.{name}'.rstrip('.')}" for module, name in wanted if not exists(module, name)]


def exists(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
        return not name or hasattr(found, name)
    except ImportError:
        return False


def mapped(text: str) -> dict[str, list[str]]:
    """Names in a page's map, the block with `mlx_rotor/` in it: under "" the root's, then the package's."""
    block = next(f for f in fences(text, "") if re.search(r"^mlx_rotor/", f, re.M))
    found: dict[str, list[str]] = {"": []}
    for line in block.splitlines():
        indent, names = re.match(r"( *)(.*?)(?:  |$)", line).groups()
        listed = [name.rstrip("/") for name in names.split()]
        if not indent:
            parent = listed[0]
        found.setdefault(parent if indent else "", []).extend(listed)
    return found


def folders(names: list[str]) -> list[str]:
    return [name for name in names if "." not in name]


def tree(root: Path) -> dict[str, list[str]]:
    """What a map holds, sorted: the folders of the clone that are for people, the package's folders and modules."""
    package = root / "mlx_rotor"
    inside = [f.parent.name for f in package.glob("*/__init__.py")] + [f.name for f in package.glob("*.py")]
    return {
        "": [n for n in ("docs", "examples", "kernels_metal", "mlx_rotor", "tests") if (root / n).is_dir()],
        "mlx_rotor": sorted(inside),
    }
