"""A token's experts and their weights from its router logits.

`route_metal` launches `experts/route.h`, held against `route_reference`, the operations of the models themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from ...errors import RotorError
from .. import check_results, metal
from ..launch import backend
from ..spec import DTYPES

MAX_EXPERTS, MAX_CHOSEN, MAX_GROUPS = 1024, 32, 32
SCORES = {"sigmoid": 0, "softmax": 1, "softmax_of_chosen": 2}  # MLX_ROTOR_SIGMOID ...

# Indices of all in an order whose first k + 1 are as a sort has them: mx.argpartition's.
Partition = Callable[..., mx.array]


@dataclass(frozen=True)
class Routing:
    """How a model chooses experts from router logits.

    Attributes:
        scores: "sigmoid" or "softmax" of all logits; "softmax_of_chosen": logits are compared, and the weights are a
            softmax of the chosen ones.
        normalize: weights are divided by their sum, at least `floor`, plus `epsilon`.
        scaling: the factor of the weights in the end.
        ascending: the model takes the last ones of a partition of the scores, which end with the best; else the first
            ones of a partition of the negated scores. This decides which of equal scores are taken, and their order.
        upcast: logits become float32 first.
        precise: softmax adds in float32, whatever the scores' dtype.
        groups: experts are so many groups of neighbours. The `kept` groups with the largest sums of their `best_of`
            best scores take part; scores of all other groups are compared as 0.
    """

    scores: Literal["sigmoid", "softmax", "softmax_of_chosen"]
    normalize: bool
    scaling: float = 1.0
    epsilon: float = 0.0
    floor: float = 0.0
    ascending: bool = False
    upcast: bool = False
    precise: bool = True
    groups: int = 1
    kept: int = 1
    best_of: int = 2

    def why_not(self, experts: int, k: int) -> str:
        """The reason why the kernel can't choose k of so many experts; "" where it can."""
        if self.scores not in SCORES:
            return f"scores {self.scores!r} are none of {', '.join(SCORES)}"
        if not 1 <= experts <= MAX_EXPERTS or not 1 <= k <= min(experts, MAX_CHOSEN):
            return f"{k} of {experts} experts: at most {MAX_CHOSEN} of {MAX_EXPERTS}"
        if self.groups > 1 and (self.groups > MAX_GROUPS or experts % self.groups or self.best_of not in (1, 2)):
            return f"{self.groups} groups of {experts} experts by their {self.best_of} best"
        if self.groups > 1 and not (
            1 <= self.kept <= self.groups and self.best_of <= experts // self.groups and k <= experts
        ):
            return f"{self.kept} of {self.groups} groups of {experts // self.groups} experts"
        return ""


