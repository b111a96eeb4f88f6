"""A `Recipe` from the words of `quantize`'s flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cache import DEFAULT, parse
from ..errors import RotorError
from ..memory.room import Room, room
from ..memory.sizes import parse_size, ram_size
from . import policy as policies
from .plan import read_config
from .recipe import Recipe
from .source import locate
from .spec import Budget

LISTED, SOLVED = "config-i", "rotor"  # policies without and with a size
CONTEXT = 32 * 1024


def recipe(
    model: str | Path,
    policy: str | Path | None = None,
    *,
    target_size: int | str | None = None,
    target_bpw: float | None = None,
    memory: int | str | None = None,
    context: int | None = None,
    kv: str | None = None,
    wired_limit: int | str | None = None,
    **parts: Any,
) -> tuple[Recipe, Room | None]:
    """The recipe, and with `memory` the room that was found, whose bytes are the recipe's budget.

    Args:
        model: checkpoint folder or Hugging Face repository; only its config.json is read, and only for `memory`.
        policy: a shipped policy's name or a TOML file; None is `rotor` where a size is given, else `config-i`.
        target_size: of the weight files, in bytes or as `86GB`.
        target_bpw: bits a weight.
        memory: a Mac's RAM, in bytes or as `128GB`.
        context, kv, wired_limit: with `memory`: tokens to have room for (32,768), the KV scheme of that room, and what
            the GPU may have, in bytes or as `120GB` (macOS's default).
        parts: further fields of `Recipe`.

    Raises:
        RotorError: an unknown policy, more than one size, a part of `memory` without it; as `room` and `Recipe`.
    """
    if sum(value is not None for value in (target_size, target_bpw, memory)) > 1:
        raise RotorError("--target-size, --target-bpw and --memory each set the size: give one of them")
    if memory is None and not (context is None and kv is None and wired_limit is None):
        raise RotorError("--context, --kv and --wired-limit go with a Mac's memory: add --memory 128GB")
    budget = found = None
    if memory is not None:
        config = read_config(locate(model, config_only=True))
        ram = ram_size(memory) if isinstance(memory, str) else memory
        limit = parse_size(wired_limit) if isinstance(wired_limit, str) else wired_limit
        found = room(config, ram, context or CONTEXT, parse(kv or DEFAULT), limit=limit)
        budget = Budget(nbytes=found.weights)
    elif target_size is not None:
        budget = Budget(nbytes=parse_size(target_size) if isinstance(target_size, str) else target_size)
    elif target_bpw is not None:
        budget = Budget(bits_per_weight=target_bpw)
    return Recipe(policies.load(policy or (SOLVED if budget else LISTED)), budget=budget, **parts), found
