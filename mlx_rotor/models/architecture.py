"""The parts that a family file describes names with: each parameter's role, and the names that checkpoints have for it.

Shapes come from mlx_lm itself. In names, `{layer}` stands for a layer's number, `{expert}` for an expert's, `{beyond}`
for that of a layer after the model's last, `*` for anything without a dot and `**` for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Tensor:
    """Parameters of mlx_lm's module tree with one name pattern.

    Attributes:
        role: what the parameter is for, one of `quant.selectors.ROLES`.
        name: its pattern in the tree.
        sources: names in checkpoints where they differ, the most usual first; one with `{expert}` says that the
            checkpoint stores the parts of a stack one by one.
        dtype: the dtype that it is kept in: "" is bfloat16, "source" the checkpoint's own float, or a safetensors name.
        plus: a number that mlx_lm adds to the checkpoint's values.
    """

    role: str
    name: str
    sources: tuple[str, ...] = ()
    dtype: str = ""
    plus: float = 0.0


@dataclass(frozen=True)
class Fused:
    """A tensor of the checkpoint that holds several parameters of the tree.

    Of each part (expert, head) it holds the rows of the members.

    Attributes:
        source: its name in the checkpoint.
        members: parameters of the tree, in the order of their rows.
        alternate: rows of the members in turn, instead of one member after the other.
        turned: members whose rows in the checkpoint are columns in the tree.
        columns: the tensor's last two dimensions are swapped, so that members share columns instead of rows.
        flat: the tensor has no dimension of its own for the parts.
    """

    source: str
    members: tuple[str, ...]
    alternate: bool = False
    turned: tuple[str, ...] = ()
    columns: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Architecture:
    """The names of a family.

    Attributes:
        model_types: of config.json.
        tensors: the first pattern that matches a parameter decides.
        fused: tensors of the checkpoint that hold several parameters.
        drop: names in checkpoints that mlx_lm doesn't use.
        optional: parameters that mlx_lm leaves out where the checkpoint has none.
    """

    model_types: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    fused: tuple[Fused, ...] = ()
    drop: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @cached_property
    def _matchers(self) -> tuple[tuple[re.Pattern[str], Tensor], ...]:
        return tuple((re.compile(pattern(t.name)), t) for t in self.tensors)

    def find(self, name: str) -> tuple[Tensor, int | None] | None:
        """The pattern that a parameter's name matches, and its layer's number, if it has one; None without a match."""
        for matcher, tensor in self._matchers:
            if match := matcher.fullmatch(name):
                layer = match.groupdict().get("layer")
                return tensor, None if layer is None else int(layer)
        return None


def pattern(name: str) -> str:
    """A name with placeholders as a regular expression; the groups `layer`, `expert` and `beyond` are digits."""
    text = re.escape(name).replace(r"\*\*", ".+").replace(r"\*", "[^.]+")
    return re.sub(r"\\{(layer|expert|beyond)\\}", r"(?P<\1>\\d+)", text)
