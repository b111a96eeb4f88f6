"""How a family file describes names: what each parameter of mlx_lm's module tree is for, and where checkpoints keep it.

Shapes come from mlx_lm itself. In names, `{layer}` stands for a layer's number, `{expert}` for an expert's, `{beyond}`
for that of a layer after the model's last, `*` for anything without a dot and `**` for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Tensor:
    """Parameters of the tree with one name pattern.

    `sources`: names it may have in a checkpoint where they differ, the most usual first; with `{expert}` in one, the
    checkpoint stores the parts of a stack one by one. `dtype`: what it is kept in: empty is bfloat16, "source" the
    checkpoint's own float, or a safetensors dtype. `plus`: what mlx_lm adds to the checkpoint's values.
    """

    role: str
    name: str
    sources: tuple[str, ...] = ()
    dtype: str = ""
    plus: float = 0.0


@dataclass(frozen=True)
class Fused:
    """A tensor of the checkpoint that holds several parameters of the tree.

    Of each part (expert, head) it holds the rows of `members` one after the other, or `alternate`: in turn.
    `turned`: members whose rows there are their columns in the tree. `columns`: the tensor's last two dimensions are
    swapped, so that what is said of rows holds for columns. `flat`: it has no dimension of its own for the parts.
    """

    source: str
    members: tuple[str, ...]
    alternate: bool = False
    turned: tuple[str, ...] = ()
    columns: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Architecture:
    """A naming family. `tensors`: the first pattern that matches a parameter decides. `drop`: names in checkpoints
    that mlx_lm makes no use of. `optional`: parameters that mlx_lm leaves out where the checkpoint has none."""

    model_types: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    fused: tuple[Fused, ...] = ()
    drop: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @cached_property
    def _matchers(self) -> tuple[tuple[re.Pattern[str], Tensor], ...]:
        return tuple((re.compile(pattern(t.name)), t) for t in self.tensors)

    def find(self, name: str) -> tuple[Tensor, int | None] | None:
        """The pattern a parameter's name matches and its layer (None: unlayered); None if none does."""
        for matcher, tensor in self._matchers:
            if match := matcher.fullmatch(name):
                layer = match.groupdict().get("layer")
                return tensor, None if layer is None else int(layer)
        return None


def pattern(name: str) -> str:
    """A name with placeholders as a regular expression; the groups `layer`, `expert` and `beyond` are digits."""
    text = re.escape(name).replace(r"\*\*", ".+").replace(r"\*", "[^.]+")
    return re.sub(r"\\{(layer|expert|beyond)\\}", r"(?P<\1>\\d+)", text)