def route(
    logits: mx.array, k: int, how: Routing, bias: mx.array | None = None, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """The k experts of every token and their weights, those of the stock model on Metal to the bit.

    Equal scores are in the order of their indices; a logit that is no number comes last among those that are compared
    in descending order and first otherwise, as MLX's sort has it.

    Args:
        logits: [T, E], float32, float16 or bfloat16.
        bias: [E], added to scores where they are compared.
        dtype: of the weights; None: what the model's own operations give.

    Returns:
        (indices uint32 [T, k], weights [T, k]).

    Raises:
        RotorError: for what the kernel does not take, or if it failed its check on this machine.
    """
    if backend() == "reference":
        return route_reference(logits, k, how, bias, dtype)
    check_results.refuse_weights("route", logits.dtype)
    return route_metal(logits, k, how, bias, dtype)


def route_reference(
    logits: mx.array,
    k: int,
    how: Routing,
    bias: mx.array | None = None,
    dtype: mx.Dtype | None = None,
    partition: Partition = mx.argpartition,
) -> tuple[mx.array, mx.array]:
    """`route` by the operations that models use. MLX's partition on a CPU has its own order of equal scores;
    `sorted_partition` has the order of Metal everywhere."""
    scores = logits.astype(mx.float32) if how.upcast else logits
    if how.scores == "sigmoid":
        scores = mx.sigmoid(scores)
    elif how.scores == "softmax":
        scores = mx.softmax(scores, axis=-1, precise=how.precise)
    compared = scores if bias is None else scores + bias
    if how.groups > 1:
        compared = _best_groups(compared, how, partition)
    if how.ascending:
        indices = partition(compared, kth=-k, axis=-1)[..., -k:]
    else:
        indices = partition(-compared, kth=k - 1, axis=-1)[..., :k]
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if how.scores == "softmax_of_chosen":
        weights = mx.softmax(weights, axis=-1, precise=how.precise)
    if how.normalize:
        total = weights.sum(axis=-1, keepdims=True)
        total = mx.maximum(total, how.floor) if how.floor else total
        weights = weights / (total + how.epsilon)
    weights = weights * how.scaling
    return indices, weights if dtype is None else weights.astype(dtype)


def sorted_partition(x: mx.array, kth: int, axis: int) -> mx.array:
    """mx.argpartition as Metal has it: a stable sort, what is no number last."""
    return mx.argsort(x, axis=axis)


def route_metal(
    logits: mx.array, k: int, how: Routing, bias: mx.array | None = None, dtype: mx.Dtype | None = None
) -> tuple[mx.array, mx.array]:
    """`route` in one launch. Raises as `route`."""
    if logits.ndim != 2 or logits.dtype not in DTYPES:
        raise RotorError(f"router logits are [tokens, experts] of a float dtype, not {logits.shape} {logits.dtype}")
    tokens, experts = logits.shape
    kind = None if bias is None else (bias.shape, bias.dtype)
    made, out = _kernel(experts, logits.dtype, k, how, kind, dtype)
    if tokens == 0:
        return mx.zeros((0, k), mx.uint32), mx.zeros((0, k), out)
    indices, weights = made(
        inputs=[logits] if bias is None else [logits, mx.contiguous(bias)],
        output_shapes=[(tokens, k), (tokens, k)],
        output_dtypes=[mx.uint32, out],
        grid=(32 * tokens, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return indices, weights


@metal.kept
def _kernel(
    experts: int,
    logits: mx.Dtype,
    k: int,
    how: Routing,
    bias: tuple[tuple[int, ...], mx.Dtype] | None,
    dtype: mx.Dtype | None,
) -> tuple[Callable[..., list[mx.array]], mx.Dtype]:
    """The kernel and the dtype of weights, for logits [T, experts] of dtype `logits`."""
    if why := how.why_not(experts, k):
        raise RotorError(f"no kernel routes {why}")
    if bias is not None and bias[0] != (experts,):
        raise RotorError(f"a bias of {experts} experts has shape ({experts},), not {bias[0]}")
    score = mx.float32 if how.upcast else logits
    compared = score if bias is None else (mx.zeros((), score) + mx.zeros((), bias[1])).dtype
    sums = DTYPES[mx.float32 if how.precise else score]
    groups = (how.groups, how.kept, how.best_of) if how.groups > 1 else (1, 1, 1)
    made = metal.kernel(
        "route",
        ("experts/route.h",),
        ("logits",) if bias is None else ("logits", "bias"),
        ("indices", "weights"),
        f"""
  using How = Routing<{experts}, {k}, {SCORES[how.scores]}, {_word(how.ascending)}, {_word(how.normalize)},
      {DTYPES[score]}, {DTYPES[compared]}, {sums}, {groups[0]}, {groups[1]}, {groups[2]}>;
  threadgroup How::R compared[{experts if how.groups > 1 else 1}];
  threadgroup How::S chosen[{k}];
  route<How>(logits, logits_strides, {"NoBias()" if bias is None else "bias"},
      {_literal(how.floor)}, {_literal(how.epsilon)}, {_literal(how.scaling)},
      indices, weights, compared, chosen, threadgroup_position_in_grid.x, thread_index_in_simdgroup);
""",
    )
    return made, score if dtype is None else dtype


def _best_groups(compared: mx.array, how: Routing, partition: Partition) -> mx.array:
    """0 in all but the best groups."""
    split = mx.unflatten(compared, axis=-1, shape=(how.groups, -1))
    if how.best_of == 1:
        best = split.max(axis=-1, keepdims=True)
    else:
        best = mx.topk(split, how.best_of, axis=-1).sum(axis=-1, keepdims=True)
    if (dropped := how.groups - how.kept) > 0:
        worst = partition(best, kth=dropped - 1, axis=-2)[..., :dropped, :]
        split = mx.put_along_axis(split, worst, mx.array(0.0, split.dtype), axis=-2)
    return mx.flatten(split, -2, -1)


def _word(value: bool) -> str:
    return "true" if value else "false"


def _literal(value: float) -> str:
    return f"{float(value)!r}f"
