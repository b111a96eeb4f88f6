"""Traffic and launches of the experts at MiniMax's dimensions, against the bytes they must move, and MLX's kernel."""

import pytest

import metal_sim
from metal_sim.bench import expert_traffic as traffic
from metal_sim.bench.expert_traffic import TRIPLES, fused, stock, stock_launches
from mlx_rotor.diagnose.expert_speed import DEMO, MINIMAX, Dims

pytestmark = pytest.mark.skipif(not metal_sim.SUPPORTED, reason=metal_sim.UNSUPPORTED)
SMALL = Dims("small", 512, 512, 16, 4)
MIXED = (("affine", 2, 64), ("affine", 2, 64), ("affine", 3, 64))


def test_a_layer_at_minimax_dimensions_moves_little_more_than_it_must():
    """One expert run of eight: 2-bit gate and up, 3-bit down."""
    gate_up, down, layer = fused(MINIMAX, TRIPLES[MINIMAX][0], run=1, model=False)
    assert layer.needed < layer.moved <= 1.05 * layer.needed and layer.line_use >= 0.95
    assert (gate_up.launches, down.launches, layer.launches) == (1, 1, 3)
    packed = 8 * 3072 * 1536 * (2 * (2 + 32 / 64) + 3 + 32 / 64) / 8
    activations = 2 * (3072 + 8 * 1536 + 8 * 1536 + 3072) + 8 * 256 + 8 * 6
    assert layer.needed == packed + activations
    assert layer.predicted == layer.operations == {}


@pytest.mark.nightly
def test_what_is_run_is_scaled_to_all():
    one, two = (fused(SMALL, MIXED, run=n) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a.needed == b.needed and (a.run, b.run) == (1, 2)
        assert a.moved == pytest.approx(b.moved, rel=0.03) and a.line_use == pytest.approx(b.line_use, rel=0.03)
        assert sum(a.operations.values()) == pytest.approx(sum(b.operations.values()), rel=0.1)
        assert all(t > 0 for t in a.predicted.values())
    gate_up, down, layer = two
    assert layer.moved > gate_up.moved + down.moved
    assert layer.facts()["bytes_ratio"] == layer.moved / layer.needed


@pytest.mark.nightly
def test_mlx_reads_the_token_for_every_eight_rows():
    row = stock(SMALL, MIXED, run=1)
    layer = fused(SMALL, MIXED, run=1, model=False)[2]
    assert row.bytes_ratio > 1.5 > layer.bytes_ratio and row.line_use < layer.line_use
    assert row.launches > 3 * layer.launches and all(t > 0 for t in row.predicted.values())
    assert stock(SMALL, MIXED, run=1, model=False).predicted == {}


def test_stock_launches_are_those_of_the_graph():
    counted = stock_launches()
    assert counted["GatherQMM"] == 3 and counted["ArgPartition"] == counted["Sigmoid"] == counted["GatherAxis"] == 1
    assert counted["Matmul"] == 0, "the router's own"
    assert not set(counted) & traffic.VIEWS and sum(counted.values()) > 12


def test_the_rows_that_are_promised():
    for dims in (MINIMAX, DEMO):
        modes = {mode for triple in TRIPLES[dims] for mode, *_ in triple}
        assert {"affine", "lloyd"} <= modes
    assert (MINIMAX.hidden, MINIMAX.intermediate, MINIMAX.experts, MINIMAX.chosen) == (3072, 1536, 256, 8)
    assert TRIPLES[MINIMAX][0] == MIXED
