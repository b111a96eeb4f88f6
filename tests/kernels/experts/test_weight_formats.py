"""Weight formats in Metal: what `expand` gives is the reference's to the bit, and affine's is MLX's own."""

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import EVERY, weights
from grids import grid
from kernel_cases import mutated, needs_kernels, needs_simulator, running
from metal_sim import Options
from mlx_rotor.kernels import metal


def expanded(w) -> mx.array:
    """All weights of a matrix, float32, a block of 32 a thread."""
    names = ("codes", "first", "second")[: len(w.parts)]
    made = metal.kernel(
        "expand",
        (w.struct.header,),
        names,
        ("out",),
        f"""
  const uint row = thread_position_in_grid.y, k = 32 * thread_position_in_grid.x;
  const {w.struct.name} weights = {w.struct.name}::at(
      codes, first, {"second" if "second" in names else "nullptr"}, row, {w.columns});
  threadgroup float4 room[8];
  float block[32];
  weights.expand(k, (threadgroup float *)room, block);
  for (uint i = 0; i < 32; ++i) {{
    out[row * {w.columns} + k + i] = block[i];
  }}
""",
    )
    (out,) = made(
        inputs=list(w.parts),
        output_shapes=[(w.rows, w.columns)],
        output_dtypes=[mx.float32],
        grid=(w.columns // 32, w.rows, 1),
        threadgroup=(1, 1, 1),
    )
    return out


def wrong(w, options=None) -> int:
    """Weights that differ from the reference's, or objections."""
    with running(options) as simulator:
        got = np.array(expanded(w))
    return int((got != np.array(w.decoded())).sum()) + len(simulator.objections)


@needs_kernels
@pytest.mark.parametrize("name", EVERY, ids=lambda name: "-".join(map(str, name)))
def test_every_format_to_the_bit(name):
    assert wrong(weights(name, (9,), 2 * max(32, name[2]))) == 0


@needs_kernels
@grid(1, name=[("affine", 3, 32), ("lloyd", 3, 64), ("iq4_nl", 4, 16), ("q8", 8, 32)], dtype=[mx.float32, mx.bfloat16])
def test_any_dtype_beside_the_codes(name, dtype):
    assert wrong(weights(name, (9,), 128, dtype=dtype)) == 0


@needs_kernels
@grid(1, bits=[1, 2, 3, 4, 5, 6, 8], dtype=[mx.float32, mx.float16, mx.bfloat16])
def test_affine_is_what_mlx_packs(bits, dtype):
    """Quantized by MLX, read by ours, against MLX's dequantize in float32."""
    x = mx.random.normal((9, 128), key=mx.random.key(bits)).astype(dtype)
    parts = mx.quantize(x, group_size=32, bits=bits)
    w = weights(("affine", bits, 32), (9,), 128)
    w = type(w)(w.format, tuple(parts), 128)
    want = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), 32, bits)
    with running():
        assert np.array_equal(np.array(expanded(w)), np.array(want))


@needs_simulator
@pytest.mark.parametrize(
    ("name", "path", "old", "new", "at"),
    [
        (("affine", 3, 32), "codes", "across<8>", "across<9>", 0),
        (("affine", 3, 32), "codes", "put<6, 2, 5, 7>", "put<6, 2, 2, 7>", 0),
        (("affine", 3, 32), "codes", "put<7, 5, 6, 10>", "put<7, 5, 6, 9>", 0),
        (("affine", 2, 32), "codes", "word[i] >> 6", "word[i] >> 4", 0),
        (("affine", 1, 32), "codes", "put<9, 15>", "put<8, 15>", 0),
        (("affine", 5, 32), "codes", "behind = at + 1 <", "behind = at + 2 <", 0),
        (("affine", 6, 32), "codes", "(32 - SHIFT)", "(31 - SHIFT)", 0),
        (("affine", 8, 32), "codes", "word[i] >> 8", "word[i] >> 7", 1),
        (("affine", 4, 32), "affine", "product + bias", "product - bias", 0),
        (("affine", 4, 32), "affine", "row * (columns / 32 * BITS)", "row * (columns / 64 * BITS)", 0),
        (("affine", 4, 32), "affine", "biases[k / GROUP]", "biases[k / 64]", 0),
        (("lloyd", 3, 64), "lloyd", "shift + BITS > 32", "shift + BITS > 33", 0),
        (("lloyd", 3, 64), "lloyd", "k / GROUP * LEVELS", "k / GROUP", 0),
        (("iq4_nl", 4, 16), "iq4_nl", "i < 16", "i < 15", 0),
        (("iq4_nl", 4, 16), "iq4_nl", "-49.0f", "-48.0f", 0),
        (("q8", 8, 32), "q8", "- 128.0f", "- 127.0f", 0),
    ],
)
def test_a_wrong_bit_is_seen(name, path, old, new, at, monkeypatch, tmp_path):
    w = weights(name, (9,), 128)
    unlinted = Options(lint=False)
    assert wrong(w, unlinted) == 0
    with mutated(monkeypatch, tmp_path, f"weight/{path}.h", old, new, at):
        assert wrong(w, unlinted)
