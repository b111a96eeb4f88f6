"""How much is evaluated: presets, and the checks every setting must pass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import RotorError


@dataclass(frozen=True)
class Size:
    """Sample sizes. Token counts are the evaluated tokenizer's.

    Windows are `window` tokens long and fed through the cache `chunk` at a time, so that later tokens of a window
    attend to compressed ones. A default compressed cache keeps its first 4 and its last 128 tokens exact: a window
    must be well above 132 tokens to say anything about compression.

    `greedy` is how many prompts are continued. `asked` names the settings someone insists on: `windows` or `greedy`
    that don't fit the text, or `chats` with a tokenizer they weren't made for, are then an error (windows, greedy, or
    no tool calls) or done anyway instead of left out.
    """

    windows: int
    window: int
    needles: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    chats: int
    greedy: int = 0
    chunk: int = 64
    seed: int = 0
    asked: frozenset[str] = frozenset({"windows", "chats"})

    def __post_init__(self) -> None:
        for name, low in (("windows", 1), ("window", 8), ("needles", 0), ("chats", 0), ("greedy", 0), ("chunk", 1)):
            if getattr(self, name) < low:
                raise RotorError(f"--{name} {getattr(self, name)}: must be at least {low}")
        if self.needles and not (self.lengths and self.depths):
            raise RotorError("needles need at least one of --needle-lengths and one of --depths")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise RotorError(f"--depths {depth:g}: a depth is between 0 (start of the prompt) and 1 (its end)")

    def with_(self, **given: Any) -> Size:
        """This size with the settings that are not None replaced, and insisted on."""
        given = {k: v for k, v in given.items() if v is not None}
        return dataclasses.replace(self, **given, asked=frozenset(given))


DEPTHS = (0.1, 0.5, 0.9)
# Under two minutes a configuration of the bundled model on a CPU core.
QUICK = Size(8, 512, needles=6, lengths=(384, 768), depths=DEPTHS, chats=3, greedy=4, asked=frozenset())
# About four minutes a configuration there; the README's tables.
THOROUGH = Size(8, 768, needles=9, lengths=(512, 1024, 2048), depths=DEPTHS, chats=6, greedy=8, asked=frozenset())
# Seconds: for tests and for trying things out. Too small to conclude anything from.
TINY = Size(3, 256, needles=2, lengths=(256,), depths=(0.1, 0.9), chats=2)
