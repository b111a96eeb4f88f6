"""README and docs: tables are whole, links alive, commands parse, Python compiles, and the maps are the tree."""

import re

import pytest

from page_checks import (
    ROOT,
    broken_python,
    broken_tables,
    commands,
    dead_links,
    fences,
    folders,
    mapped,
    missing_files,
    refused_command,
    tokens,
    tree,
    unknown_flags,
)
from test_layout import ORDER

INDEX = ROOT / "docs/results/README.md"
RESULTS = sorted(set((ROOT / "docs/results").glob("*.md")) - {INDEX})
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
PAGES += [INDEX, *RESULTS, *(ROOT / f / "README.md" for f in ("kernels_metal", "tests/metal_sim"))]
OLD_NAMES = {"CHANGELOG.md"}  # pages that may name flags which are no longer there
README_LINES = 150
TEST_MARKER = "<!-- test-command -->"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_whole(page):
    text = page.read_text(encoding="utf-8")
    assert not broken_tables(text)
    assert not dead_links(page, text)
    assert not [why for command in commands(text) if (why := refused_command(command))]
    assert not missing_files(page, text)
    assert page.name in OLD_NAMES or not unknown_flags(text)
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
    title, block, *rest = [t for t in tokens(page.read_text(encoding="utf-8")) if t.type in ("inline", "fence")]
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


def test_a_file_that_is_not_there_is_reported():
    assert missing_files(INDEX, "`mlx_rotor/codec/`, `codec/base.py`, `docs/experts.md`, `a/b`") == []
    assert missing_files(INDEX, "`mlx_rotor/nosuch/`, `codec/nosuch.py`") == ["codec/nosuch.py", "mlx_rotor/nosuch/"]


def test_a_flag_that_no_command_has_is_reported():
    text = "`--kv exact`, `--dry-run`, `--json-out`, `--nosuch 3`, and `mlx_rotor --nosuch`"
    assert unknown_flags(text) == ["--nosuch"]


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
