import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_rotor.errors import RotorError
from mlx_rotor.files import write_json
from mlx_rotor.quant.safetensors_io import ShardWriter, read_header


@dataclass(frozen=True)
class Shape:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write(path: Path, table: object, data: bytes = b"", length: int | None = None) -> Path:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_reads_what_the_reference_implementation_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(5, 7)).astype(np.float32), "b.c": rng.integers(0, 99, (3,)).astype(np.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert header["a"].shape == (5, 7) and header["a"].dtype == "F32" and header["b.c"].dtype == "U8"
    for name, values in tensors.items():
        assert header[name].read() == values.tobytes()
    assert header["a"].read(28, 56) == tensors["a"][1:2].tobytes()


def test_a_file_filled_in_any_order_is_read_by_mlx_and_the_reference_implementation(tmp_path):
    a, b = np.arange(24, dtype=np.uint32).reshape(2, 3, 4), np.linspace(0, 1, 5, dtype=np.float32)
    path = tmp_path / "y.safetensors"
    writer = ShardWriter(path, [Shape("a", "U32", a.shape, a.nbytes), Shape("b", "F32", b.shape, b.nbytes)])
    writer.write("b", 8, b[2:].tobytes())
    writer.write("a", 48, a[1].tobytes())
    writer.write("a", 0, a[0].tobytes())
    assert not path.exists() and writer.temporary.exists()
    writer.write("b", 0, b[:2].tobytes())
    writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["y.safetensors"]
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    np.testing.assert_array_equal(np.array(loaded["a"]), a)
    np.testing.assert_array_equal(load_file(path)["b"], b)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_an_incomplete_file_never_gets_its_name(tmp_path):
    writer = ShardWriter(tmp_path / "z.safetensors", [Shape("a", "U8", (4,), 4)])
    writer.write("a", 0, b"123")
    with pytest.raises(RotorError, match=r"z\.safetensors: a was not written completely"):
        writer.finish()
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["z.safetensors.tmp"]


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        ({"a": entry(0, 8, [8])}, b"1234567", "truncated, 7. bytes of 7.; download it again"),
        ({"a": entry(0, 4, [4])}, b"123456", "2 bytes after the last tensor"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"123456", "b overlaps a tensor or leaves a gap"),
        ({"a": entry(0, 4, [4]), "b": entry(6, 8, [2])}, b"12345678", "b overlaps a tensor or leaves a gap"),
        ({"a": entry(0, 4, [5])}, b"1234", "a takes 4 bytes, its shape needs 5"),
        ({"a": entry(0, 4, [4], "F4")}, b"1234", "a has dtype F4, which is not supported"),
        ({"a": entry(0, 4, [-4])}, b"1234", "no sensible shape"),
        ({"a": entry(-4, 0, [4])}, b"1234", "no sensible shape"),
        ({"a": {"dtype": "U8"}}, b"", "damaged safetensors header"),
        ({"a": 3}, b"", "damaged safetensors header"),
        ([], b"", "damaged safetensors header"),
        (b"{'a': 1}", b"", "damaged safetensors header"),
        (b"\xff\xfe", b"", "damaged safetensors header"),
    ],
)
def test_damage_is_an_error_that_names_the_file(tmp_path, table, data, message):
    with pytest.raises(RotorError, match=rf"bad\.safetensors: .*{message}"):
        read_header(write(tmp_path / "bad.safetensors", table, data))


def test_a_header_longer_than_its_file_is_an_error(tmp_path):
    with pytest.raises(RotorError, match="truncated inside its header"):
        read_header(write(tmp_path / "bad.safetensors", {}, length=50))
    with pytest.raises(RotorError, match="not a safetensors file"):
        read_header(write(tmp_path / "bad.safetensors", b"version https://git-lfs", length=2**60))
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    with pytest.raises(RotorError, match="not a safetensors file"):
        read_header(tmp_path / "bad.safetensors")


def test_a_file_that_shrank_after_its_header_was_read_is_an_error(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 100, [100])}, b"x" * 100)
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RotorError, match="file ends inside a"):
        info.read()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"x": object()})
    assert not (tmp_path / "b.json").exists()
