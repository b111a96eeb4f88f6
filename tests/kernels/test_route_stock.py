"""The route kernel against MLX's own Metal kernels from the wheel, one after another as a stock model runs them."""

import mlx.core as mx
import numpy as np
import pytest

from grids import thinned
from kernel_cases import needs_simulator, running
from metal_sim import Buffer, bits, from_bits, mlx_source, run_file
from mlx_rotor.kernels.experts.routing import Routing, route_metal, route_reference, sorted_partition

pytestmark = needs_simulator
NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16


# What MLX's host code launches, with a place for every argument, which these of its kernels leave out.
SIGMOID = """
[[kernel]] void launched(const device TYPE *x [[buffer(0)]], device TYPE *out [[buffer(1)]],
    constant uint &size [[buffer(2)]], uint index [[thread_position_in_grid]]) {
  unary_v<TYPE, TYPE, Sigmoid>(x, out, size, index);
}
"""
SOFTMAX = """
[[kernel]] void launched(const device TYPE *x [[buffer(0)]], device TYPE *out [[buffer(1)]],
    constant int &size [[buffer(2)]], uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  softmax_single_row<TYPE, SUMS>(x, out, size, group, thread_index, lane, simdgroup);
}
"""
SORT = """
[[kernel]] void launched(const device TYPE *x [[buffer(0)]], device uint *out [[buffer(1)]],
    const constant int &size [[buffer(2)]], const constant int &step [[buffer(3)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 place [[thread_position_in_threadgroup]]) {
  block_sort<TYPE, uint, true, THREADS, 4>(x, out, size, step, step, size, size, group, place);
}
"""


def part(text, first, last):
    """From `first` up to and with the next `last` behind it."""
    start = text.index(first)
    return text[start : text.index(last, start) + len(last)] + "\n"


def launched(text, kernel, template, x, shape, dtype, sizes, grid, threads, headers=()):
    """One of MLX's kernels over x, and scalars behind the output."""
    before = "".join(f'#include "mlx/backend/metal/kernels/{name}.h"\n' for name in ("utils", *headers))
    out = Buffer("out", bits(mx.zeros(shape, dtype)), writable=True, written=False)
    (got,), report = run_file(
        text,
        kernel,
        template,
        [Buffer("x", np.ascontiguousarray(bits(x))), out, *sizes],
        grid,
        threads,
        before=before,
    )
    assert report.findings() == []
    return from_bits(got, dtype).reshape(shape)


def sizes(*values, dtype=np.int32):
    return [Buffer(f"size {i}", np.array(v, dtype)) for i, v in enumerate(values)]


def named(text, x, **words):
    for word, value in ({"TYPE": NAMES[x.dtype]} | words).items():
        text = text.replace(word, str(value))
    return text


def sigmoid(x):
    n, grid = sizes(x.size, dtype=np.uint32), (x.size, 1, 1)
    text = part(mlx_source("unary_ops.h"), "struct Sigmoid {", "\n};") + mlx_source("unary.h") + named(SIGMOID, x)
    return launched(text, "launched", [], x, x.shape, x.dtype, n, grid, (32, 1, 1))


