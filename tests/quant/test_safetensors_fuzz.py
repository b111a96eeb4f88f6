"""Damaged safetensors headers and indexes: each an error that says so, or the same tensors; never anything else."""

import json
import random
import time
import tracemalloc

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quant.safetensors_io import read_header, read_index
from mlx_rotor.quant.source import INDEX, Checkpoint

MUTANTS = 500
INDEX_MUTANTS = 300
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    "",
    "F32",
    "U8",
    "\ud800",
    [],
    [1],
    [[]],
    {},
]
TENSORS = {
    "a": ("F32", [4, 6]),
    "b.weight": ("BF16", [3, 5]),
    "c": ("F8_E4M3", [128]),
    "d": ("I64", []),
    "e": ("U8", [0]),
}
WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}


def valid():
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in TENSORS.items():
        size = WIDTH[dtype]
        for n in shape:
            size *= n
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + bytes(i % 251 for i in range(end))


def anywhere(value, rng):
    """A random container in parsed JSON, and a key of it."""
    spots = []

    def walk(node):
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            spots.append((node, key))
            walk(node[key])

    walk(value)
    return rng.choice(spots)


def altered(text, rng):
    """JSON with one value replaced, removed, renamed or doubled."""
    table = json.loads(text)
    node, key = anywhere(table, rng)
    match rng.randrange(5):
        case 0:
            node[key] = rng.choice(VALUES)
        case 1:
            del node[key]
        case 2 if isinstance(node, dict):
            node[rng.choice(["", "x", "a", "shape", "dtype"])] = node.pop(key)
        case 3 if isinstance(node, list):
            node.append(node[key])
        case _:
            if isinstance(node[key], int):
                node[key] += rng.choice([-1, 1, 7, 2**40])
            else:
                node[key] = [node[key]]
    return json.dumps(table).encode()


def flipped(data, rng, count):
    data = bytearray(data)
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutant(data, rng):
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(8):
        case 0:  # bits anywhere before the tensors
            return flipped(data[: 8 + length], rng, rng.randint(1, 4)) + body
        case 1:
            return flipped(data[:8], rng, 1) + data[8:]
        case 2:
            return (
                rng.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
                + data[8:]
            )
        case 3:  # cut in the length, the header, the tensors
            return data[
                : rng.choice([rng.randrange(9), 8 + rng.randrange(length), 8 + length + rng.randrange(len(body))])
            ]
        case 4:
            return data + bytes(rng.randint(1, 64))
        case 5:
            deep = rng.choice(
                [b"[", b'{"a":', b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b'"', b"\xff", b"{}", b"null"]
            )
            return len(deep).to_bytes(8, "little") + deep + body
        case _:
            new = altered(header, rng)
            return len(new).to_bytes(8, "little") + new + body


def tensors(found):
    return {name: (info.dtype, list(info.shape), info.start) for name, info in found.items()}


def test_damaged_headers_are_errors_or_say_what_the_whole_ones_said(tmp_path):
    rng, path, data = random.Random(11), tmp_path / "model.safetensors", valid()
    path.write_bytes(data)
    truth = tensors(read_header(path))
    assert truth.keys() == TENSORS.keys()
    refused = other = 0
    tracemalloc.start()
    started = time.process_time()
    for number in range(MUTANTS):
        path.write_bytes(mutant(data, rng))
        try:
            found = read_header(path)
        except RotorError as e:
            assert "model.safetensors" in str(e)
            refused += 1
            continue
        # What no reader can tell from a file that was meant so: a renamed tensor, or a dtype or shape of equal size.
        size = path.stat().st_size
        assert all(info.start + info.nbytes <= size for info in found.values()), number
        assert sum(info.nbytes for info in found.values()) + 8 + header_length(path) == size, number
        other += tensors(found) != truth
        for info in found.values():
            assert len(info.read()) == info.nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 0.7 * MUTANTS and other < 0.15 * MUTANTS
    assert peak < 50e6 and time.process_time() - started < 20


def header_length(path):
    return int.from_bytes(path.read_bytes()[:8], "little")


def test_damaged_indexes_are_errors_or_name_the_same_files(tmp_path):
    rng, path = random.Random(12), tmp_path / INDEX
    (tmp_path / "model.safetensors").write_bytes(valid())
    data = json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    ).encode()
    refused = 0
    for _ in range(INDEX_MUTANTS):
        match rng.randrange(4):
            case 0:
                path.write_bytes(flipped(data, rng, rng.randint(1, 3)))
            case 1:
                path.write_bytes(data[: rng.randrange(len(data))])
            case 2:
                path.write_bytes(
                    rng.choice([b"[" * 100_000, b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": []}', b"\xff"])
                )
            case _:
                path.write_bytes(altered(data, rng))
        try:
            found = Checkpoint.open(tmp_path, {}).tensors
        except RotorError as e:
            assert str(tmp_path) in str(e)
            refused += 1
            continue
        assert found.keys() == TENSORS.keys()
    assert refused > 0.5 * INDEX_MUTANTS


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", ".", "x" * 300, "a\0b", 3]
)
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(RotorError, match="no file name"):
        read_index(tmp_path / INDEX)
