"""What a weight tensor is for. A policy speaks of roles, never of tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import RotorError


@dataclass(frozen=True)
class Role:
    """`quantizable`: a policy may give it bits. `layered`: it occurs once a layer, so a rule may select layers."""

    name: str
    what: str
    quantizable: bool = True
    layered: bool = True


# Routers decide which experts run: an error there is not averaged out, it picks other weights.
ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("embed", "token embeddings", layered=False),
        Role("head", "output projection to the vocabulary", layered=False),
        Role("norm", "normalization weights", quantizable=False),
        Role("attn.q", "query projection"),
        Role("attn.k", "key projection"),
        Role("attn.v", "value projection"),
        Role("attn.o", "attention output projection"),
        Role("router", "expert scores", quantizable=False),
        Role("router.bias", "load-balancing bias of the expert scores", quantizable=False),
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
