"""Codebooks (hipfire's MQ-Lloyd): a group of weights has its own 2**bits levels, ascending, and a code says which.

Levels are the means of weighted k-means in one dimension. Lloyd's iterations stop at the first local optimum; `search`
and `best` start from the best of many ways to cut the ordered group, and end within a few percent of the global one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ...fit.feedback import LONGEST, NO_CURVATURE, Grid, Stored, rounded
from ...fit.ordered import Ordered
from ...fit.packing import pack_groups
from ...fit.rows import HALF_MAX, by_chunks
from ...fit.search import LEAST, Groups, by_groups
from .base import Errors, Format, codes


def decode(parts: Sequence[mx.array], columns: int, bits: int, group_size: int) -> mx.array:
    words, books = parts
    lead, groups = words.shape[:-1], columns // group_size
    chosen = codes(words, bits).astype(mx.uint32).reshape(*lead, groups, group_size)
    levels = books.astype(mx.float32).reshape(*lead, groups, 2**bits)
    return mx.take_along_axis(levels, chosen, axis=-1).reshape(*lead, columns)


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


FAST_ITERATIONS = 4
# Above the global optimum, in groups of 256 normal or Student (5) weights with and without importance: `search` at most
# 0.7, 0.9 and 3.1 % at 2, 3 and 4 bits, `best` 0.2, 0.2 and 0.5 %.
SEARCH = {2: Effort(16, 16, 4), 3: Effort(24, 9, 4), 4: Effort(32, 6, 4)}
BEST = {2: Effort(24, 24, 8), 3: Effort(48, 18, 8), 4: Effort(64, 12, 8)}
EFFORTS = {"search": SEARCH, "best": BEST}


class Lloyd(Format):
    """`fast` is a few iterations from levels as dense as the cube root of the weights' density.

    `search` and `best` never leave more weighted squared error than `fast`, before levels are lengthened.
    """

    mode = "lloyd"
    all_bits, group_sizes = (2, 3, 4), (256, 128, 64)
    beside, beside_dtype = ("codebooks",), mx.float16
    header = "lloyd.h"
    decoder = staticmethod(decode)
    errors: ClassVar[Errors] = {
        (2, 64): (0.1049, 0.1033, 0.1033),
        (2, 128): (0.1144, 0.1136, 0.1135),
        (2, 256): (0.1194, 0.1189, 0.1188),
        (3, 64): (0.02255, 0.0201, 0.01998),
        (3, 128): (0.02764, 0.02599, 0.02585),
        (3, 256): (0.03092, 0.02993, 0.02981),
        (4, 64): (0.003822, 0.003044, 0.00298),
        (4, 128): (0.005677, 0.005006, 0.004875),
        (4, 256): (0.007077, 0.006569, 0.006434),
    }
    note = "codebooks are lengthened, which adds to this error and takes from the KL: compare that with other modes"

    @property
    def per_group(self) -> int:
        return int(2**self.bits)

    def metal(self, element: str) -> str:
        return f"LloydWeights<{self.bits}, {self.group_size}, {element}>"

    def fitted(self, w: mx.array, method: str, importance: mx.array | None, whole: bool = True) -> tuple[mx.array, ...]:
        """(codes uint32 [.., K*bits/32], codebooks float16 [.., K/group_size * 2**bits]).

        Means of ranges are shorter than what they are means of: at 2 bits a group keeps 0.89 of its length along
        itself, and a gated layer multiplies two such. `whole` then lengthens each group's levels by what they lack:
        more squared error, but less divergence of the model's predictions.
        """
        bits, group_size = self.bits, self.group_size

        def work(rows: mx.array, heeded: mx.array | None) -> tuple[mx.array, ...]:
            x = by_groups(rows.astype(mx.float32), group_size)
            seen = None if heeded is None or method == "fast" else by_groups(heeded, group_size)
            groups = Groups.of(x, seen, mx.float16)
            levels = levels_of(groups, bits, method, whole)
            books = (levels * groups.unit).astype(mx.float16).transpose(1, 2, 0).reshape(rows.shape[0], -1)
            return pack_groups(nearest(groups.w, levels), bits), books

        return by_chunks(w, importance, work, 1 if method == "fast" else EFFORTS[method][bits].share(group_size))

    def grid(self, method: str) -> Grid:
        return LloydGrid(self.bits, method)


class LloydGrid:
    """A group's grid for error feedback: 2**bits levels, float16, ascending. A code is a level's number."""

    def __init__(self, bits: int, fit: str) -> None:
        self.bits, self.fit = bits, fit

    def fitted(self, wanted: mx.array, importance: mx.array) -> Stored:
        groups = Groups.of(wanted, importance, mx.float16)
        return (levels_of(groups, self.bits, self.fit, whole=False) * groups.unit,)

    def nearest(self, x: mx.array, stored: Stored) -> mx.array:
        return nearest(x, stored[0])

    def values(self, codes: mx.array, stored: Stored) -> mx.array:
        return mx.take_along_axis(stored[0], codes, axis=0)

    def refitted(self, codes: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> Stored:
        """Level by level, each between its neighbours."""
        levels = list(mx.split(stored[0], stored[0].shape[0]))
        for number, level in enumerate(levels):
            here = (codes == number).astype(mx.float32)
            curved = inner @ here
            curvature, pull = ((here * x).sum(axis=0, keepdims=True) for x in (curved, slope))
            new = level + pull / mx.maximum(curvature, NO_CURVATURE)
            if number:
                new = mx.maximum(new, levels[number - 1])
            if number + 1 < len(levels):
                new = mx.minimum(new, levels[number + 1])
            step = rounded(new, mx.float16) - level
            step = mx.where(step * (step * curvature - 2 * pull) < 0, step, 0)
            levels[number], slope = level + step, slope - step * curved
        return (mx.concatenate(levels),)

    def lengthened(self, stored: Stored, factor: mx.array) -> Stored:
        return (rounded(mx.clip(stored[0] * factor, -HALF_MAX, HALF_MAX), mx.float16),)

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        books = mx.stack([levels for (levels,) in stored], axis=0).astype(mx.float16)  # [groups, k, R]
        return pack_groups(mx.stack(list(codes), axis=2), self.bits), books.reshape(-1, books.shape[-1]).T


def levels_of(groups: Groups, bits: int, fit: str, whole: bool) -> mx.array:
    """Levels [2**bits, *n] of groups, in their units, ascending, as they are stored; `whole` as in `Lloyd.fitted`."""
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
