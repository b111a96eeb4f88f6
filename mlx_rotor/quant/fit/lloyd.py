"""Weights to codebooks: each group's own 2**bits levels, ascending float16, and for each weight the nearest one's code.

Levels are the means of weighted k-means in one dimension. Lloyd's iterations stop at the first local optimum; `search`
and `best` start from the best of many ways to cut the ordered group, and end within a few percent of the global one.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .ordered import Ordered
from .packing import pack_groups
from .rows import HALF_MAX, by_chunks, check
from .search import LEAST, Groups, by_groups


@dataclass(frozen=True)
class Effort:
    """How hard to look.

    Attributes:
        parts: ranges that the ordered group is first cut into, of which the best unions are looked for.
        widest: of those ranges a level may span.
        iterations: of Lloyd's, from there.
    """

    parts: int
    widest: int
    iterations: int

    def share(self, group_size: int) -> int:
        """How many times smaller than usual chunks are, so that the costs of all ranges fit into as much memory."""
        return 1 + self.parts * self.widest // (6 * group_size)


NOTE = "codebooks are lengthened, which adds to this error and takes from the KL: compare that with other modes"
FAST_ITERATIONS = 4
LONGEST = 2.0  # of factors on levels; groups of a few far weights and many small ones lack the most
# Above the global optimum, in groups of 256 normal or Student (5) weights with and without importance: `search` at most
# 0.7, 0.9 and 3.1 % at 2, 3 and 4 bits, `best` 0.2, 0.2 and 0.5 %.
SEARCH = {2: Effort(16, 16, 4), 3: Effort(24, 9, 4), 4: Effort(32, 6, 4)}
BEST = {2: Effort(24, 24, 8), 3: Effort(48, 18, 8), 4: Effort(64, 12, 8)}
EFFORTS = {"search": SEARCH, "best": BEST}


def fit_lloyd(
    w: mx.array,
    *,
    bits: int,
    group_size: int = 256,
    fit: str = "search",
    importance: mx.array | None = None,
    whole: bool = True,
) -> tuple[mx.array, ...]:
    """Weights [.., K] of any floating dtype, finite, as (codes uint32 [.., K*bits/32], codebooks float16
    [.., K/group_size * 2**bits]).

    `fast` is a few iterations from levels as dense as the cube root of the weights' density, and ignores `importance`;
    `search` and `best` minimise sum(importance * (w - decoded)**2) in every group and never leave more than `fast`.
    `importance` >= 0 broadcasts to w: [K], or [E, 1, K] for experts. Evaluates what it returns.

    Means of ranges are shorter than what they are means of: at 2 bits a group keeps 0.89 of its length along itself,
    and a gated layer multiplies two such. `whole` then lengthens each group's levels by what they lack: more squared
    error, but less divergence of the model's predictions.

    Raises:
        RotorError: bits, a group size or an importance that don't go with w; weights beyond float16.
    """
    check(w, "lloyd", bits, group_size, HALF_MAX)

    def work(rows: mx.array, heeded: mx.array | None) -> tuple[mx.array, ...]:
        x = by_groups(rows.astype(mx.float32), group_size)
        seen = None if heeded is None or fit == "fast" else by_groups(heeded, group_size)
        groups = Groups.of(x, seen, mx.float16)
        levels = levels_of(groups, bits, fit, whole)
        books = (levels * groups.unit).astype(mx.float16).transpose(1, 2, 0).reshape(rows.shape[0], -1)
        return pack_groups(nearest(groups.w, levels), bits), books

    return by_chunks(w, importance, work, 1 if fit == "fast" else EFFORTS[fit][bits].share(group_size))


def levels_of(groups: Groups, bits: int, fit: str, whole: bool) -> mx.array:
    """Levels [2**bits, *n] of groups, in their units, ascending, as they are stored; `whole` as in `fit_lloyd`."""
    ordered = Ordered.of(groups.w, groups.importance)
    plain = ordered if groups.importance is None else ordered.alike()
    levels = _fast(plain, bits)
    if fit != "fast":
        effort = EFFORTS[fit][bits]
        parts = min(effort.parts, groups.w.shape[0])
        found = ordered.best(ordered.spread(parts), 2**bits, min(effort.widest, parts))
        found = ordered.iterated(found, effort.iterations)
        better = _rounded(groups, ordered, found) < _rounded(groups, ordered, levels)
        levels = mx.where(better, found, levels)
    levels = levels + ordered.centre
    if whole:
        most = HALF_MAX / groups.unit
        levels = mx.clip(levels * _lengthening(groups, levels), -most, most)
    return groups.stored(levels)


def _fast(ordered: Ordered, bits: int) -> mx.array:
    cuts = ordered.spread(2**bits)
    return ordered.iterated(ordered.means(cuts, ordered.starting(cuts)), FAST_ITERATIONS)


def _rounded(groups: Groups, ordered: Ordered, levels: mx.array) -> mx.array:
    """Error of levels less the centre once they are stored."""
    return ordered.error(groups.stored(levels + ordered.centre) - ordered.centre)


def _lengthening(groups: Groups, levels: mx.array) -> mx.array:
    """The factor [1, *n] on what is decoded that leaves along the weights all of their length."""
    decoded = mx.take_along_axis(levels, nearest(groups.w, levels), axis=0)
    whole, along = groups.mean(groups.w * groups.w), groups.mean(groups.w * decoded)
    return mx.where(along > 0, mx.minimum(whole / mx.maximum(along, LEAST), LONGEST), 1)


def nearest(w: mx.array, levels: mx.array) -> mx.array:
    """Codes [g, *n] of the levels [k, *n], ascending, that are closest to w [g, *n]; the lower one of two."""
    between = (levels[1:] + levels[:-1]) * 0.5
    return (w[None] > between[:, None]).astype(mx.uint8).sum(axis=0).astype(mx.uint32)
