"""Traffic of decode attention against the bytes that must move, with MLX's own attention in the same harness."""

import mlx.core as mx
import numpy as np
import pytest

from grids import thinned
from kernel_cases import needs_simulator
from metal_sim.bench import kernel_traffic as traffic
from mlx_rotor.kernels import metal

pytestmark = needs_simulator
PAIRS = [
    ("turbo4", "turbo2"),
    ("turbo2", "turbo2"),
    ("trellis3", "trellis3"),
    ("trellis4", "trellis2"),
    ("iso2", "iso2"),
]


@pytest.mark.parametrize(("tokens", "most"), thinned([(4096, 1.20), (16384, 1.10)], 2, spread=True))
@pytest.mark.parametrize("pair", thinned(PAIRS, 2), ids="-".join)
def test_decode_moves_little_more_than_it_must(pair, tokens, most):
    """One of the eight KV heads with its four query heads: the others move the same."""
    row = traffic.decode(pair, tokens, heads=4, kv_heads=1, model=False)
    assert row.needed < row.moved <= most * row.needed
    assert row.line_use >= 0.9
    assert row.launches == 2


@pytest.mark.parametrize("pair", thinned([("turbo4", "turbo2"), ("trellis3", "trellis3")], 2), ids="-".join)
@pytest.mark.parametrize("tokens", thinned([4096, 16384], 2))
def test_means_cost_little_more_than_their_bytes(tokens, pair):
    bare, centred = (traffic.decode(pair, tokens, heads=4, kv_heads=1, model=False, span=span) for span in (None, 256))
    assert centred.needed == bare.needed + 256 * (tokens // 256 + 1)
    assert centred.bytes_ratio <= 1.005 * bare.bytes_ratio and centred.line_use >= 0.9
    assert centred.launches == 2


def test_segments_move_no_more_than_one_body():
    one, four = (traffic.decode(PAIRS[0], 8192, heads=4, kv_heads=1, model=False, segments=n) for n in (1, 4))
    assert four.needed == one.needed and four.moved <= 1.01 * one.moved
    assert four.launches == 5


def test_eight_heads_move_eight_times_one_heads_bytes():
    one, eight = (traffic.decode(PAIRS[0], 512, heads=4 * n, kv_heads=n, model=False) for n in (1, 8))
    assert (eight.moved, eight.needed) == (8 * one.moved, 8 * one.needed)


def test_mlx_reads_each_key_once_per_query_head():
    row = traffic.stock(2048, heads=4, kv_heads=1, model=False)
    assert 3.9 < row.bytes_ratio < 4.1


def test_a_kernel_that_reads_twice_is_seen():
    with traffic.counted("count") as tally:
        double = metal.kernel(
            "twice", (), ("x",), ("y",), "uint i = thread_position_in_grid.x; y[i] = x[i] + x[(i + 1) % 64];"
        )
        double(
            inputs=[mx.array(np.arange(64, dtype=np.float32))],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )
    assert tally.moved == 3 * 256
    assert tally.line_use < 1
