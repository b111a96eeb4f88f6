"""Shared by the kernels' tests: running them in the simulator or on a Mac's GPU, problems at random, mutations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_sim import SUPPORTED, UNSUPPORTED, CompileError, Kernel, KernelError, Options, Report
from mlx_rotor import codec
from mlx_rotor.kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, metal, reference
from mlx_rotor.kernels.attention import attend_metal
from mlx_rotor.kernels.packing import encode_reference
from mlx_rotor.kernels.segments import spread

DIMS = (64, 80, 96, 128, 192, 256)
NAMES = [name for name in codec.names() if codec.get(name, 128).kernel is not None]
FAMILIES = sorted({name[:-1] for name in NAMES if name[-1] in "234"})
# Codecs of the schemes that have a name: a family's own, K never below V.
PAIRS = [(f"{f}{k}", f"{f}{v}") for f in FAMILIES for k in (2, 3, 4) for v in (2, 3, 4) if k >= v]
MIXED = [("trellis4", "turbo2"), ("turbo4", "trellis3"), ("iso3", "turbo2"), ("trellis3", "planar3")]
SCHEDULES = [Options(), Options(order="reverse", flush_denormals=True), Options(order="random", seed=7)]
TOLERANCE = {mx.float32: 3e-6, mx.float16: 1.5e-3, mx.bfloat16: 1.2e-2}
ON_GPU = mx.metal.is_available()
needs_simulator = pytest.mark.skipif(not SUPPORTED, reason=UNSUPPORTED)


def needs_kernels(test):
    """Marks a test that runs kernels, on a Mac's GPU (`-m metal`) or in the simulator."""
    return pytest.mark.metal(pytest.mark.skipif(not (SUPPORTED or ON_GPU), reason=UNSUPPORTED or "no Metal")(test))


class Simulator:
    """Makes kernels that run in the simulator with `options`. `objections` are what it found; `reports` all of them.

    `stops`: a kernel that something is found in raises KernelError, and what would follow it is not run.
    """

    def __init__(self, options: Options | None = None, stops: bool = False) -> None:
        self.options, self.stops = options or Options(), stops
        self.reports: list[tuple[str, Report]] = []
        self.objections: list[str] = []

    def __call__(self, **text):
        kernel = Kernel(**text)

        def call(**launch):
            result = kernel.run(**launch, options=self.options)
            self.reports.append((text["name"], result.report))
            found = result.report.findings()
            if found and self.stops:
                raise KernelError("\n".join(found))
            self.objections += found
            return result.outputs

        return call


@contextmanager
def running(options: Options | None = None, stops: bool = False) -> Iterator[Simulator]:
    """Kernels run in the simulator inside; on a Mac without it, on the GPU."""
    simulator, device = Simulator(options, stops), mx.default_device()
    if SUPPORTED:
        metal.use_maker(simulator)
    else:
        mx.set_default_device(mx.gpu)
    try:
        yield simulator
    finally:
        metal.use_maker(None)
        mx.set_default_device(device)


def normal(rng, *shape) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def vectors(n, dim, *, batch=1, heads=2, dtype=mx.float32, seed=0):
    """[B, H, n, D] as models give it, heads and tokens swapped; one vector zero, one tiny, one with an outlier."""
    x = np.random.default_rng([seed, n, dim]).standard_normal((batch, n, heads, dim)).astype(np.float32)
    if n > 4:
        x[0, 1, 0], x[0, 2, 0] = 0, x[0, 2, 0] * 1e-4
        x[0, 3, 0, 5] *= 30
    return mx.array(x).astype(dtype).swapaxes(1, 2)


def packed_side(
    rng, name: str, dim: int, batch: int, heads: int, length: int, room: int = 0, span: int | None = None
) -> PackedSide:
    """`length` random vectors, encoded by the reference, and tiles of rubbish behind them; with means where there is a
    span, heads inside groups, and one more that nobody may read."""
    made, count, mean = codec.get(name, dim), max(length, 1), None
    x = normal(rng, batch, heads, count, dim)
    if span is not None:
        groups = (count - 1) // span + 1 if span else 1
        mean = normal(rng, batch, groups, heads, dim).astype(mx.float16)
        if span:
            mean = mx.concatenate([mean, mx.full((batch, 1, heads, dim), mx.nan, mx.float16)], axis=1)
        mean = mean.swapaxes(1, 2)
        x = x + made.unrotate(spread(mean, 0, count, span))
    tiles, scale = encode_reference(made, x, mean, span=span or 0)
    if room:
        junk = rng.integers(0, 2**32, (batch, heads, room, tiles.shape[-1]), dtype=np.uint32)
        tiles = mx.concatenate([tiles, mx.array(junk)], axis=2)
    if scale is not None:
        scale = mx.pad(scale, [(0, 0), (0, 0), (0, 32 * room)])
        behind = mx.arange(scale.shape[2]) >= length
        scale = mx.contiguous(mx.where(behind, mx.nan, scale).astype(mx.float16))
    return PackedSide(made, mx.contiguous(tiles), scale, mean, span or 0)


