"""Traffic and operations of the attention kernels, counted in the Metal simulator, beside MLX's own.

Bytes are those that lanes load and store in device memory, every access counted: a byte read twice counts twice.
Constant memory (shapes, strides, scalars, arrays of fewer than eight elements) is left out: a compiler reads it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_rotor import codec
from mlx_rotor.kernels import AttentionArgs, PackedSegment, PackedSide, metal
from mlx_rotor.kernels.attention import attend_metal
from mlx_rotor.kernels.packing import encode_metal

from .. import Buffer, Kernel, Options, mlx_source, run_file
from .throughput import DEVICES, predict

CONSTANT = ("_shape", "_strides", "_ndim")
DIM, KV_HEADS = 128, 8


@dataclass(frozen=True)
class Row:
    """One kernel at one size.

    `bytes_ratio` is bytes moved over `needed`, the bytes that must move: packed (or fp16) tokens, queries, output.
    `line_use`: 128-byte lines that had to be touched over lines touched. `operations`: kind -> how many a pair of
    packed elements, one of K and one of V, costs, idle lanes included. `predicted`: device -> seconds by the model of
    throughput.py, which is no measurement.
    """

    kernel: str
    codec: str
    tokens: int
    heads: int
    needed: int
    moved: int
    line_use: float
    launches: int
    operations: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_ratio(self) -> float:
        return self.moved / self.needed

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_ratio": self.bytes_ratio}


@dataclass
class Tally:
    """Sums over launches."""

    moved: int = 0
    lines: int = 0
    ideal_lines: int = 0
    launches: int = 0
    issued: Counter[str] = field(default_factory=Counter)

    def add(self, report: Any, constant: Iterable[str] = ()) -> None:
        skipped = set(constant)
        for name, traffic in report.buffers.items():
            if name not in skipped and not name.endswith(CONSTANT):
                self.moved += traffic.loaded + traffic.stored
        for access in report.accesses:
            if (
                access.buffer in report.buffers
                and access.buffer not in skipped
                and not access.buffer.endswith(CONSTANT)
            ):
                self.lines += access.lines
                self.ideal_lines += access.ideal_lines
        self.launches += 1

    @property
    def line_use(self) -> float:
        return self.ideal_lines / max(1, self.lines)


@contextmanager
def counted(mode: str) -> Iterator[Tally]:
    """Inside, kernels run in the simulator, mode "count" or "arithmetic", and are added up."""
    tally = Tally()

    def make(**text: Any) -> Callable[..., list[mx.array]]:
        kernel = Kernel(**text)

        def call(**launch: Any) -> list[mx.array]:
            result = kernel.run(**launch, options=Options(mode=mode, timeout=3600.0))
            sizes = zip(text["input_names"], launch["inputs"], strict=True)
            tally.add(result.report, [name for name, a in sizes if a.ndim == 0 or a.size < 8])
            tally.issued.update(result.report.issued)
            return list(result.outputs)

        return call

    metal.use_maker(make)
    try:
        yield tally
    finally:
        metal.use_maker(None)


def packed_side(name: str, heads: int, tokens: int, seed: int, span: int | None = None) -> PackedSide:
    """Tokens of random bits: what is in them does not change what is moved. With a span they have means."""
    rng = np.random.default_rng(seed)
    made = codec.get(name, DIM)
    words = rng.integers(0, 2**32, (1, heads, -(-tokens // 32), DIM * made.index_bits), dtype=np.uint32)
    scale = mx.array(rng.random((1, heads, words.shape[2] * 32)).astype(np.float16)) if made.scaled else None
    if span is None:
        return PackedSide(made, mx.array(words), scale)
    mean = rng.standard_normal((1, heads, -(-tokens // span) if span else 1, DIM)).astype(np.float16)
    return PackedSide(made, mx.array(words), scale, mx.array(mean), span)


def stored_bytes(side: PackedSide) -> int:
    return sum(a.nbytes for a in (side.tiles, side.scale, side.mean) if a is not None)


def decode(
    pair: tuple[str, str],
    tokens: int,
    *,
    heads: int = 32,
    kv_heads: int = KV_HEADS,
    model: bool = True,
    span: int | None = None,
    segments: int = 1,
) -> Row:
    """Decode attention of one fp16 query row over `tokens` packed ones in equal segments, all launches of it. With a
    span, K has a mean for every `span` tokens, V one for each segment."""
    means, each = (span, None if span is None else 0), tokens // segments
    bodies = [
        PackedSegment(
            each,
            *(
                packed_side(name, kv_heads, each, i, mean)
                for i, (name, mean) in enumerate(zip(pair, means, strict=True))
            ),
        )
        for _ in range(segments)
    ]
    q = mx.array(np.random.default_rng(2).standard_normal((1, heads, 1, DIM)).astype(np.float16))
    needed = sum(stored_bytes(side) for body in bodies for side in (body.k, body.v)) + 2 * q.nbytes
    with counted("count") as tally:
        attend_metal(q, None, bodies, None, AttentionArgs(scale=DIM**-0.5))
    row = Row("decode", "/".join(pair), tokens, heads, needed, tally.moved, tally.line_use, tally.launches)
    if not model:
        return row
    with counted("arithmetic") as operations:
        attend_metal(q, None, bodies, None, AttentionArgs(scale=DIM**-0.5))
    return _modelled(row, operations.issued, tally.moved, kv_heads)


def encode(name: str, tokens: int, *, kv_heads: int = KV_HEADS) -> Row:
    """Encoding of fp16 vectors."""
    made = codec.get(name, DIM)
    x = mx.array(np.random.default_rng(0).standard_normal((1, kv_heads, tokens, DIM)).astype(np.float16))
    with counted("count") as tally:
        tiles, scale = encode_metal(made, x)
    needed = sum(a.nbytes for a in (x, tiles, scale) if a is not None)
    return Row("encode", name, tokens, kv_heads, needed, tally.moved, tally.line_use, tally.launches)


def stock(tokens: int, *, heads: int = 32, kv_heads: int = KV_HEADS, model: bool = True) -> Row:
    """MLX's own `sdpa_vector` over fp16 keys and values, unchanged, from the wheel."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((1, h, n, DIM)).astype(np.float16)
        for h, n in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens))
    )
    steps = {name: np.array(n * DIM, np.uint64) for name, n in (("head", tokens), ("row", 1))}
    scalars: dict[str, np.ndarray] = {
        "gqa": np.array(heads // kv_heads, np.int32), "n": np.array(tokens, np.int32),
        "k_head": steps["head"], "k_row": steps["row"], "v_head": steps["head"], "v_row": steps["row"],
        "scale": np.array(DIM**-0.5, np.float32),
    }  # fmt: skip
    out = Buffer("out", np.zeros_like(q), writable=True, written=False)
    buffers = [Buffer("q", q), Buffer("k", k), Buffer("v", v), out]
    buffers += [Buffer(name, value) for name, value in scalars.items()]

    def run(mode: str) -> Any:
        return run_file(
            mlx_source("sdpa_vector.h"),
            "sdpa_vector",
            ["half", str(DIM), str(DIM)],
            [*buffers, *[None] * 7],
            (1024 * heads, 1, 1),
            (1024, 1, 1),
            constants={"do_causal": False},
            options=Options(mode=mode, timeout=3600.0),
        )[1]

    tally = Tally()
    tally.add(run("count"), scalars)
    needed = k.nbytes + v.nbytes + 2 * q.nbytes
    row = Row("sdpa_vector", "fp16", tokens, heads, needed, tally.moved, tally.line_use, 1)
    # Caches may spare it what several query heads read: the model gives it each byte once.
    return _modelled(row, run("arithmetic").issued, needed, kv_heads) if model else row


def _modelled(row: Row, issued: Mapping[str, int], moved: int, kv_heads: int) -> Row:
    pairs = row.tokens * kv_heads * DIM
    return replace(
        row,
        operations={kind: n / pairs for kind, n in sorted(issued.items())},
        predicted={name: predict(issued, moved, device).seconds for name, device in DEVICES.items()},
    )
