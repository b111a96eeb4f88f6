"""What a weight tensor is for. A policy speaks of roles, never of tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

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
        Role("attn.sinks", "attention sink of each head", quantizable=False),
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
