"""The route kernel in the simulator against its reference: shapes, dtypes, layouts, ties, mutations."""

import mlx.core as mx
import numpy as np
import pytest

from grids import grid, thinned
from kernel_cases import (
    SCHEDULES,
    TOLERANCE,
    barriers,
    distance,
    mutated,
    needs_kernels,
    needs_simulator,
    objections,
    running,
)
from mlx_rotor import RotorError
from mlx_rotor.kernels import check_results
from mlx_rotor.kernels.check_results import Failure
from mlx_rotor.kernels.experts import routing
from mlx_rotor.kernels.experts.routing import Routing, route, route_metal, route_reference, sorted_partition

MINIMAX = Routing("sigmoid", True, epsilon=1e-20)
MIXTRAL = Routing("softmax_of_chosen", False)
QWEN3 = Routing("softmax", True, ascending=True)
DEEPSEEK = Routing("sigmoid", True, 2.5, 1e-20, upcast=True, groups=4, kept=2)
KINDS = {"minimax": MINIMAX, "mixtral": MIXTRAL, "qwen3": QWEN3, "deepseek": DEEPSEEK}


def logits(tokens, experts, dtype=mx.float32, seed=0):
    """Many of them equal."""
    rng = np.random.default_rng([seed, tokens, experts])
    x = rng.standard_normal((tokens, experts)).astype(np.float32)
    return mx.array(np.where(rng.random(x.shape) < 0.5, np.round(x), x)).astype(dtype)


def correction(experts, dtype=mx.float32):
    return mx.array(np.random.default_rng(experts).integers(0, 4, experts) / 4).astype(dtype)


def off(x, k, how, bias=None, dtype=None):
    """How far weights are from the reference's, infinitely where another expert is chosen."""
    indices, weights = route_metal(x, k, how, bias, dtype)
    want_indices, want = route_reference(x, k, how, bias, dtype, partition=sorted_partition)
    assert (weights.dtype, indices.dtype) == (want.dtype, mx.uint32)
    if np.array(indices).tolist() != np.array(want_indices).tolist():
        return np.inf
    return distance(weights, want)


def agree(*args, options=None, **how):
    with running(options) as simulator:
        assert off(*args, **how) <= TOLERANCE[args[0].dtype]
    assert simulator.objections == []
    return [report for _, report in simulator.reports]


@needs_kernels
@grid(1, kind=list(KINDS), dtype=[mx.float32, mx.float16, mx.bfloat16])
def test_kinds_and_dtypes(kind, dtype):
    bias = correction(24) if kind in ("minimax", "deepseek") else None
    agree(logits(3, 24, dtype), 5, KINDS[kind], bias)


@needs_kernels
@pytest.mark.parametrize("tokens", thinned(range(1, 10), 4))
def test_every_number_of_tokens(tokens):
    agree(logits(tokens, 40), 4, MINIMAX, correction(40))


@needs_kernels
@pytest.mark.parametrize(
    ("experts", "k"),
    thinned(
        [(1, 1), (4, 2), (7, 7), (31, 3), (32, 32), (100, 16), (129, 1), (1000, 8)],
        [(1, 1), (7, 7), (32, 32), (1000, 8)],
        spread=True,
    ),
)
def test_numbers_of_experts(experts, k):
    agree(logits(2, experts), k, QWEN3)


@needs_kernels
@pytest.mark.parametrize(("groups", "kept", "best_of"), [(2, 1, 2), (8, 3, 1), (32, 5, 2), (8, 8, 2)])
def test_groups(groups, kept, best_of):
    how = Routing("softmax", False, 3.0, groups=groups, kept=kept, best_of=best_of)
    agree(logits(3, 64), 6, how, correction(64))


@needs_kernels
def test_layouts_and_the_dtype_of_weights():
    x = logits(6, 64)
    agree(x[1:5, ::2], 4, MINIMAX, correction(64)[::2])
    agree(mx.contiguous(x.T).T, 4, MIXTRAL)
    agree(x[:1, :6], 2, MINIMAX, correction(6))
    agree(x.astype(mx.bfloat16), 4, Routing("sigmoid", True, upcast=True), dtype=mx.float16)


