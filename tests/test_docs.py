"""README and docs: tables are whole, links alive, commands parse, Python compiles, and the maps are the tree."""

import argparse
import ast
import functools
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
from markdown_it import MarkdownIt

from test_layout import ORDER

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs/results/README.md"
RESULTS = sorted(set((ROOT / "docs/results").glob("*.md")) - {INDEX})
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
PAGES += [INDEX, *RESULTS]
README_LINES = 150
MARKDOWN = MarkdownIt("commonmark").enable("table")
TEST_MARKER = "<!-- test-command -->"
MODULE = re.compile(r"(?:\S*/)?python3? -m ((?:mlx_rotor|tests)\b[\w.]*)(.*)")
COMMAND = re.compile(r"(?:\S*/)?mlx_rotor( .*|$)")
SCRIPT = re.compile(r"(?:\S*/)?(?:python3?|bash) ([\w./]+\.(?:py|sh)|\.ci/run)\b")
PYTEST = re.compile(r"(?:\S*/)?(?:python3? -m )?pytest\b(.*)")


# ------------------------------------------------------------ what a page may not have


def broken_tables(text: str) -> list[str]:
    """Rows that no renderer shows as a row, and rows whose cells are not as many as their header's."""
    bad, lines, inside = [], text.splitlines(), set()
    for token in MARKDOWN.parse(text):
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
    for inline in (t for t in MARKDOWN.parse(text) if t.type == "inline"):
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
    tokens = MARKDOWN.parse(text)
    titles = [after.content for t, after in itertools.pairwise(tokens) if t.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def fences(text: str, language: str) -> list[str]:
    return [t.content for t in MARKDOWN.parse(text) if t.type == "fence" and t.info.strip() == language]


def commands(text: str) -> list[str]:
    """What a reader may type: lines of bash blocks, and `mlx_rotor …` inside sentences, one simple command each."""
    lines = "\n".join(fences(text, "bash")).replace("\\\n", " ").splitlines()
    for token in MARKDOWN.parse(text):
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


# ------------------------------------------------------------ the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_whole(page):
    text = page.read_text(encoding="utf-8")
    assert not broken_tables(text)
    assert not dead_links(page, text)
    assert not [why for command in commands(text) if (why := refused_command(command))]
    assert not [why for code in fences(text, "python") for why in broken_python(code)]


def test_the_readme_is_short_and_holds_the_command_that_ci_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert re.search(rf"^{TEST_MARKER}\n```bash\n[^\n]*pytest[^\n]*\n```$", text, re.M)


def test_the_maps_are_the_tree_in_the_order_of_imports():
    there = tree(ROOT)
    full, short = (mapped((ROOT / name).read_text(encoding="utf-8")) for name in ("CONTRIBUTING.md", "README.md"))
    assert {parent: sorted(names) for parent, names in full.items()} == there
    assert sorted(short[""]) == there[""]
    assert folders(full["mlx_rotor"]) == folders(short["mlx_rotor"]) == ORDER


@pytest.mark.parametrize("page", RESULTS, ids=lambda p: p.name)
def test_a_result_begins_with_the_command_that_makes_it(page):
    title, block, *rest = [t for t in MARKDOWN.parse(page.read_text(encoding="utf-8")) if t.type in ("inline", "fence")]
    assert title.type == "inline" and block.type == "fence" and block.info == "bash"
    ours = [c for c in commands(f"```bash\n{block.content}```") if re.search(r"mlx_rotor|metal_sim|pytest", c)]
    assert ours and not [why for command in ours if (why := refused_command(command))]
    assert re.search(r"AMD EPYC.*\bMLX \d.*\b20\d\d-\d\d-\d\d", rest[0].content, re.S), "machine, versions and date"


# ------------------------------------------------------------ the checks can fail


def test_broken_tables_are_reported():
    whole = "| a | b |\n|---|---|\n| 1 | `x\\|y` |\n"
    assert broken_tables(whole) == []
    assert broken_tables(whole + "\n| 2 | 3 |\n") == ["5: a row outside a table"]
    assert broken_tables(whole + "| 2 |\n") == ["4: 1 cells under a header of 2"]
    assert broken_tables(whole + "| 2 | 3 | 4 |\n") == ["4: 3 cells under a header of 2"]
    assert broken_tables(f"```\n{whole}\n| 2 |\n```\n") == []


def test_dead_links_are_reported(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Its title: `x`\n")
    good = "# Here\n[a](other.md) [b](other.md#its-title-x) [c](#here) ![d](other.md) [e](https://example.org/x)"
    assert dead_links(page, good) == []
    bad = "[a](none.md) [b](other.md#none) [c](#none) ![d](none.svg) [e](https://x)"
    assert [line.split(":")[0] for line in dead_links(page, bad)] == [
        "none.md",
        "other.md#none",
        "#none",
        "none.svg",
        "https",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "mlx_rotor nosuch",
        "mlx_rotor generate --nosuch 1",
        "mlx_rotor quantize --dry-run --fit",
        "true && .venv/bin/python -m mlx_rotor.nosuch",
        "python -m mlx_rotor evaluate --windows many",
        "FLAG=1 pytest tests/nosuch",
        "python tests/nosuch.py > out",
    ],
)
def test_a_command_that_is_not_there_is_reported(line):
    for text in (f"```bash\n{line}  # why\n```\n", f"Type `{line}`."):
        if text.startswith("```") or line.startswith("mlx_rotor"):
            assert [c for c in commands(text) if refused_command(c)], text


def test_a_command_that_is_there_is_not_reported_and_not_run(tmp_path):
    out = tmp_path / "out"
    text = (
        f"```bash\nmlx_rotor quantize --out {out}  # makes it\npython -m mlx_rotor.demo --skip-evaluate | head\n```\n"
    )
    assert len(commands(text)) == 3
    assert [c for c in commands(text) if refused_command(c)] == [] and not out.exists()


def test_broken_python_is_reported():
    assert broken_python("import mlx_rotor\nfrom mlx_lm import generate\nmlx_rotor.load(None)") == []
    assert broken_python("def f(:") == ["1: invalid syntax"]
    for code in ("from mlx_rotor import nosuch", "import no_such_package", "from no.such import x", "mlx_rotor.nosuch"):
        assert len(broken_python(code)) == 1, code


def test_a_map_that_is_not_the_tree_is_reported(tmp_path):
    for name in ("mlx_rotor/codec/__init__.py", "mlx_rotor/errors.py", "docs/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    text = "```\nmlx_rotor/  the package\n  codec/     codes\n  errors.py  one error\ndocs/  words\n```\n"
    found = mapped(text)
    assert {parent: sorted(names) for parent, names in found.items()} == tree(tmp_path)
    assert folders(found["mlx_rotor"]) == ["codec"]
    assert mapped(text.replace("codec/", "other/"))["mlx_rotor"] != tree(tmp_path)["mlx_rotor"]
