"""A KV codec is one file and one header: both are added to a copy of the product, and every part takes them up."""

from metal_sim import SUPPORTED
from scratch import run_in, scratch

CODEC = '''
"""mirror4: a vector turned back to front with its sign changed, and Lloyd–Max levels of 4 bits."""

import mlx.core as mx

from ..kernels.spec import Struct
from .base import RotatedCodec
from .quantizer import Scalar


class Mirror:
    root = 1.0

    def __init__(self, dim):
        self.struct = Struct("codec/mirror.h", f"Mirror<{dim}>")
        self.table = self.inverse_table = mx.zeros(8, mx.uint32)
        mx.eval(self.table)

    def rotate(self, x):
        return -x[..., ::-1]

    unrotate = rotate


CODECS = {"mirror4": lambda dim: RotatedCodec("mirror4", dim, Mirror(dim), Scalar(4, dim))}
'''
HEADER = """
// A vector back to front, with its sign changed, times a factor.

#ifndef MLX_ROTOR_CODEC_MIRROR_H
#define MLX_ROTOR_CODEC_MIRROR_H

#include "../common/eight.h"

template <uint DIM>
struct Mirror {
  static constant constexpr const uint TABLE = 1;

  template <typename Table>
  static inline void apply(threadgroup float *v, Table, float factor, uint lane, thread float (&y)[DIM / 8]) {
    for (uint i = 0; i < DIM / 8; ++i) {
      y[i] = -v[DIM - 1 - ((lane & 7) + 8 * i)] * factor;
    }
  }
};

#endif
"""

# A cache of 80 tokens, then attention of one query; the stand-in keeps the Metal source that each kernel is made of.
USED = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_rotor import codec
from mlx_rotor.cache import RotorCache, parse
from mlx_rotor.cache.view import paired
from mlx_rotor.kernels import metal

assert "mirror4" in codec.names()
scheme = parse("k=mirror4,v=turbo2", sinks=4, ring=8, protect_layers=0)
assert scheme.codecs(0, 2) == ("mirror4", "turbo2")
k, v, q = (mx.random.normal((1, heads, n, 64), key=mx.random.key(n + heads)) for heads, n in ((2, 80), (2, 81), (4, 1)))

def attended():
    cache = RotorCache(*scheme.codecs(0, 2), scheme.sinks, scheme.ring, scheme.block)
    held = cache.update_and_fetch(k, v[:, :, :80])
    held = cache.update_and_fetch(k[:, :, :1], v[:, :, 80:])
    assert cache.body.length >= 64
    return paired(*held).attend(q, 0.125), held

"""
ON_REFERENCE = """
out, (keys, _) = attended()
exact = mx.fast.scaled_dot_product_attention(
    q, mx.concatenate([k, k[:, :, :1]], 2), v, scale=0.125)
assert out.shape == (1, 4, 1, 64) and mx.abs(out - exact).max() < 0.5
assert mx.mean((keys[:, :, :80] - k) ** 2) < 0.011  # turbo4's error, as a rotation changes nothing for normal numbers
"""
GENERATED = """
made = {}

def maker(*, name, header, source, **rest):
    made[name.rpartition("_")[0]] = header + source

    def launch(*, output_shapes, output_dtypes, **rest):
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]
    return launch

metal.use_maker(maker)
attended()
assert all("struct Mirror {" in made[f"mlx_rotor_{name}"] for name in ("encode_mirror4_64", "decode")), sorted(made)
assert "Mirror<64>" in made["mlx_rotor_decode"] and "Scalar<4, 64>" in made["mlx_rotor_decode"]
"""
SIMULATED = """
import numpy as np
from kernel_cases import running
from mlx_rotor.kernels.packing import encode_metal, encode_reference

made = codec.get("mirror4", 64)
with running() as simulator:
    got = encode_metal(made, k)
assert simulator.objections == []
assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(got, encode_reference(made, k)))
"""


def test_a_codec_is_one_file_and_one_header(tmp_path):
    folder = scratch(tmp_path)
    (folder / "mlx_rotor/codec/mirror.py").write_text(CODEC, "utf-8")
    (folder / "kernels_metal/codec/mirror.h").write_text(HEADER, "utf-8")
    run_in(folder, USED + ON_REFERENCE, MLX_ROTOR_BACKEND="reference")
    run_in(folder, USED + GENERATED, MLX_ROTOR_BACKEND="metal")
    if SUPPORTED:
        run_in(folder, USED + SIMULATED)