@needs_kernels
@pytest.mark.parametrize("how", [MIXTRAL, Routing("softmax_of_chosen", False, ascending=True)], ids=str)
def test_what_is_no_number_has_a_place(how):
    x = logits(3, 50)
    x[0, 7], x[0, 40], x[1, 3], x[1, 4], x[2, :] = mx.nan, -mx.nan, mx.inf, -mx.inf, mx.nan
    with running() as simulator:
        indices, _ = route_metal(x, 6, how)
    want, _ = route_reference(x, 6, how, partition=sorted_partition)
    assert np.array(indices).tolist() == np.array(want).tolist() and simulator.objections == []
    chosen = np.array(indices)
    assert (7 in chosen[0] and 40 in chosen[0]) == how.ascending and 3 in chosen[1] and 4 not in chosen[1]


@needs_simulator
@grid(1, kind=list(KINDS), options=SCHEDULES)
def test_no_schedule_matters(kind, options):
    agree(logits(3, 136), 8, KINDS[kind], options=options)


@needs_simulator
def test_traffic():
    """Logits are read once, in whole lines."""
    x = logits(4, 256)
    (report,) = agree(x, 8, MINIMAX, correction(256))
    assert report.buffers["logits"].loaded == x.nbytes
    assert report.line_use(["logits"]) == 0.25, "a lane's four neighbours one by one"
    assert report.buffers["indices"].stored == report.buffers["weights"].stored == 4 * 8 * 4


@pytest.mark.parametrize(
    ("shape", "k", "how", "says"),
    [
        ((2, 8), 9, MIXTRAL, "9 of 8 experts"),
        ((2, 2048), 9, MIXTRAL, "9 of 2048 experts"),
        ((2, 12), 2, Routing("sigmoid", True, groups=5, kept=2), "5 groups of 12 experts"),
        ((2, 12), 2, Routing("sigmoid", True, groups=12, kept=2), "12 groups of 1 experts"),
        ((2, 12), 2, Routing("tanh", True), "scores 'tanh' are none of sigmoid"),
        ((2, 3, 12), 2, MIXTRAL, r"not \(2, 3, 12\)"),
    ],
)
def test_what_is_not_taken_is_named(shape, k, how, says):
    with pytest.raises(RotorError, match=says):
        route_metal(mx.zeros(shape), k, how)


def test_a_bias_of_other_experts_is_an_error():
    with pytest.raises(RotorError, match=r"shape \(12,\), not \(11,\)"):
        route_metal(mx.zeros((2, 12)), 2, MINIMAX, mx.zeros(11))


def test_nothing_to_route():
    indices, weights = route_metal(mx.zeros((0, 8), mx.bfloat16), 2, MIXTRAL)
    assert (indices.shape, weights.shape, weights.dtype) == ((0, 2), (0, 2), mx.bfloat16)


def test_the_backend_decides_and_a_kernel_that_failed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(routing, "backend", lambda: "metal")
    check_results.forget()
    check_results.record(["route: bad"], [Failure("route: bad", "route", (), "float32")])
    with pytest.raises(RotorError, match="route: bad"):
        route(mx.zeros((1, 8)), 2, MIXTRAL)
    monkeypatch.setattr(routing, "backend", lambda: "reference")
    indices, weights = route(logits(2, 8), 2, MIXTRAL)
    picked = mx.take_along_axis(logits(2, 8), indices, axis=-1)
    assert np.allclose(np.sort(np.array(picked)), np.sort(np.array(mx.topk(logits(2, 8), 2))))
    assert np.allclose(np.array(weights).sum(axis=-1), 1)
    check_results.forget()


def equal_groups():
    """Two of the four groups are alike, and some compared values are below 0, which dropped ones become."""
    x, bias = np.array(logits(2, 24)), np.array(correction(24)) - 1
    x[:, 6:12], bias[6:12] = x[:, 12:18], bias[12:18]
    return off(mx.array(x), 5, Routing("sigmoid", True, 2.5, 0.25, groups=4, kept=2), mx.array(bias))


def two_best():
    """The second and the third group are equal, and one of them is taken from."""
    x = mx.array([[2, 2.2, -9, 1.5, 1, -9, 1.5, 1, -9, -3, -3, -3]])
    return off(x, 4, Routing("sigmoid", False, groups=4, kept=2))


