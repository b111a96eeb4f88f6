"""Calibrated schemes as files: what is written is read, whole, and what is no scheme is refused with a reason."""

import json

import pytest

from mlx_rotor.cache import scheme_file
from mlx_rotor.cache.scheme_file import Sidecar
from mlx_rotor.errors import RotorError

LAYERS = (("fp8:0.031", "fp8:0.02"), ("trellis4", "turbo2"))
GOOD = {
    "format": "mlx_rotor kv scheme",
    "version": 1,
    "name": "mine",
    "layers": [{"k": "turbo3", "v": "turbo2"}],
}


@pytest.mark.parametrize(
    "given",
    [
        Sidecar("fp8", LAYERS),
        Sidecar("calibrated-3", LAYERS, sinks=0, ring=64, model="abc", made={"text": "x", "bits": 3.0}),
    ],
)
def test_what_is_written_is_read(tmp_path, given):
    scheme_file.write(tmp_path / "s.json", given)
    assert scheme_file.read(tmp_path / "s.json") == given
    assert [f.name for f in tmp_path.iterdir()] == ["s.json"]


def test_a_file_made_by_hand(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(GOOD))
    assert scheme_file.read(str(tmp_path / "s.json")) == Sidecar("mine", (("turbo3", "turbo2"),))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "something"}, "no KV scheme"),
        ({"version": 2}, "version 2, this mlx_rotor reads 1"),
        ({"colour": "red"}, "unknown fields colour"),
        ({"name": ""}, "its name is ''"),
        ({"name": 3}, "name and model must be strings"),
        ({"layers": []}, "0 layers"),
        ({"layers": {"k": "turbo3"}}, "must be a list"),
        ({"layers": [{"k": "turbo3"}]}, "layer 0: must be"),
        ({"layers": [{"k": "turbo3", "v": 2}]}, "layer 0: must be"),
        ({"layers": [*GOOD["layers"], {"k": "turbo9", "v": "turbo2"}]}, "layer 1: unknown codec 'turbo9'"),
        ({"layers": [{"k": "turbo2", "v": "turbo3"}]}, "layer 0: k=turbo2,v=turbo3 gives K fewer bits"),
        ({"layers": [{"k": "fp8:-1.0", "v": "turbo3"}]}, "layer 0: codec 'fp8:-1.0'"),
        ({"layers": [{"k": "fp8:nan", "v": "turbo3"}]}, "layer 0: codec 'fp8:nan'"),
        ({"layers": [{"k": "turbo3:2.0", "v": "turbo3"}]}, "takes no parameter"),
        ({"sinks": -1}, "its sinks is -1"),
        ({"ring": 1.5}, "its ring is 1.5"),
        ({"ring": True}, "its ring is True"),
    ],
)
def test_what_is_no_scheme(tmp_path, change, says):
    (tmp_path / "s.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(RotorError) as e:
        scheme_file.read(tmp_path / "s.json")
    assert says in str(e.value) and "s.json" in str(e.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"format": "mlx_rotor kv scheme"', "[" * 100_000, "\x00"])
def test_what_is_no_json(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(RotorError, match=r"s\.json: (not a JSON file|no KV scheme)"):
        scheme_file.read(tmp_path / "s.json")
    with pytest.raises(RotorError, match="No such file"):
        scheme_file.read(tmp_path / "none.json")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "s.json"
    scheme_file.write(file, Sidecar("one", LAYERS))
    before = file.read_bytes()
    with pytest.raises(RotorError, match="K never has fewer"):
        scheme_file.write(file, Sidecar("two", (("turbo2", "turbo4"),)))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RotorError, match="No space left on device"):
        scheme_file.write(file, Sidecar("three", LAYERS))
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["s.json"]
    with pytest.raises(RotorError, match="No such file"):
        scheme_file.write(tmp_path / "none" / "s.json", Sidecar("four", LAYERS))
