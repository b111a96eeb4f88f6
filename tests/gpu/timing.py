"""One decode step over packed tokens against PyTorch's attention over fp16 ones, on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from .cuda import Launch

LENGTHS = (2048, 8192, 32768, 131072)
KV_HEADS, HEADS, DIM = 8, 48, 128
PAIRS = (("turbo4", "turbo4"), ("turbo4", "turbo2"), ("trellis4", "trellis3"), ("trellis3", "trellis2"))
ENCODED = 1024  # tokens, which the rest repeats


def launches(pair: tuple[str, str], tokens: int, arch: str) -> list[Launch]:
    """The launches of one step: fp16 queries, 4 sinks and 128 recent tokens in fp16, `tokens` packed by `pair`."""
    import mlx.core as mx

    from mlx_rotor import codec
    from mlx_rotor.kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, metal
    from mlx_rotor.kernels.attention import attend_metal
    from mlx_rotor.kernels.packing import encode_reference

    from .launch import Recorder

    def random(*shape: int) -> Any:
        return mx.random.normal(shape, key=mx.random.key(len(pair[0]) + shape[-2])).astype(mx.float16)

    sides = []
    for name in pair:
        made = codec.get(name, DIM)
        tiles, scale = encode_reference(made, random(1, KV_HEADS, ENCODED, DIM))
        again = tokens // ENCODED
        sides.append(PackedSide(made, mx.tile(tiles, (1, 1, again, 1)), mx.tile(scale, (1, 1, again))))
    exact = [ExactSegment(random(1, KV_HEADS, n, DIM), random(1, KV_HEADS, n, DIM)) for n in (4, 128)]
    recorder = Recorder(arch, simulate=False)
    metal.use_maker(recorder)
    try:
        body = PackedSegment(tokens, *sides)
        mx.eval(attend_metal(random(1, HEADS, 1, DIM), exact[0], [body], exact[1], AttentionArgs(scale=DIM**-0.5)))
    finally:
        metal.use_maker(None)
    return recorder.launches


def torch_seconds(tokens: int, copies: int = 20, repeats: int = 15) -> float:
    """PyTorch's own fp16 attention of one query over `tokens`, measured as `cuda.seconds` does."""
    import torch

    q, k, v = (
        torch.randn(1, heads, n, DIM, device="cuda", dtype=torch.float16)
        for heads, n in ((HEADS, 1), (KV_HEADS, tokens), (KV_HEADS, tokens))
    )

    def step() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return _graph_seconds(torch, step, copies, repeats)


def _graph_seconds(torch: Any, step: Callable[[], None], copies: int, repeats: int) -> float:
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # a graph's work has to have run before, beside the stream that is captured
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            step()
    taken = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken[3:]) / copies


def torch_bytes(tokens: int) -> int:
    """Bytes of K and V in fp16."""
    return 2 * KV_HEADS * tokens * DIM * 2
