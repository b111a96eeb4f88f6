"""The checkpoint to be quantized: where it is, whether it holds what the plan expects, and its weights as float32.

FP8 checkpoints hold E4M3 codes with one float32 factor a block, as DeepSeek-V3 and MiniMax-M2 store their linears.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import RotorError
from ..inventory import FLOATS, listed, refuse_mxfp4
from ..plan import Entry, Plan
from ..safetensors_io import ITEMSIZE, TensorInfo, read_header, read_index

NAN = 0x7F  # the only non-finite magnitude of E4M3 (OCP FP8, "fn" variant); it has no infinities


def dequantize(codes: mx.array, scale_inv: mx.array, block: tuple[int, int], name: str = "weight") -> mx.array:
    """Weights [M, N] float32 from E4M3 `codes` [M, N] uint8 and `scale_inv` [ceil(M/bm), ceil(N/bn)] float32.

    Each block of `block` = (bm, bn) codes is multiplied by its factor; the last row and column of blocks may be cut
    short. `name` is for errors.

    Raises:
        RotorError: NaN codes or factors that are not finite, by `name`; factors whose shape doesn't fit.
    """
    (rows, cols), (bm, bn) = codes.shape, block
    expected = (-(-rows // bm), -(-cols // bn))
    if tuple(scale_inv.shape) != expected:
        raise RotorError(f"{name}: scales of shape {tuple(scale_inv.shape)}, blocks of {bm}x{bn} need {expected}")
    # Checked on the codes: not every backend's conversion turns them into NaN.
    bad = mx.any((codes & NAN) == NAN)
    if (bad | ~mx.all(mx.isfinite(scale_inv))).item():
        raise RotorError(f"{name}: holds NaN or infinite values; the source checkpoint is damaged")
    factors = mx.repeat(scale_inv.astype(mx.float32), bn, axis=1)[:, :cols]
    values = mx.from_fp8(codes, dtype=mx.float32)
    if rows % bm == 0:
        return (values.reshape(-1, bm, cols) * factors[:, None, :]).reshape(rows, cols)
    return values * mx.repeat(factors, bm, axis=0)[:rows]


INDEX = "model.safetensors.index.json"
FP8 = "F8_E4M3"
FACTORS = "_scale_inv"  # what the name of a tensor's block factors ends in
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)


def locate(model: str | Path, *, config_only: bool = False) -> Path:
    """The folder of a checkpoint: a local one, or a Hugging Face repository's snapshot, fetched where it isn't cached.

    `config_only`: of a repository, only config.json is fetched.

    Raises:
        RotorError: no such folder, or the repository can't be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise RotorError(f"{model} is a file; --model takes a checkpoint folder or a Hugging Face repository")
    if not is_repository(model):
        raise RotorError(
            f"no folder {model}; --model takes a checkpoint folder or a Hugging Face repository (org/name)"
        )
    import huggingface_hub

    try:
        if config_only:
            return Path(huggingface_hub.hf_hub_download(str(model), "config.json")).parent
        patterns = ["config.json", INDEX, "*.safetensors", *COMPANIONS]
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns))
    except Exception as e:  # hub, HTTP and connection errors share no base class
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise RotorError(f"no folder {model}, and no such Hugging Face repository could be fetched: {reason}") from e


def is_repository(model: str | Path) -> bool:
    """Whether `model` names a Hugging Face repository: it has the form org/name and is no local path."""
    return not Path(model).exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)) is not None