def softmax(x, precise):
    rows, width = x.shape
    threads = 32 * -(-width // 128)
    text = mlx_source("softmax.h") + named(SOFTMAX, x, SUMS="float" if precise else NAMES[x.dtype])
    grid = (rows * threads, 1, 1)
    return launched(text, "launched", [], x, x.shape, x.dtype, sizes(width), grid, (threads, 1, 1))


def partition(x, kth, axis):
    """mx.argpartition, which is a whole sort on Metal: blocks of four values a thread."""
    flat = x.reshape(-1, x.shape[axis])
    assert axis == -1 or x.shape[-1] == 1
    rows, width = flat.shape
    threads = next(n for n in (32, 64, 128, 256, 512) if 4 * n >= width)
    text, grid = mlx_source("sort.h") + named(SORT, x, THREADS=threads), (threads, rows, 1)
    found = launched(text, "launched", [], flat, flat.shape, mx.uint32, sizes(width, 1), grid, (threads, 1, 1))
    return found.reshape(x.shape)


def total(x):
    rows, width = x.shape
    name = NAMES[x.dtype]
    lengths = [Buffer(n, np.array(v, np.int64)) for n, v in (("row", width), ("others", 1))]
    where = [
        Buffer("shape", np.array([rows], np.int32)),
        Buffer("strides", np.array([width], np.int64)),
        *sizes(1),
        Buffer("reduced shape", np.array([1], np.int32)),
        Buffer("reduced strides", np.array([0], np.int64)),
        *sizes(0),
    ]
    operations = mlx_source("reduction/ops.h")
    text = part(operations, "#define DEFINE_SIMD_REDUCE", "simd_size = 32;") + part(
        operations, "template <typename U>\nstruct Sum", "\n};"
    )
    return launched(
        text + mlx_source("reduction/reduce_row.h"),
        "row_reduce_small",
        [name, name, f"Sum<{name}>", "int", "1", "4"],
        x,
        (rows, 1),
        x.dtype,
        [*lengths, *where],
        (rows, 1, 1),
        (1, 1, 1),
        headers=("atomic",),
    )


def as_stock(logits, k, how, bias):
    """The model's operations on Metal: MLX's kernels; gathering, groups and elementwise sums and quotients, which IEEE
    rounds alike everywhere, on the CPU."""
    scores = logits.astype(F32) if how.upcast else logits
    if how.scores == "sigmoid":
        scores = sigmoid(scores)
    elif how.scores == "softmax":
        scores = softmax(scores, how.precise)
    compared = scores if bias is None else scores + bias
    if how.groups > 1:
        split = compared.reshape(*compared.shape[:-1], how.groups, -1)
        best = mx.sort(split, axis=-1)[..., -how.best_of :].sum(axis=-1, keepdims=True)
        worst = partition(best, 0, -2)[..., : how.groups - how.kept, :]
        compared = mx.put_along_axis(split, worst, mx.array(0.0, split.dtype), axis=-2).reshape(compared.shape)
    indices = partition(compared, 0, -1)[..., -k:] if how.ascending else partition(-compared, 0, -1)[..., :k]
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if how.scores == "softmax_of_chosen":
        weights = softmax(weights, how.precise)
    if how.normalize:
        added = total(weights)
        weights = weights / (mx.maximum(added, how.floor) if how.floor else added + how.epsilon)
    return indices, weights * how.scaling


def logits(dtype, experts, tokens, seed=0):
    """Half of them among few values, so that many are equal; some that are equal after a sigmoid only."""
    rng = np.random.default_rng([seed, experts])
    x = rng.standard_normal((tokens, experts)).astype(np.float32) * 2
    coarse = rng.integers(-3, 4, x.shape).astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.5, coarse, x)
    x[0, : experts // 4] = 30 + np.arange(experts // 4)
    return mx.array(x).astype(dtype)


def bits_of(x):
    return np.array(x.view(mx.uint32 if x.dtype == F32 else mx.uint16))


MODELS = {
    "minimax": (Routing("sigmoid", True, epsilon=1e-20), F32, 256, 8, F32),
    "mixtral": (Routing("softmax_of_chosen", False), BF16, 8, 2, None),
    "gpt_oss": (Routing("softmax_of_chosen", False, ascending=True), F16, 32, 4, None),
    "qwen3_moe": (Routing("softmax", True, ascending=True), BF16, 128, 8, None),
    "qwen3_next": (Routing("softmax", True, ascending=True), F16, 512, 10, None),
    "qwen2_moe": (Routing("softmax", False), BF16, 60, 4, None),
    "olmoe": (Routing("softmax", False), F32, 64, 8, None),
    "ernie4_5_moe": (Routing("softmax", True, floor=1e-12, upcast=True), BF16, 64, 6, None),
    "glm4_moe": (Routing("sigmoid", True, 2.5, upcast=True), BF16, 160, 8, F32),
    "deepseek_v2": (Routing("softmax", False, 16.0, groups=8, kept=3, best_of=1), F32, 160, 6, None),
    "deepseek_v3": (Routing("sigmoid", True, 2.5, 1e-20, upcast=True, groups=8, kept=4), F16, 256, 8, F32),
    "kimi_linear": (Routing("sigmoid", True, 2.446, 1e-20), BF16, 96, 8, BF16),
    "longcat_flash": (Routing("softmax", False, 6.0, ascending=True, precise=False), BF16, 72, 12, F32),
    "gemma4": (Routing("softmax_of_chosen", False, ascending=True, precise=False), BF16, 128, 8, None),
    "lfm2_moe": (Routing("sigmoid", True, 1.0, 1e-6, ascending=True), BF16, 32, 4, F32),
}


@pytest.mark.parametrize(
    "model", thinned(list(MODELS), ["minimax", "mixtral", "qwen3_moe", "ernie4_5_moe", "deepseek_v3"])
)
def test_indices_and_weights_are_those_of_the_stock_model_bit_for_bit(model):
    how, dtype, experts, k, bias_dtype = MODELS[model]
    x = logits(dtype, experts, 3)
    rng = np.random.default_rng(1)
    bias = None if bias_dtype is None else mx.array(rng.integers(0, 4, experts) / 8).astype(bias_dtype)
    with running() as simulator:
        indices, weights = route_metal(x, k, how, bias)
    assert simulator.objections == [] and len(simulator.reports) == 1
    want_indices, want_weights = as_stock(x, k, how, bias)
    assert np.array(indices).tolist() == np.array(want_indices).tolist()
    assert weights.dtype == want_weights.dtype
    assert (bits_of(weights) == bits_of(want_weights)).all()


@pytest.mark.parametrize("experts", thinned([5, 12, 130, 257, 520, 1024], [5, 257, 1024]))
@pytest.mark.parametrize("dtype", thinned([F32, F16, BF16], [F32]), ids=str)
def test_mlx_sorts_as_the_reference_does(dtype, experts):
    x = logits(dtype, experts, 2)
    x[1, 1], x[1, experts // 2], x[1, 3], x[1, 4] = mx.nan, mx.nan, mx.inf, -mx.inf
    x[0, 0], x[0, experts - 1] = 0.0, -0.0
    want = np.array(partition(x, 0, -1))
    assert want.tolist() == np.array(sorted_partition(x, 0, -1)).tolist()
    k = min(experts, 8)
    for ascending, picked in ((True, want[:, -k:]), (False, np.array(partition(-x, 0, -1))[:, :k])):
        how = Routing("softmax_of_chosen", False, ascending=ascending)
        with running():
            indices, _ = route_metal(x, k, how)
        assert np.array(indices).tolist() == picked.tolist()
        want, _ = route_reference(x, k, how, partition=sorted_partition)
        assert np.array(want).tolist() == picked.tolist()
