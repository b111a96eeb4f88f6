"""Files are written whole or not at all."""

import os

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.files import replacing, write_bytes, write_json, write_text, writing


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(KeyboardInterrupt), writing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nobody wrote the temporary file
    assert path.read_text() == '{\n  "x": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]


def test_a_link_in_the_temporary_files_place_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "a.tmp").symlink_to(tmp_path / "other")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "other").read_text() == "kept" and (tmp_path / "a").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a", "other"]


def test_a_file_that_a_user_named_is_an_error_in_words(tmp_path):
    with pytest.raises(RotorError, match=r"gone/a\.md: No such file or directory; give a file in a folder"):
        write_text(tmp_path / "gone" / "a.md", "text")
