"""Groups of weights in ascending order: what a cut into ranges costs, and where ranges are best cut.

The best ranges are the clusters of one-dimensional k-means, weighted. With running sums an iteration of Lloyd's looks
at the cuts alone, so that it costs next to nothing beside the sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

NOTHING = 1e-30


@dataclass(frozen=True)
class Ordered:
    """`w`: [g, *n] float32, ascending, less `centre` [1, *n]; g is a power of two, g weights of a group in a column.

    `counts`: [g, *n] what each squared error counts. `sums`: [g + 1, *n] each, of counts, counts * w and
    counts * w * w up to a position; from the middle outwards, so that a far weight spoils no others' digits.
    """

    w: mx.array
    counts: mx.array
    centre: mx.array
    sums: tuple[mx.array, mx.array, mx.array]

    @classmethod
    def of(cls, w: mx.array, importance: mx.array | None) -> Ordered:
        """From weights [g, *n] in any order and an importance [g, *m], *m broadcast to *n; None: all alike."""
        size = w.shape[0]
        if importance is None:
            w = mx.sort(w, axis=0)
            counts = mx.full((size, *[1] * (w.ndim - 1)), 1 / size)
        else:
            order = mx.argsort(w, axis=0)
            w = mx.take_along_axis(w, order, axis=0)
            counts = mx.take_along_axis(mx.broadcast_to(importance, w.shape), order, axis=0)
        centre = w[size // 2 : size // 2 + 1]
        w = w - centre
        counts = mx.broadcast_to(counts, w.shape)
        first = counts * w
        return cls(w, counts, centre, (_running(counts), _running(first), _running(first * w)))

    def alike(self) -> Ordered:
        """The same weights, all counting alike."""
        counts = mx.broadcast_to(mx.array(1 / self.w.shape[0]), self.w.shape)
        first = counts * self.w
        return Ordered(self.w, counts, self.centre, (_running(counts), _running(first), _running(first * self.w)))

    def below(self, x: mx.array) -> mx.array:
        """How many weights are at most x: [m, *n] -> uint32 [m, *n]."""
        found = mx.zeros(x.shape, mx.uint32)
        step = self.w.shape[0] // 2
        while step:
            found = found + step * (mx.take_along_axis(self.w, found + (step - 1), axis=0) <= x).astype(mx.uint32)
            step //= 2
        return found + (mx.take_along_axis(self.w, found, axis=0) <= x).astype(mx.uint32)

    def at(self, cuts: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The sums at positions [m, *n]."""
        zero, one, two = (mx.take_along_axis(s, cuts, axis=0) for s in self.sums)
        return zero, one, two

    def iterated(self, levels: mx.array, times: int) -> mx.array:
        """Levels [k, *n], ascending, after so many of Lloyd's iterations; one that nothing is near stays."""
        ends = [mx.zeros(levels[:1].shape, mx.uint32), mx.full(levels[:1].shape, self.w.shape[0], mx.uint32)]
        for _ in range(times):
            cuts = self.below((levels[1:] + levels[:-1]) * 0.5)
            levels = self.means(mx.concatenate([ends[0], cuts, ends[1]]), levels)
        return levels

    def means(self, cuts: mx.array, otherwise: mx.array) -> mx.array:
        """Of the ranges between cuts [k + 1, *n] -> [k, *n], ascending; `otherwise` where a range counts nothing."""
        zero, one, _ = self.at(cuts)
        count = zero[1:] - zero[:-1]
        mean = (one[1:] - one[:-1]) / mx.maximum(count, NOTHING)
        return mx.sort(mx.where(count > NOTHING, mean, otherwise), axis=0)

    def spread(self, parts: int) -> mx.array:
        """Cuts [parts + 1, *n] into ranges that deserve a level each if there were `parts` of them.

        Levels are best as dense as the cube root of what counts there (Panter and Dite 1951); where weights are far
        apart there is a cut on both sides.
        """
        gaps = self.w[1:] - self.w[:-1]
        share = (0.5 * (self.counts[1:] + self.counts[:-1]) * gaps * gaps) ** (1 / 3)
        for _ in range(2):  # a gap that is wider than its range needs no cut inside
            share = mx.minimum(share, share.sum(axis=0, keepdims=True) / parts)
        zeros = mx.zeros(share[:1].shape)
        path = mx.concatenate([zeros, mx.cumsum(share, axis=0)])
        steps = (mx.arange(1, parts) / parts).reshape(-1, *[1] * (share.ndim - 1))
        inner = Ordered(path, self.counts, self.centre, self.sums).below(steps * path[-1:])
        ends = zeros.astype(mx.uint32)
        return mx.concatenate([ends, inner, ends + self.w.shape[0]])

    def best(self, cuts: mx.array, k: int, widest: int) -> mx.array:
        """Means [k, *n] of the k ranges of least squared error whose ends are among cuts [m + 1, *n], none wider than
        `widest` >= m / k of the steps between them: dynamic programming, exact but for that. A range that counts
        nothing repeats a weight at its start."""
        m = cuts.shape[0] - 1
        sums = self.at(cuts)
        nowhere = mx.full((widest, *cuts.shape[1:]), mx.inf)
        costs = []  # of ranges that end at each cut and are so many steps wide, [m + 1, *n]
        for width in range(widest + 1):
            count, first, second = (x[width:] - x[: m + 1 - width] for x in sums)
            cost = mx.maximum(second - first * first / mx.maximum(count, NOTHING), 0)
            costs.append(mx.concatenate([nowhere[:width], cost]))
        cost = mx.stack(costs)
        least, widths = mx.concatenate([cost[width : width + 1, width] for width in range(widest + 1)]), []
        least = mx.concatenate([least, mx.full((m - widest, *cuts.shape[1:]), mx.inf)])
        for _ in range(k - 1):
            behind = mx.concatenate([nowhere, least])
            total = cost + mx.stack([behind[widest - width : widest - width + m + 1] for width in range(widest + 1)])
            chosen = mx.argmin(total, axis=0, keepdims=True)
            least = mx.take_along_axis(total, chosen, axis=0)[0]
            widths.append(chosen[0])
        ends = [mx.full((1, *cuts.shape[1:]), m, mx.uint32)]
        for chosen in reversed(widths):
            ends.append(ends[-1] - mx.take_along_axis(chosen, ends[-1], axis=0))
        ends.append(mx.zeros(ends[0].shape, mx.uint32))
        found = mx.take_along_axis(cuts, mx.concatenate(ends[::-1]), axis=0)
        return self.means(found, self.starting(found))

    def starting(self, cuts: mx.array) -> mx.array:
        """The first weights [k, *n] of the ranges between cuts [k + 1, *n]."""
        return mx.take_along_axis(self.w, mx.minimum(cuts[:-1], self.w.shape[0] - 1), axis=0)

    def error(self, levels: mx.array) -> mx.array:
        """What counts of the squared error of the nearest levels [k, *n]: [1, *n]."""
        ends = mx.zeros(levels[:1].shape, mx.uint32)
        cuts = self.below((levels[1:] + levels[:-1]) * 0.5)
        zero, one, two = self.at(mx.concatenate([ends, cuts, ends + self.w.shape[0]]))
        parts = (two[1:] - two[:-1]) + levels * (levels * (zero[1:] - zero[:-1]) - 2 * (one[1:] - one[:-1]))
        return parts.sum(axis=0, keepdims=True)


def _running(x: mx.array) -> mx.array:
    """Sums [g + 1, *n] of x [g, *n] from its middle to each position, those before it negative."""
    half = x.shape[0] // 2
    low = -mx.cumsum(x[:half], axis=0, reverse=True)
    return mx.concatenate([low, mx.zeros(x[:1].shape), mx.cumsum(x[half:], axis=0)])
