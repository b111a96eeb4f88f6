"""Shared by the tests of kernels for few rows: packed weights at random, experts nobody chose, comparisons."""

import mlx.core as mx
import numpy as np

from kernel_cases import TOLERANCE, distance, running
from mlx_rotor.experts import formats
from mlx_rotor.kernels.experts import down, gate_up, matmul, reference
from mlx_rotor.kernels.spec import PackedWeight

EVERY = [
    (mode, bits, group)
    for mode in formats.modes()
    for bits in formats.known(mode)[0]
    for group in formats.known(mode)[1]
]
# One of each way that weights are loaded and decoded.
SOME = [("affine", 2, 64), ("affine", 3, 32), ("lloyd", 2, 64), ("lloyd", 3, 256), ("iq4_nl", 4, 16), ("q8", 8, 32)]


def weights(name, lead, columns, *, dtype=mx.float16, bias=False, seed=0) -> PackedWeight:
    """Random bits, and numbers beside them that make weights of size 1 or so."""
    made, rng = formats.get(*name), np.random.default_rng([seed, *name[1:], *lead, columns])
    codes, *beside = made.tensors(lead, columns)
    size = {"affine": 2.0 / 2 ** name[1], "lloyd": 1.0, "iq4_nl": 1 / 80, "q8": 1 / 80}[made.mode]
    parts = [mx.array(rng.integers(0, 2**32, codes.shape, dtype=np.uint32))]
    parts += [mx.array((size * rng.standard_normal(t.shape)).astype(np.float32)).astype(dtype) for t in beside]
    added = mx.array(rng.standard_normal(lead).astype(np.float32)) if bias else None
    return PackedWeight(made, tuple(parts), columns, added)


def normal(*shape, dtype=mx.float32, seed=0) -> mx.array:
    return mx.array(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)).astype(dtype)


def only(w: PackedWeight, chosen) -> PackedWeight:
    """`w` with no number beside the codes of the experts that are not chosen."""
    used = np.isin(np.arange(w.parts[0].shape[0]), np.array(chosen))
    keep = mx.array(used)[:, None, None]
    parts = (w.parts[0], *(mx.where(keep, part, mx.array(mx.nan, part.dtype)) for part in w.parts[1:]))
    bias = None if w.bias is None else mx.where(keep[..., 0], w.bias, mx.nan)
    return PackedWeight(w.format, parts, w.columns, bias)


def matmul_off(x, w) -> float:
    """How far the kernel is from the reference."""
    return _off(matmul(x, w), lambda: reference.matmul(x.astype(mx.float32), w), x)


def gate_up_off(x, gate, up, indices, activation="swiglu") -> float:
    got = gate_up(x, only(gate, indices), only(up, indices), indices, activation)
    return _off(got, lambda: reference.gate_up(x.astype(mx.float32), gate, up, indices, activation), x)


def down_off(h, w, indices, shares=None) -> float:
    got = down(h, only(w, indices), indices, shares)
    return _off(got, lambda: reference.down(h.astype(mx.float32), w, indices, shares), h)


def _off(got, want, x) -> float:
    assert got.dtype == x.dtype
    with mx.stream(mx.cpu):
        exact = want()
        mx.eval(exact)
    return distance(got, exact)


def agree(off, *arguments, options=None) -> None:
    """Within the dtype's tolerance, and the simulator has nothing to object to."""
    with running(options) as simulator:
        assert off(*arguments) <= TOLERANCE[arguments[0].dtype]
    assert simulator.objections == []
