"""A batch of sequences of any lengths, in mlx_lm's batch-cache protocol: a list of single caches.

Nothing is padded or copied when rows join or leave. Models see the columns of mlx_lm's own batches: a row's past ends
where the new tokens begin, and a prompt's padding stands behind a row's last token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import RotorError
from ..kernels import ExactSegment
from .rotor import RotorCache
from .view import KVView, Mask, Tokens, causal, causal_mask, views


@dataclass(frozen=True)
class Row:
    """One row's part of an update. All rows have the same number of columns.

    Attributes:
        tokens: the row's tokens; None where the update brought it padding only.
        left: columns in front of its first token.
        held: columns that hold a token of its own.
        real: new columns that hold one.
    """

    tokens: Tokens | None
    left: int
    held: int
    real: int


@dataclass(frozen=True)
class RaggedTokens:
    """The tokens behind a batch's views."""

    rows: Sequence[Row]

    def attend(self, q: mx.array, scale: float, mask: Mask = None, sink_logits: mx.array | None = None) -> mx.array:
        """Attention of q [B, Hq, L, D], row by row, [B, Hq, L, Dv]. Queries of padding give 0."""
        out: list[mx.array | None] = []
        new = q.shape[2]
        for i, row in enumerate(self.rows):
            if row.tokens is None:
                out.append(None)
                continue
            own = row.tokens.attend(q[i : i + 1, :, : row.real], scale, self._own(mask, i, row), sink_logits)
            out.append(own if row.real == new else mx.pad(own, [(0, 0), (0, 0), (0, new - row.real), (0, 0)]))
        like = next(o for o in out if o is not None)  # a step brings at least one row a token
        return mx.concatenate([mx.zeros_like(like) if o is None else o for o in out])

    @staticmethod
    def _own(mask: Mask, i: int, row: Row) -> Mask:
        """Row i's part of a mask over the batch's columns, [B or 1, H or 1, L, columns] or fewer axes."""
        assert row.tokens is not None
        if not isinstance(mask, mx.array) or row.tokens.recognises(mask):
            return mask
        if mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[i : i + 1]
        if mask.shape[-1] > 1:
            mask = mask[..., row.left : row.left + row.held]
        return mask[..., : row.real, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask


class RaggedBatch:
    """A batch over the caches `rows`, each of one sequence. The batch owns them."""

    def __init__(self, rows: list[RotorCache]) -> None:
        self.rows = rows
        # While a right-padded prompt comes in: each row's tokens still to come, and its padding so far.
        self._left: list[int] | None = None
        self._padding = [0] * len(rows)
        # The last update: each row's columns before it, the new columns, and each row's own tokens among them.
        self._step: tuple[list[int], int, list[int]] = ([], 0, [])

    # ------------------------------------------------------------ attention
    @property
    def offset(self) -> mx.array:
        """int32 [B]: the position of each row's next token."""
        return mx.array([row.offset for row in self.rows], mx.int32)

    def _past(self) -> list[int]:
        """Columns of each row up to now, padding included."""
        return [row.held + pad for row, pad in zip(self.rows, self._padding, strict=True)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        """Appends keys, values [B, H, L, D] without padding; views [B, H, columns, D], 0 where a row has no token."""
        if keys.shape[0] != len(self.rows):
            raise RotorError(f"a batch of {len(self.rows)} rows was given {keys.shape[0]}")
        new = keys.shape[2]
        for row in self.rows:
            row.drop_unseen()
        past = self._past()
        real = [new] * len(self.rows) if self._left is None else [min(new, left) for left in self._left]
        # All writes come first: a buffer that an attention of this step refers to would be copied.
        stored = [
            row.append(keys[i : i + 1, :, :n], values[i : i + 1, :, :n]) if n else None
            for i, (row, n) in enumerate(zip(self.rows, real, strict=True))
        ]
        self._step = (past, new, real)
        if self._left is not None:
            self._left = [left - n for left, n in zip(self._left, real, strict=True)]
            self._padding = [pad + new - n for pad, n in zip(self._padding, real, strict=True)]
        return self._views(stored, keys[:1, :, :0], values[:1, :, :0])

    def keys_and_values(self) -> tuple[KVView, KVView]:
        """The last update's tokens once more, for layers that share them."""
        stored = [
            (row.body.length, row.recent.segment()) if n else None
            for row, n in zip(self.rows, self._step[2], strict=True)
        ]
        recent = next(at[1] for at in stored if at is not None)
        return self._views(stored, recent.k[:, :, :0], recent.v[:, :, :0])

    def _views(
        self, stored: Sequence[tuple[int, ExactSegment] | None], none_k: mx.array, none_v: mx.array
    ) -> tuple[KVView, KVView]:
        """Views of the tokens after a step. none_k, none_v: [1, H, 0, D], for rows that have none."""
        past, new, real = self._step
        columns = max(past) + new
        rows, expanded_k, expanded_v = [], [], []
        for i, row in enumerate(self.rows):
            at = stored[i]
            # A row that only padding came to: nobody uses what its queries see.
            tokens, k, v = (None, none_k, none_v) if at is None else row.tokens(*at, none_k.dtype)
            rows.append(Row(tokens, columns - new - past[i], int(k.shape[2]), real[i]))
            padding = [(0, 0), (0, 0), (rows[i].left, columns - rows[i].left - rows[i].held), (0, 0)]
            expanded_k.append(mx.pad(k, padding) if rows[i].held < columns else k)
            expanded_v.append(mx.pad(v, padding) if rows[i].held < columns else v)
        return views(mx.concatenate(expanded_k), mx.concatenate(expanded_v), RaggedTokens(rows))

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask for n new tokens a row: one cache's where rows are equally long, else bool [B, 1, n, columns]."""
        for row in self.rows:
            row.drop_unseen()
        past = self._past()
        if min(past) == max(past) and not any(self._padding):
            return self.rows[0].make_mask(n, return_array, window_size)
        first = self.rows[0]
        left = mx.array([max(past) - p for p in past])[:, None, None, None]
        mask, own = causal(max(past), n, first.window, window_size, first.sinks, left)
        return causal_mask(mask, first.window) if own else mask

    # ------------------------------------------------------------ prompts of unequal length
    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """The prompt that comes next has `lengths` tokens of each row, padded at the right."""
        if left_padding is not None and max(left_padding) > 0:
            raise RotorError("a compressed batch takes no left padding: rows have their own lengths")
        if right_padding is not None and max(right_padding) > 0:
            assert lengths is not None
            self._left = [int(n) for n in lengths]

    def finalize(self) -> None:
        """Ends the padded prompt."""
        self._left, self._padding = None, [0] * len(self.rows)

    # ------------------------------------------------------------ rows
    def filter(self, batch_indices: Any) -> None:
        """Keeps these rows, in this order."""
        keep: list[int] = [int(i) for i in batch_indices]
        self.rows = [self.rows[i] for i in keep]
        self._padding = [self._padding[i] for i in keep]
        self._left = self._left and [self._left[i] for i in keep]

    def extend(self, other: RaggedBatch) -> None:
        """Takes the other batch's rows behind its own."""
        self.rows = self.rows + other.rows
        self.finalize()

    def extract(self, i: int) -> RotorCache:
        """Row i as a cache of its own; the row stays as it is."""
        return copy.deepcopy(self.rows[i])

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Forgets the last n tokens of every row, or as many as the shortest has."""
        n = min([n, *(row.held for row in self.rows)])
        for row in self.rows:
            row.trim(n)
        return n

    def size(self) -> int:
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def state(self) -> list[Any]:
        """The rows' states, for evaluation."""
        return [row.state for row in self.rows]

    @property
    def keys(self) -> mx.array | None:
        """An array that later attention reads, see `RotorCache.keys`."""
        return self.rows[0].keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self.rows[0].keys = value


RotorCache.batch = RaggedBatch
