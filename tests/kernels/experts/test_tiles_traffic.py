"""Traffic and operations of the tiled kernels beside MLX's own `affine_qmm_t`, unchanged, from the wheel."""

import mlx.core as mx
import numpy as np
import pytest

from grids import thinned
from kernel_cases import Options, distance, needs_simulator, running
from metal_sim import Buffer, bits, from_bits, mlx_source, run_file
from metal_sim.bench.kernel_traffic import Tally, counted
from metal_sim.bench.throughput import cycles
from mlx_rotor.kernels.experts import reference, tiles
from tile_cases import experts_of, packed, rows_of

pytestmark = needs_simulator
NAMES = {mx.float16: "half", mx.bfloat16: "bfloat"}
ROWS, WIDTH, COLUMNS = 64, 256, 1024
QUANTIZED = "".join(
    f'#include "mlx/backend/metal/kernels/{name}"\n' for name in ("steel/gemm/gemm.h", "quantized_utils.h")
)


def stock(x, w, mode):
    """(report, result) of MLX's kernel."""
    sizes = {"k": w.columns, "n": w.rows, "m": x.shape[0]}
    inputs = dict(zip(("w", "scales", "biases", "x"), (*w.parts, x), strict=True))
    out = Buffer("y", bits(mx.zeros((x.shape[0], w.rows), x.dtype)), writable=True, written=False)
    buffers = [Buffer(name, bits(array)) for name, array in inputs.items()] + [out]
    buffers += [Buffer(name, np.array(size, np.int32)) for name, size in sizes.items()]
    (y,), report = run_file(
        mlx_source("quantized.h"),
        "affine_qmm_t",
        [NAMES[x.dtype], str(w.format.group_size), str(w.format.bits), "true", "false"],
        [*buffers, *[None] * 8],
        (32 * (w.rows // 32), 2 * (x.shape[0] // 32), 2),
        (32, 2, 2),
        before=QUANTIZED,
        options=Options(mode=mode),
    )
    return report, from_bits(y, x.dtype)


def spent(issued) -> float:
    return sum(cycles(issued).values())


@pytest.mark.parametrize("dtype", thinned(list(NAMES), [mx.float16]))
def test_no_more_than_mlx_moves_and_does(dtype):
    w = packed(("affine", 4, 64), WIDTH, columns=COLUMNS, dtype=dtype)
    x, theirs = rows_of(ROWS, COLUMNS, dtype), Tally()
    report, result = stock(x, w, "count")
    theirs.add(report, ("k", "n", "m"))
    assert distance(result, reference.matmul(x.astype(mx.float32), w)) < 2e-2
    with counted("count") as moved:
        tiles.matmul_tiled(x, w)
    with counted("arithmetic") as done:
        tiles.matmul_tiled(x, w)
    assert moved.launches == 1
    assert moved.moved < 0.8 * theirs.moved
    assert moved.line_use > 2 * theirs.line_use
    assert spent(done.issued) < 0.95 * spent(stock(x, w, "arithmetic")[0].issued)


@pytest.mark.parametrize(
    "name", thinned([("lloyd", 3, 256), ("iq4_nl", 4, 16), ("q8", 8, 32)], 3), ids=lambda name: name[0]
)
def test_our_formats_cost_little_more_than_mlx_s(name):
    """What a format costs to expand is shared by 32 rows of x."""
    x = rows_of(ROWS, COLUMNS, mx.float16)
    theirs = stock(x, packed(("affine", 4, 64), WIDTH, columns=COLUMNS), "arithmetic")[0].issued
    with counted("arithmetic") as done:
        tiles.matmul_tiled(x, packed(name, WIDTH, columns=COLUMNS))
    assert spent(done.issued) < 1.15 * spent(theirs)


def test_weights_are_read_once_an_expert():
    """Rows of an expert that fit one threadgroup read it once; of experts without rows nothing is read."""
    w = packed(("affine", 4, 64), 5, 64, columns=256)
    x, counts = rows_of(64, 256), (0, 30, 0, 32, 2)
    with running(Options(mode="count")) as simulator:
        tiles._launch(x, w, {"indices": experts_of(counts)}, len(x), 64)
    ((_, report),) = simulator.reports
    assert report.buffers["codes"].loaded == 3 * w.parts[0][0].nbytes
    assert report.buffers["x"].loaded == 2 * (30 + 2 + 32 + 0 + 8) * 256 * 4


@pytest.mark.parametrize(
    "name", thinned([("lloyd", 2, 256), ("lloyd", 3, 256), ("lloyd", 4, 256), ("iq4_nl", 4, 16)], 3), ids=str
)
def test_codes_and_levels_are_read_once_a_block_of_32(name):
    """Not once a weight."""
    w, levels = packed(name, 32, columns=COLUMNS), 2 ** name[1] if name[0] == "lloyd" else 2
    with running(Options(mode="count")) as simulator:
        tiles._launch(rows_of(32, COLUMNS, mx.float16), w, {}, 32, 32)
    ((_, report),) = simulator.reports
    assert report.buffers["codes"].loaded == w.parts[0].nbytes
    assert report.buffers["first"].loaded <= 2 * levels * (32 * COLUMNS // 32)
