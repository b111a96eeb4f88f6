"""The texts: what is bundled is apart from what the bundled model was trained on, and the user's are read."""

import re
import sysconfig
from pathlib import Path

import pytest

from mlx_rotor import bundled as data
from mlx_rotor.errors import RotorError
from mlx_rotor.quality.sample import bundled, domains

RUN = 10  # words


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text):
    found = words(text)
    return {tuple(found[i : i + RUN]) for i in range(len(found) - RUN + 1)}


def test_two_domains_are_bundled():
    code, prose = domains()
    assert (code.name, prose.name) == ("code", "prose") and domains() == bundled()
    assert len(prose.text) > 100_000 and code.digest != prose.digest
    assert sum(line.startswith(("import ", "def ", "    return")) for line in prose.text.splitlines()) == 0
    assert (data.MODEL.parent / "held_out_prose.txt.gz").stat().st_size < 100_000
    listed = (data.MODEL.parent / "held_out_prose.txt").read_text().split()
    assert len(listed) > 5 and all(name.startswith("Doc/") and name.endswith(".rst") for name in listed)


def test_the_prose_is_not_in_the_training_text():
    """The standard library of whatever Python runs this, less the help texts' own reference manual."""
    prose = runs(bundled()[1].text)
    assert not prose & runs(bundled()[0].text)
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for file in [root / "pydoc_data" / "topics.py", *sorted(root.glob("*.py"))[::4]]:
        if shared := prose & runs(file.read_text("utf-8", "ignore")):
            found[file.name] = " ".join(next(iter(shared)))
    assert not found
    assert prose & runs(bundled()[1].text[5000:9000])  # the search does find what is there


def test_texts_of_the_user(tmp_path):
    (tmp_path / "law.txt").write_text("whereas")
    (tmp_path / "b=c.txt").write_text("odd name")
    found = domains([f"legal={tmp_path / 'law.txt'}", str(tmp_path / "law.txt"), str(tmp_path / "b=c.txt")])
    assert [(d.name, d.text, d.what) for d in found] == [
        ("legal", "whereas", "law.txt"),
        ("law", "whereas", "law.txt"),
        ("b=c", "odd name", "b=c.txt"),
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["law.txt"], "No such file|NAME=FILE"),
        (["x=none.txt"], "No such file"),
        (["x=binary.txt"], "not UTF-8"),
        (["x=law.txt", "x=law.txt"], "two texts are called 'x'"),
    ],
)
def test_mistakes_are_named(given, says, tmp_path, monkeypatch):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    if len(given) == 2:
        (tmp_path / "law.txt").write_text("whereas")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RotorError, match=says):
        domains(given)