def best_groups():
    """Groups with one large score are kept, not those with two."""
    x = mx.array([[-1.0, 0, 3, -9, 2, 2, 2.5, 1, 2, 2, 2, 2]])
    return off(x, 3, Routing("sigmoid", True, floor=9.0, groups=3, kept=1, best_of=1))


def of_all():
    return off(zeros_and_ones(139), 4, Routing("softmax", False, ascending=True))


def of_chosen():
    return off(zeros_and_ones(139), 6, Routing("softmax_of_chosen", False, 1.5), mx.full((139,), -0.0))


def zeros_and_ones(experts):
    """Zeros of both signs, which are equal, a few ones."""
    rng = np.random.default_rng(experts)
    return mx.array(rng.choice(np.array([-1, -0.0, 0.0, 1], np.float32), (2, experts), p=[0.5, 0.25, 0.24, 0.01]))


CASES = {case.__name__: case for case in (equal_groups, two_best, best_groups, of_all, of_chosen)}


@needs_simulator
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_wrong_without_a_mistake(case):
    assert objections(CASES[case]) == []


@needs_simulator
@pytest.mark.parametrize(("path", "call", "at"), barriers("experts/route.h"), ids=lambda x: str(x)[:24])
def test_a_missing_barrier_is_seen(path, call, at, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, path, call, "", at):
        assert objections(equal_groups)


@needs_simulator
@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("of_chosen", "(bits >> 31) ? ~bits : bits | 0x80000000u", "bits"),
        ("of_chosen", "size == 0 ? 0x80000000u : place", "place"),
        ("equal_groups", "(x < 0) ? y : 1 - y", "(x < 0) ? 1 - y : y"),
        ("of_all", "4 * lane + slot % 4", "4 * lane + slot % 3"),
        ("of_all", "lane == block ? sum : mine", "sum"),
        ("of_all", "How::E ? A(metal::fast", "500 ? A(metal::fast"),
        ("equal_groups", "place > second", "place > first"),
        ("two_best", "next = best;", ""),
        ("best_groups", "How::BEST_OF == 1 ?", "How::BEST_OF == 3 ?"),
        ("equal_groups", "&& group < lane", ""),
        ("two_best", "&& group < lane", "&& group > lane"),
        ("equal_groups", "before >= How::GROUPS - How::KEPT", "before > How::GROUPS - How::KEPT"),
        ("equal_groups", "value[i] : R(0);", "value[i] : R(-9);"),
        ("of_chosen", "i = 4 * lane; i < 4 * lane + 4", "i = 4 * lane; i < 4 * lane + 3"),
        ("equal_groups", "chosen[i] + sum", "chosen[0] + sum"),
        ("best_groups", "sum < S(floor) ? S(floor) : sum", "sum"),
        ("equal_groups", "S(sum + S(epsilon))", "sum"),
        ("equal_groups", "weight * S(scaling)", "weight"),
        ("of_all", "e < How::E ? S(logits", "e <= How::E ? S(logits"),
        ("equal_groups", "e < How::E ? R(R(score", "e <= How::E ? R(R(score"),
        ("equal_groups", "R(score[i]) + R(bias[e])", "R(score[i])"),
        ("equal_groups", "chosen[position] = score[i]", "chosen[position] = S(value[i])"),
        ("of_all", "? place : 0;", "? place : 0xffffffffu;"),
        ("of_all", "rank[i] >= best :", "rank[i] > best :"),
        ("of_chosen", "rank[i] > best;", "rank[i] >= best;"),
        ("of_all", "simd_max(best == top ? which : 0u)", "simd_min(best == top ? which : 0xffffffffu)"),
        ("of_chosen", "rank[i] = 0;", ""),
        ("of_all", "How::K - 1 - taken : taken", "taken : taken"),
        ("of_all", "if (lane < How::K)", "if (lane <= How::K)"),
        ("of_all", "if (lane < How::K)", "if (lane + 1 < How::K)"),
        ("of_all", "strides[1]", "strides[0]"),
    ],
)  # fmt: skip
def test_a_loose_bound_or_a_wrong_operation_is_seen(case, old, new, monkeypatch, tmp_path):
    with mutated(monkeypatch, tmp_path, "experts/route.h", old, new):
        assert objections(CASES[case])