def has_weights(folder: Path) -> bool:
    """Whether there is any weight file in the folder: headers can be checked."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def companions(folder: Path) -> list[Path]:
    """Files a reader needs beside config and weights: tokenizer, chat template, generation defaults, licence."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read.

    Attributes:
        folder: with config.json, tokenizer and the like.
        tensors: by name.
        block: rows and columns that share a factor in FP8 tensors.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    block: tuple[int, int]

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: info.dtype for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> Checkpoint:
        """Reads every header, no weights.

        Raises:
            RotorError: no weights, a missing or damaged shard, a quantized source other than FP8 blocks.
        """
        refuse_mxfp4(config, {})
        return cls(folder, _headers(folder), block_of(config))

    def verify(self, plan: Plan) -> None:
        """Holds the headers against the plan; RotorError lists unknown or missing tensors, names one that differs."""
        expected: dict[str, tuple[int, ...]] = {}
        for entry in plan.entries:
            shape = entry.layout.shape if entry.layout else entry.source_shape
            for name in entry.sources:
                expected[name] = shape
                if len(shape) == 2 and name in self.tensors and self.tensors[name].dtype == FP8:
                    expected[f"{name}{FACTORS}"] = tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))
        unread = self.tensors.keys() - expected.keys()
        missing = expected.keys() - self.tensors.keys()
        # The factors of a missing tensor are known, though nothing says here that it should have them.
        unknown = {n for n in unread if not (plan.drops(base := n.removesuffix(FACTORS)) or base in missing)}
        for what, names in (("unknown", unknown), ("missing", missing)):
            if names:
                raise RotorError(
                    f"{self.folder}: {_listed(what, sorted(names))}; not a checkpoint of this architecture"
                )
        for name, shape in expected.items():
            info = self.tensors[name]
            if info.shape != shape:
                raise RotorError(
                    f"{self.folder}: {name} has shape {list(info.shape)}, config.json implies {list(shape)}"
                )
            allowed = {*FLOATS.values()} | ({FP8} if f"{name}{FACTORS}" in expected else set())
            if info.dtype not in allowed:
                raise RotorError(f"{self.folder}: {name} has dtype {info.dtype}, which can't be quantized from")

    def read(self, entry: Entry, part: int = 0, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows [start, stop) of one of an entry's parts (`part`: the expert) as float32, shape `entry.source_shape`
        but for the rows.

        Raises:
            RotorError: the tensor holds values that are not finite, or the file can't be read.
        """
        name, layout, said = entry.sources[part], entry.layout, entry.source(part)
        rows, *rest = entry.source_shape
        stop = rows if stop is None else stop
        if layout is None:
            return self._read(self.tensors[name], entry.source_shape, start, stop, said)
        if not rest:  # a vector: its one dimension is the tensor's rows
            return self._read(self.tensors[name], entry.source_shape, start, stop, said) + layout.plus
        columns, step = layout.columns
        first = part * layout.stride + layout.start
        if layout.turned:
            values = self._lines(name, first, first + (rest[0] - 1) * layout.step + 1, said)[:: layout.step]
            return values[:, columns + start * step : columns + stop * step : step].T
        lines = self._lines(name, first + start * layout.step, first + (stop - 1) * layout.step + 1, said)
        lines = lines[:: layout.step, columns : columns + prod(rest) * step : step].reshape(-1, *rest)
        return lines + layout.plus if layout.plus else lines

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows [start, stop) of a tensor's first dimension as float32.

        Raises:
            RotorError: the tensor holds values that are not finite, or the file can't be read.
        """
        info = self.tensors[name]
        return self._read(info, info.shape, start, info.shape[0] if stop is None else stop, name)

    def _lines(self, name: str, start: int, stop: int, said: str) -> mx.array:
        """Rows [start, stop) of a tensor seen as [rows, last dimension], as float32."""
        info = self.tensors[name]
        return self._read(info, (prod(info.shape[:-1]), info.shape[-1]), start, stop, said)

    def _read(self, info: TensorInfo, shape: tuple[int, ...], start: int, stop: int, said: str) -> mx.array:
        """Rows [start, stop) of a tensor seen as `shape`, as finite float32. `said`: its name in errors."""
        if info.dtype == FP8:
            block = self.block[0]
            first = start // block  # a block has one factor: what is read begins with one
            codes = _array(info, shape, first * block, stop)
            factors = self.tensors[f"{info.name}{FACTORS}"]
            values = dequantize(codes, _array(factors, factors.shape, first, -(-stop // block)), self.block, said)
            return values[start - first * block :]
        values = _array(info, shape, start, stop).astype(mx.float32)
        if not mx.all(mx.isfinite(values)).item():
            raise RotorError(f"{said}: holds NaN or infinite values; the source checkpoint is damaged")
        return values

    def source_bytes(self, entry: Entry) -> int:
        """Bytes of an entry's weights in the source, FP8 factors left out; of a tensor it shares, its share."""
        size = sum(ITEMSIZE[self.tensors[name].dtype] for name in entry.sources)
        return size * prod(entry.source_shape)


def _array(info: TensorInfo, shape: tuple[int, ...], start: int, stop: int) -> mx.array:
    """Rows [start, stop) of a tensor seen as `shape`; FP8 as its codes."""
    row = info.nbytes // shape[0]
    data = info.read(start * row, stop * row)
    part = (stop - start, *shape[1:])
    if info.dtype == "BF16":
        return mx.array(np.frombuffer(data, np.uint16).reshape(part)).view(mx.bfloat16)
    dtype = {"F32": np.float32, "F16": np.float16, FP8: np.uint8}[info.dtype]
    return mx.array(np.frombuffer(data, dtype).reshape(part))


def _headers(folder: Path) -> dict[str, TensorInfo]:
    names = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
    shards = sorted({folder / shard for shard in names.values()} or set(folder.glob("*.safetensors")))
    if not shards:
        raise RotorError(f"{folder}: no *.safetensors files; download the weights, or use --dry-run for sizes only")
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise RotorError(f"{folder}: {_listed('missing', absent, 'shard')}; download it again")
    return joined(folder, names, {shard.name: read_header(shard) for shard in shards})


def joined(
    where: Path | str, names: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all shards by name.

    Args:
        where: what to call the checkpoint in errors.
        names: tensor name -> shard, of the index; empty where there is none.
        headers: shard -> its tensors.

    Raises:
        RotorError: a tensor in two shards, or not in the one that the index names.
    """
    found: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.items():
            if name in found:
                raise RotorError(f"{where}: {name} is in both {found[name].path.name} and {shard}")
            found[name] = info
    astray = [name for name, shard in names.items() if name not in found or found[name].path.name != shard]
    if astray:
        raise RotorError(f"{where}: {_listed('missing', astray)} in the shard that {INDEX} names")
    return found


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) that share a factor in an FP8 source. RotorError for a source that is quantized otherwise."""
    if config.get("quantization"):
        raise RotorError("the source is already quantized for MLX; start from the original checkpoint")
    stated = config.get("quantization_config") or {}
    method, block = stated.get("quant_method", "fp8"), stated.get("weight_block_size", [128, 128])
    if method != "fp8":
        raise RotorError(f"the source is quantized with {method!r}; only FP8 blocks and float checkpoints can be read")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise RotorError(f"config.json: weight_block_size must be two positive integers, found {block!r}")
    return block[0], block[1]


def _listed(what: str, names: list[str], noun: str = "tensor") -> str:
    """`missing tensors: a, b, c and 5 more`."""
    return f"{what} {noun}{'s' * (len(names) > 1)}: {listed(names)}"
