"""The choice of compilers, and the error where there is none."""

from __future__ import annotations

import importlib.util

import pytest

from . import Kernel, ToolsMissing, tools


@pytest.fixture
def fresh(monkeypatch):
    """Nothing remembered, nothing named, nothing on the path."""
    for name in ("METAL_SIM_CLANG", "METAL_SIM_CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    looked_up = (tools.clang, tools.cxx, tools.identity)
    for function in looked_up:
        function.cache_clear()
    yield monkeypatch
    for function in looked_up:
        function.cache_clear()


def without_ziglang(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else find(name))


def test_without_a_compiler_it_says_what_to_install(fresh):
    import mlx.core as mx

    without_ziglang(fresh)
    kernel = Kernel("k", ["a"], ["o"], "o[0] = a[0];")
    with pytest.raises(ToolsMissing, match=r"pip install ziglang .*or apt-get install clang-19"):
        kernel([mx.zeros(8)], [(1,)], [mx.float32], (1, 1, 1), (1, 1, 1))
    with pytest.raises(ToolsMissing, match=r"a C\+\+ compiler and finds none: pip install ziglang"):
        tools.cxx()


def test_without_a_system_compiler_ziglang_is_taken(fresh):
    assert tools.clang()[0].endswith("/ziglang/zig")
    assert tools.clang()[1:] == ("clang",)
    assert tools.cxx()[1:] == ("c++",)


def test_an_old_clang_is_passed_over(fresh, tmp_path):
    without_ziglang(fresh)
    for name, version in (("clang", 14), ("clang-19", 19)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'Debian clang version {version}.0.6'\n")
        (tmp_path / name).chmod(0o755)
    fresh.setenv("PATH", str(tmp_path))
    assert tools.clang() == (str(tmp_path / "clang-19"),)
    (tmp_path / "clang-19").unlink()
    tools.clang.cache_clear()
    with pytest.raises(ToolsMissing):
        tools.clang()


def test_a_named_compiler_is_taken(fresh):
    fresh.setenv("METAL_SIM_CLANG", "python -m ziglang clang")
    assert tools.clang() == ("python", "-m", "ziglang", "clang")
