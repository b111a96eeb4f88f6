"""Roles and layers, by which policies select weights. A role is what a weight is for; tensor names never occur.

Sets of layers are written as follows.

first N      layers 0 to N-1                        last N     the last N
A..B         A to B, both counted in                A-B        the same, for numbers that are not negative
..B  A..     from the first layer, to the last      N          one layer
middle       all but those that some rule of the policy selects as an end

Negative numbers count from the end: -1 is the last layer. `0..1` and `..1` are `first 2`, `-2..` is `last 2`. A layer
beyond the model is an error; `first N` and `last N` take what there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import RotorError


@dataclass(frozen=True)
class Role:
    """`quantizable`: a policy may give it bits. `layered`: it occurs once a layer, so a rule may select layers.

    `asked`: only a rule that names the role itself, and no other, gives it bits; a pattern never does.
    """

    name: str
    what: str
    quantizable: bool = True
    layered: bool = True
    asked: bool = False


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("embed", "token embeddings", layered=False),
        Role("head", "output projection to the vocabulary", layered=False),
        Role("norm", "normalization weights", quantizable=False),
        Role("bias", "biases of linears and normalizations", quantizable=False),
        Role("attn.q", "query projection"),
        Role("attn.k", "key projection"),
        Role("attn.v", "value projection"),
        Role("attn.qkv", "query, key and value projection in one"),
        Role("attn.gate", "gate of the attention output"),
        Role("attn.o", "attention output projection"),
        Role("attn.q_a", "first factor of the query projection (latent attention)"),
        Role("attn.q_b", "second factor of the query projection (latent attention)"),
        Role("attn.kv_a", "projection to the latent that keys and values share"),
        Role("attn.kv_b", "projections from that latent to each head's keys and values"),
        Role("attn.index", "projections of the index that chooses what is attended to"),
        Role("attn.sinks", "attention-sink logit of each head", quantizable=False),
        Role("linear.in", "input projections of linear attention"),
        Role("linear.out", "output projection of linear attention"),
        Role("linear.state", "convolution, decay and step size of linear attention", quantizable=False),
        Role("mlp.gate", "gate projection of a dense feed-forward"),
        Role("mlp.up", "up projection of a dense feed-forward"),
        Role("mlp.gate_up", "gate and up projection of a dense feed-forward in one"),
        Role("mlp.down", "down projection of a dense feed-forward"),
        # Routers decide which experts run: an error there is not averaged out, it picks other weights.
        Role("router", "expert scores, and the score of the shared expert", asked=True),
        Role("router.bias", "load-balancing bias of the expert scores", quantizable=False),
        Role("shared.gate", "gate projection of the experts that every token takes"),
        Role("shared.up", "up projection of the experts that every token takes"),
        Role("shared.down", "down projection of the experts that every token takes"),
        Role("expert.gate", "gate projection of all experts of a layer"),
        Role("expert.up", "up projection of all experts of a layer"),
        Role("expert.down", "down projection of all experts of a layer"),
    )
}


def expand(pattern: str) -> tuple[str, ...]:
    """Role names that a policy's pattern (`attn.q`, `expert.*`) stands for; RotorError on one that names none."""
    names = tuple(name for name in ROLES if fnmatchcase(name, pattern))
    if not names:
        raise RotorError(f"unknown role {pattern!r}; roles: {', '.join(ROLES)}")
    return names


def kept_unasked(role: str) -> bool:
    """Whether a role keeps its precision where no rule speaks of it: what is never quantized, and the router."""
    return not ROLES[role].quantizable or ROLES[role].asked


FORMS = "'first N', 'last N', 'A..B', 'A-B', N, 'middle'"


@dataclass(frozen=True)
class Layers:
    """A set of layers: `first` and `last` at the ends, `ranges` (both counted in, None is open), and perhaps what
    lies between the policy's ends."""

    first: int = 0
    last: int = 0
    ranges: tuple[tuple[int, int | None], ...] = ()
    middle: bool = False

    def covers(self, layer: int, count: int, ends: tuple[int, int] = (0, 0)) -> bool:
        """Whether `layer` of a model with `count` layers is in the set.

        `ends`: how many layers at each end the policy's rules select, which `middle` leaves out.

        Raises:
            RotorError: a range names a layer beyond the model.
        """
        if layer < self.first or layer >= count - self.last:
            return True
        if self.middle and ends[0] <= layer < count - ends[1]:
            return True
        return any(low <= layer <= high for low, high in (_resolve(r, count) for r in self.ranges))


def parse(items: Any) -> Layers:
    """The set that a rule's `layers` (a list, or one item) selects; RotorError on an item that isn't understood."""
    items = items if isinstance(items, list) else [items]
    if not items:
        raise RotorError("layers: an empty list selects nothing; leave it out for all layers")
    first = last = 0
    ranges: list[tuple[int, int | None]] = []
    for item in items:
        if item == "middle":
            continue
        low, high = _span(item)
        if low == 0 and high is not None and high >= 0:
            first = max(first, high + 1)
        elif low < 0 and high in (None, -1):
            last = max(last, -low)
        else:
            ranges.append((low, high))
    return Layers(first, last, tuple(ranges), "middle" in items)


def ends(sets: Iterable[Layers | None]) -> tuple[int, int]:
    """How many layers at each end the sets select as `first N` and `last N`."""
    known = [s for s in sets if s is not None]
    return max((s.first for s in known), default=0), max((s.last for s in known), default=0)


def _span(item: Any) -> tuple[int, int | None]:
    text = str(item).strip()
    if not isinstance(item, (bool, float)):
        if match := re.fullmatch(r"(first|last) ([1-9]\d*)", text):
            n = int(match[2])
            return (0, n - 1) if match[1] == "first" else (-n, None)
        if re.fullmatch(r"-?\d+", text):
            return int(text), int(text)
        if (match := re.fullmatch(r"(\d+)-(\d+)|(-?\d+)?\.\.(-?\d+)?", text)) and text != "..":
            low = int(match[1] or match[3] or 0)
            high = int(match[2] or match[4]) if match[2] or match[4] else None
            if high is not None and (low < 0) == (high < 0) and high < low:
                raise RotorError(f"layers: {item!r} runs backwards")
            return low, high
    raise RotorError(f"layers: {item!r} is none of {FORMS}")


def _resolve(span: tuple[int, int | None], count: int) -> tuple[int, int]:
    low, high = span[0], -1 if span[1] is None else span[1]
    for end in (low, high):
        if not -count <= end < count:
            raise RotorError(f"a rule selects layer {end}, but the model has layers 0-{count - 1}")
    return low % count, high % count