def exact_segment(rng, dtype, batch: int, heads: int, length: int, k_dim: int, v_dim: int) -> ExactSegment | None:
    """K as models give it, [B, L, H, D] seen as [B, H, L, D]; V the first tokens of a longer buffer."""
    if not length:
        return None
    k = normal(rng, batch, length, heads, k_dim).astype(dtype).swapaxes(1, 2)
    return ExactSegment(k, normal(rng, batch, heads, length + 5, v_dim).astype(dtype)[:, :, :length])


def problem(
    pair=("turbo4", "turbo2"), dim=64, length=100, *, v_dim=None, batch=1, kv_heads=2, group=3, queries=1,
    first=4, recent=37, dtype=mx.float32, room=2, seed=0, span=None, centred=False,
):  # fmt: skip
    """(q, [sinks, body, recent]) at random; absent segments are None. Several lengths are so many packed segments.
    span: of K's means, None for no means; centred: V has one."""
    lengths = length if isinstance(length, tuple) else (length,)
    rng = np.random.default_rng([seed, dim, *lengths])
    v_dim = v_dim or dim
    segments = [
        exact_segment(rng, dtype, batch, kv_heads, first, dim, v_dim),
        *(
            PackedSegment(
                n,
                packed_side(rng, pair[0], dim, batch, kv_heads, n, room, span),
                packed_side(rng, pair[1], v_dim, batch, kv_heads, n, room, 0 if centred else None),
            )
            for n in lengths
        ),
        exact_segment(rng, dtype, batch, kv_heads, recent, dim, v_dim),
    ]
    q = normal(rng, batch, queries, kv_heads * group, dim).astype(dtype).swapaxes(1, 2)
    return q, segments


def attend_segments(q, segments, **how) -> mx.array:
    """The kernels' attention over the segments of a `problem`."""
    return attend_metal(q, segments[0], segments[1:-1], segments[-1], AttentionArgs(**how))


def attending(q, segments, **how) -> float:
    """How far the kernels are from the reference, which computes in float32 from the same inputs."""
    how = {"scale": q.shape[-1] ** -0.5, "mask": "causal", **how}
    got = attend_segments(q, segments, **how)
    assert got.dtype == q.dtype
    if how.get("lengths") is None:
        segments = [segment for segment in segments if segment]
    with mx.stream(mx.cpu):
        want = reference.attend(q.astype(mx.float32), segments, AttentionArgs(**how))
    return distance(got, want)


def distance(got: mx.array, want: mx.array) -> float:
    """Largest difference, over the largest value where that is above 1."""
    got, want = np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32))
    assert got.shape == want.shape
    return float(np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0)))


@contextmanager
def mutated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, old: str, new: str, at: int = 0
) -> Iterator[None]:
    """The kernels with occurrence `at` of `old` in file `path` replaced by `new`."""
    for name in metal.names():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((metal.root() / name).read_text(encoding="utf-8"), encoding="utf-8")
    text = (tmp_path / path).read_text(encoding="utf-8")
    parts = text.split(old)
    assert len(parts) > at + 1, f"{path} has {len(parts) - 1} times: {old}"
    changed = old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])
    (tmp_path / path).write_text(changed, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(metal, "root", lambda: tmp_path)
        yield


def objections(run) -> list[str]:
    """What the simulator has against `run()`, which returns how far the result is off; [] for nothing."""
    with running(Options(lint=False), stops=True):
        try:
            off = run()
        except (CompileError, KernelError) as error:
            return [str(error)]
        return [] if off <= TOLERANCE[mx.float32] else [f"wrong by {off}"]


def barriers(*paths: str) -> list[tuple[str, str, int]]:
    """(file, barrier, which of its kind) of every barrier in the sources `paths`."""
    found = []
    for path in paths:
        text = (metal.root() / path).read_text(encoding="utf-8")
        for kind in ("simdgroup_barrier", "threadgroup_barrier"):
            call = f"{kind}(mem_flags::mem_threadgroup);"
            found += [(path, call, i) for i in range(text.count(call))]
    return found
