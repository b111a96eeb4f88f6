"""Mistakes planted in the kernels one at a time: without a barrier, with a loose bound or a wrong operation, the
simulator or the comparison with the reference must object."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import attend_segments, barriers, distance, mutated, needs_simulator, objections, problem, vectors
from mlx_rotor import codec
from mlx_rotor.kernels import AttentionArgs, reference
from mlx_rotor.kernels.packing import encode_metal, encode_reference

pytestmark = needs_simulator


def encoding(name, dim):
    """How far the kernel's words and scales are from the reference's, with means: 0 or 1."""

    def run():
        c, x = codec.get(name, dim), vectors(37, dim)
        mean = vectors(2, dim, dtype=mx.float16, seed=1)
        pairs = zip(encode_metal(c, x, mean, span=32), encode_reference(c, x, mean, span=32), strict=True)
        return float(not all(np.array_equal(np.array(a), np.array(b)) for a, b in pairs))

    return run


def attending(pair, dim, causal=False, **changes):
    def run():
        q, segments = problem(pair, dim, **{"length": 230, "group": 3, "queries": 2, "recent": 70, **changes})
        rng = np.random.default_rng(5)
        slots = sum(segment.length for segment in segments if segment)
        mask = mx.array(np.where(rng.random((2, slots)) < 0.9, rng.random((2, slots)), -np.inf).astype(np.float32))
        logits = mx.linspace(-1, 1, q.shape[1])
        how = {"scale": q.shape[-1] ** -0.5, "mask": "causal" if causal else mask, "sink_logits": logits, "window": 250}
        return distance(
            attend_segments(q, segments, **how), reference.attend(q, [r for r in segments if r], AttentionArgs(**how))
        )

    return run


ENCODE, ATTEND = encoding("trellis3", 80), attending(("trellis3", "trellis2"), 80)
SCALAR_ENCODE, BLOCK_ENCODE = encoding("turbo3", 80), encoding("rotor3", 80)
CAUSAL_ATTEND = attending(("trellis3", "trellis2"), 80, causal=True, length=600, room=0)
SCALAR_ATTEND = attending(("rotor3", "turbo4"), 64)
RUNS = {
    "attention/encode.h": ENCODE,
    "codec/trellis.h": ENCODE,
    "codec/hadamard.h": ENCODE,
    "attention/decode.h": ATTEND,
    "attention/merge.h": ATTEND,
}


def test_nothing_is_wrong_without_a_mistake():
    for run in (ENCODE, ATTEND, SCALAR_ENCODE, BLOCK_ENCODE, CAUSAL_ATTEND, SCALAR_ATTEND):
        assert objections(run) == []


@pytest.mark.parametrize(("path", "call", "at"), barriers(*RUNS))
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(RUNS[path])


@pytest.mark.parametrize(
    ("run", "path", "old", "new", "at"),
    [
        (ENCODE, "attention/encode.h", "token < tokens ?", "token <= tokens ?", 0),
        (ENCODE, "attention/encode.h", "e < DIM; e += 32", "e <= DIM; e += 32", 0),
        (ENCODE, "attention/encode.h", "w < Quantizer::TILE_WORDS", "w <= Quantizer::TILE_WORDS", 0),
        (ENCODE, "attention/encode.h", "w < Quantizer::TILE_WORDS", "w + 1 < Quantizer::TILE_WORDS", 0),
        (ENCODE, "attention/encode.h", "% MLX_ROTOR_TILE < held", "% MLX_ROTOR_TILE <= held", 0),
        (SCALAR_ENCODE, "attention/encode.h", "even < held ?", "even <= held + 1 ?", 0),
        (ENCODE, "attention/encode.h", "thread_index < held ?", "thread_index + 1 < held ?", 0),
        (ENCODE, "attention/encode.h", "thread_index < MLX_ROTOR_TILE)", "thread_index <= MLX_ROTOR_TILE)", 0),
        (ENCODE, "attention/encode.h", "long(token) * strides[2]", "long(token) * strides[1]", 0),
        (ENCODE, "common/eight.h", "ushort(4)", "ushort(2)", 0),
        (ENCODE, "common/eight.h", "i < PART", "i + 1 < PART", 0),
        (ENCODE, "codec/fields.h", "u < UNITS; u += 8", "u + 1 < UNITS; u += 8", 0),
        (ENCODE, "codec/fields.h", "u < UNITS; u += 8", "u <= UNITS; u += 8", 0),
        (ENCODE, "codec/fields.h", "p < UNITS / 2; p += 8", "p <= UNITS / 2; p += 8", 0),
        (ENCODE, "codec/fields.h", "over[token] = ", "over[token + 1] = ", 0),
        (ENCODE, "codec/trellis.h", "n + 1 < AMPLITUDES", "n < AMPLITUDES", 0),
        (ENCODE, "codec/trellis.h", "t % 32 == 31 || t + 1 == DIM", "t % 32 == 31", 0),
        (ENCODE, "codec/trellis.h", "cost1 < cost0", "cost1 <= cost0 + 1e-3f", 0),
        (ENCODE, "codec/trellis.h", "t >= 3 ?", "t >= 2 ?", 0),
        (ENCODE, "codec/trellis.h", "for (uint t = DIM; t-- > 0;)", "for (uint t = DIM; t-- > 1;)", 0),
        (ENCODE, "codec/trellis.h", "lane8 == 0 ? 0.0f : 1e30f", "0.0f", 0),
        (ENCODE, "codec/hadamard.h", "step < INNER && step < 8", "step <= INNER && step < 8", 0),
        (ENCODE, "codec/hadamard.h", "j < OUTER", "j + 1 < OUTER", 0),
        (ENCODE, "codec/hadamard.h", "j < OUTER", "j <= OUTER", 0),
        (SCALAR_ENCODE, "codec/scalar.h", "n + 1 < half_count", "n < half_count", 0),
        (SCALAR_ENCODE, "codec/scalar.h", "unit >= 0 ?", "unit < 0 ?", 0),
        (BLOCK_ENCODE, "codec/block.h", "first + 3 <= DIM", "first + 2 <= DIM", 0),
        (BLOCK_ENCODE, "codec/block.h", "e - e % SIZE", "e", 0),
        (BLOCK_ENCODE, "codec/block.h", "j < N", "j + 1 < N", 0),
        (BLOCK_ENCODE, "codec/block.h", "(REST == 2 ? 1 : 0)", "0", 0),
        (CAUSAL_ATTEND, "attention/rows.h", "p <= own(l)", "p < own(l)", 0),
        (ATTEND, "attention/rows.h", "p > own(l) - window", "p >= own(l) - window", 0),
        (ATTEND, "attention/rows.h", "own(l) - window + 1", "own(l) - window + 40", 0),
        (ATTEND, "attention/rows.h", "exp2(top - next)", "1.0f", 0),
        (ATTEND, "attention/decode.h", "token < tokens.body", "token <= tokens.body", 0),
        (ATTEND, "attention/decode.h", "const bool real = at < ROWS", "const bool real = at + 1 < ROWS", 0),
        (ATTEND, "attention/decode.h", "own < tokens.sinks + tokens.recent", "own <= tokens.sinks + tokens.recent", 0),
        (ATTEND, "attention/decode.h", "u < width / VQ::FIELDS", "u <= width / VQ::FIELDS", 0),
        (ATTEND, "attention/decode.h", "at < DV", "at <= DV + 1", 0),
        (ATTEND, "attention/decode.h", "e < DV; e += 32 * SIMDS", "e <= DV; e += 32 * SIMDS", 0),
        (ATTEND, "attention/decode.h", "e < DV; e += 32 * SIMDS", "e + 1 < DV; e += 32 * SIMDS", 0),
        (ATTEND, "attention/rows.h", "(tokens.body + MLX_ROTOR_TILE - 1)", "(tokens.body)", 0),
        (CAUSAL_ATTEND, "attention/decode.h", "tile < last", "tile <= last", 0),
        (ATTEND, "attention/exact.h", "e < width", "e <= width + 32", 0),
        (ATTEND, "attention/exact.h", "own < tokens.sinks + tokens.recent ?", "true ?", 0),
        (ATTEND, "attention/merge.h", "s < body_splits", "s + 1 < body_splits", 0),
        (ATTEND, "attention/merge.h", "s < body_splits", "s <= splits", 0),
        (ATTEND, "attention/merge.h", "p < DV", "p <= DV", 1),
        (ATTEND, "attention/merge.h", "e < DV", "e <= DV", 0),
        (ATTEND, "attention/merge.h", "lane < splits ?", "lane <= splits ?", 0),
        (ATTEND, "codec/trellis.h", "from_end == 3 ? kept[0]", "from_end == 3 ? kept[1]", 0),
        (ATTEND, "codec/trellis.h", "before3 = before2;", "", 0),
        (ATTEND, "codec/fields.h", "HALF_WORD && p == UNITS / 2", "false", 0),
        (ATTEND, "codec/fields.h", "16 * (token & 1)", "0", 0),
        (SCALAR_ATTEND, "codec/scalar.h", "mine >> (down - 2)", "mine >> down", 0),
        (SCALAR_ATTEND, "codec/fields.h", "1024.0f * unit + middle", "1024.0f * unit", 0),
        (SCALAR_ATTEND, "codec/curve.h", "0.0114955f", "0.0115955f", 0),
    ],
)  # fmt: skip
def test_a_loose_bound_or_a_wrong_operation_is_seen(run, path, old, new, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, old, new, at):
        assert objections(run)
