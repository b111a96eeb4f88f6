"""The loader of Metal sources: includes, errors, digests, and the folder's own table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.kernels import metal


@pytest.fixture
def folder(tmp_path: Path):
    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_h", ".h")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_includes_are_inlined_once_and_in_order(folder):
    root = folder(
        top_h='#include <metal_stdlib>\n#include "a/left.h"\n#include "a/right.h"\nint top;\n',
        a__left_h='#include "../base.h"\nint left;\n',
        a__right_h='  #  include "../base.h"  // again\nint right;\n',
        base_h="int base;\n",
    )
    loaded = metal.load("top.h", root)
    assert re.findall(r"int (\w+);", loaded.text) == ["base", "left", "right", "top"]
    assert loaded.files == ("base.h", "a/left.h", "a/right.h", "top.h")
    assert "#include <metal_stdlib>\n" in loaded.text
    assert 'include "' not in loaded.text


def test_a_commented_include_stays(folder):
    loaded = metal.load("top.h", folder(top_h='// #include "gone.h"\nint top;\n'))
    assert loaded.files == ("top.h",)


def test_the_digest_follows_the_content_of_every_file(tmp_path):
    digests = set()
    for i, (top, base) in enumerate([("int a;", "int b;"), ("int a;", "int c;"), ("int d;", "int b;")]):
        root = tmp_path / str(i)
        root.mkdir()
        (root / "top.h").write_text(f'#include "base.h"\n{top}\n')
        (root / "base.h").write_text(f"{base}\n")
        digests.add(metal.load("top.h", root).digest)
    assert len(digests) == 3
    copy = tmp_path / "copy"
    (tmp_path / "0").rename(copy)
    assert metal.load("top.h", copy).digest in digests


@pytest.mark.parametrize(
    ("include", "says"),
    [
        ("gone.h", r"kernels_metal/a/top\.h:2: no Metal source a/gone\.h in "),
        ("../../secret.h", r"kernels_metal/a/top\.h:2: \.\./secret\.h lies outside kernels_metal"),
        ("/etc/secret.h", r"kernels_metal/a/top\.h:2: /etc/secret\.h lies outside kernels_metal"),
        ("top.h", r"kernels_metal/a/top\.h:2: include cycle: a/top\.h -> a/top\.h"),
        ("../back.h", r"kernels_metal/back\.h:1: include cycle: a/top\.h -> back\.h -> a/top\.h"),
    ],
)
def test_a_bad_include_is_an_error_with_file_and_line(folder, include, says):
    root = folder(a__top_h=f'int top;\n#include "{include}"\n', back_h='#include "a/top.h"\n')
    with pytest.raises(RotorError, match=says):
        metal.load("a/top.h", root)


def test_a_missing_source_and_a_missing_folder_are_named(folder, tmp_path):
    with pytest.raises(RotorError, match=r"no Metal source common/gone\.h in "):
        metal.load("common/gone.h", folder(top_h=""))
    with pytest.raises(RotorError, match=r"no folder .*one or .*two; reinstall"):
        metal.find_root([tmp_path / "one", tmp_path / "two"])


def test_the_first_folder_that_exists_wins(tmp_path):
    packaged, tree = tmp_path / "packaged", tmp_path / "tree"
    tree.mkdir()
    assert metal.find_root([packaged, tree]) == tree
    packaged.mkdir()
    assert metal.find_root([packaged, tree]) == packaged


def test_every_shipped_file_loads_and_has_its_own_guard():
    names = metal.names()
    assert "attention/decode.h" in names
    for name in names:
        loaded = metal.load(name)
        assert loaded.files[-1] == name
        guard = "MLX_ROTOR_" + re.sub(r"\W", "_", name).upper()
        if name.endswith(".h"):
            assert loaded.text.count(f"#ifndef {guard}\n#define {guard}\n") == 1, name


def test_the_readme_has_one_row_for_each_file():
    text = (metal.root() / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) == list(metal.names())
