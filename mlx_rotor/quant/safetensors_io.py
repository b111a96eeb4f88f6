"""Safetensors files by hand: headers alone, ranged reads, and files whose header is known before their contents.

Format: little-endian u64 header length, JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without gaps (https://github.com/huggingface/safetensors). mx.load and the safetensors package read whole tensors
and write from memory; a job that never holds more than one expert needs pieces of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from ..errors import RotorError
from ..files import sync_folder

ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
MAX_HEADER = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` is its first byte's offset in `path`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of the tensor; RotorError if the file ends before them or can't be read."""
        stop = self.nbytes if stop is None else stop
        parts: list[bytes] = []
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                while start < stop:
                    # One call reads at most 2 GiB on Linux and fails outright above that on macOS.
                    part = os.pread(fd, min(stop - start, 1 << 30), self.start + start)
                    if not part:
                        raise RotorError(f"{self.path}: file ends inside {self.name}; download it again")
                    parts.append(part)
                    start += len(part)
            finally:
                os.close(fd)
        except OSError as e:
            raise RotorError(f"{self.path}: {e.strerror}") from e
        return parts[0] if len(parts) == 1 else b"".join(parts)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, by name, its place checked against the file's length.

    Raises:
        RotorError: truncated file, a header that isn't one, tensors that overlap, leave gaps or don't fit their shape.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER:
                raise RotorError(f"{path}: not a safetensors file")
            if 8 + length > size:
                raise RotorError(f"{path}: truncated inside its header ({size:,} bytes); download it again")
            text = file.read(length)
    except OSError as e:
        raise RotorError(f"{path}: {e.strerror}") from e
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RotorError(f"{path}: damaged safetensors header ({e})") from e
    return tensors_of(table, path, 8 + length, size)


def tensors_of(table: Any, path: Path, start: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor that a parsed header names, its place checked against a file of `size` bytes.

    Args:
        start: offset of the first byte behind the header.

    Raises:
        RotorError: as `read_header`.
    """
    try:
        items = [(str(name), item) for name, item in table.items() if name != "__metadata__"]
        found = {name: _info(name, item, path, start) for name, item in items}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise RotorError(f"{path}: damaged safetensors header ({e})") from e
    end = start
    for info in sorted(found.values(), key=lambda info: (info.start, info.nbytes)):
        if info.start != end:
            raise RotorError(f"{path}: damaged safetensors header ({info.name} overlaps a tensor or leaves a gap)")
        end += info.nbytes
    if end > size:
        raise RotorError(f"{path}: truncated, {size:,} bytes of {end:,}; download it again")
    if end < size:
        raise RotorError(f"{path}: {size - end:,} bytes after the last tensor; download it again")
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from a model.safetensors.index.json.

    Raises:
        RotorError: not such a file, or one that names files outside its folder.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise RotorError(f"{path}: not a safetensors index: {e}") from e
    if not isinstance(names, dict):
        raise RotorError(f"{path}: not a safetensors index: weight_map is no object")
    for name, file in names.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w .+=@-]{1,250}", file) or not file.strip(" ."):
            raise RotorError(f"{path}: not a safetensors index: {name} is in {file!r:.100}, which is no file name")
    return names


def _info(name: str, item: Any, path: Path, base: int) -> TensorInfo:
    dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    if dtype not in ITEMSIZE:
        raise ValueError(f"{name} has dtype {dtype}, which is not supported")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has no sensible shape and offsets")
    info = TensorInfo(name, path, dtype, shape, base + start)
    if stop - start != info.nbytes:
        raise ValueError(f"{name} takes {stop - start} bytes, its shape needs {info.nbytes}")
    return info


class Sized(Protocol):
    """What the writer must know of a tensor before it is there."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def header_bytes(tensors: Iterable[Sized]) -> bytes:
    """Length field and header of a file that holds `tensors` in this order, padded to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for tensor in tensors:
        span = [end, end + tensor.nbytes]
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        end += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """A safetensors file filled in place, in any order and from any thread, under `<path>.tmp` until `finish`.

    `resume`: takes up the file an earlier writer left under either name. Its contents stay; what of them is right is
    the caller's to find out (`read`) and to say (`keep`).
    """

    def __init__(self, path: Path, tensors: Iterable[Sized], *, resume: bool = False) -> None:
        tensors = list(tensors)
        header = header_bytes(tensors)
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self._lock = Lock()
        self._start: dict[str, int] = {}
        self._size: dict[str, int] = {}
        self._left: dict[str, int] = {}
        end = len(header)
        for tensor in tensors:
            self._start[tensor.name], self._size[tensor.name] = end, tensor.nbytes
            self._left[tensor.name] = tensor.nbytes
            end += tensor.nbytes
        if resume and path.exists():
            path.replace(self.temporary)
        self._fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL), 0o644)
        os.ftruncate(self._fd, end)
        self._pwrite(header, 0)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Puts `data` at byte `offset` of tensor `name`. Each byte is to be written once. OSError as pwrite."""
        if offset + len(data) > self._size[name]:
            raise RotorError(f"{self.path}: {len(data)} bytes at {offset} leave {name}")
        self._pwrite(data, self._start[name] + offset)
        with self._lock:
            self._left[name] -= len(data)

    def keep(self, name: str) -> None:
        """Counts a tensor as written completely."""
        with self._lock:
            self._left[name] = 0

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of tensor `name` as they are now."""
        parts: list[bytes] = []
        while start < stop:
            part = os.pread(self._fd, min(stop - start, 1 << 30), self._start[name] + start)
            if not part:
                break
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def sync(self) -> None:
        """Makes what was written durable."""
        os.fsync(self._fd)

    def seal(self) -> str:
        """Makes the whole file durable; its sha256. RotorError if a tensor isn't complete."""
        wrong = [name for name, left in self._left.items() if left]
        if wrong:
            raise RotorError(f"{self.path}: {wrong[0]} was not written completely")
        os.fsync(self._fd)
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(self._fd, 1 << 18, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()

    def publish(self) -> None:
        """Gives a sealed file its name."""
        self.close()
        self.temporary.replace(self.path)
        sync_folder(self.path.parent)

    def finish(self) -> str:
        """Seals and publishes; the file's sha256."""
        digest = self.seal()
        self.publish()
        return digest

    def close(self) -> None:
        """Lets go of the file; unfinished, it stays under its temporary name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view[: 1 << 30], offset)
            view, offset = view[done:], offset + done
