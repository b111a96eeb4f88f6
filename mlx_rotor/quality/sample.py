"""The sample that configurations are compared on: its size, its texts, and the windows, needles and chats from them."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundled import held_out_prose, held_out_text
from ..errors import RotorError
from . import chat, greedy
from .chat import ChatTrial
from .needle import Needle, hide


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


@dataclass(frozen=True)
class Domain:
    """`what`: one line on where the text is from."""

    name: str
    text: str
    what: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def bundled() -> tuple[Domain, Domain]:
    """Code and prose. The bundled model was trained on neither; other models may have seen both."""
    return (
        Domain("code", held_out_text(), "source of the Python standard library"),
        Domain("prose", held_out_prose(), "paragraphs of Python's tutorial, FAQs and HOWTOs"),
    )


def domains(given: Sequence[str] = ()) -> tuple[Domain, ...]:
    """`NAME=FILE` (or FILE, named after itself) each; without any, those of the package.

    Raises:
        RotorError: a file that can't be read as UTF-8, or two of one name.
    """
    if not given:
        return bundled()
    found: dict[str, Domain] = {}
    for text in given:
        name, _, path = ("", "", text) if Path(text).is_file() else text.partition("=")
        name = name or Path(path).stem
        if not path:
            raise RotorError(f"{text}: give a text as NAME=FILE")
        if name in found:
            raise RotorError(f"two texts are called {name!r}: give each a name, as NAME=FILE")
        try:
            found[name] = Domain(name, Path(path).read_text("utf-8"), Path(path).name)
        except (OSError, UnicodeDecodeError) as e:
            raise RotorError(f"{path}: {e.strerror if isinstance(e, OSError) else 'not UTF-8 text'}") from e
    return tuple(found.values())


@dataclass(frozen=True)
class NeedleTrial:
    length: int
    depth: float
    needle: Needle


@dataclass(frozen=True)
class Sample:
    """The same for every configuration.

    Attributes:
        tokens: the whole text.
        windows: int [windows, window + 1]; row[:-1] is fed, row[1:] predicted.
        prompts: int [prompts, greedy.PROMPT]: what is continued greedily.
    """

    tokens: list[int]
    windows: np.ndarray
    needles: list[NeedleTrial]
    chats: list[ChatTrial]
    prompts: np.ndarray


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, e.g. [bos] for Llama and Gemma, nothing for the bundled model."""
    return [t for t in tokenizer.encode("") if t == tokenizer.bos_token_id][:1]


def draw_windows(tokens: Sequence[int], first: Sequence[int], size: Size) -> np.ndarray:
    """Windows that don't overlap, spread evenly over the text. `first`: tokens put before each.

    Raises:
        RotorError: the text is too short.
    """
    need = size.window + 1 - len(first)
    fit = (len(tokens) - 1) // size.window
    count = size.windows if "windows" in size.asked else min(size.windows, fit)
    if len(tokens) < need or not count or count > max(fit, 1):
        room = f"room for {fit}" if fit else "not enough for one"
        raise RotorError(
            f"the text has {len(tokens)} tokens, {room} of {size.window}; {size.windows} asked for: "
            "use a longer --text, fewer --windows or a smaller --window"
        )
    stride = (len(tokens) - 1) // count
    return np.array([[*first, *tokens[i * stride : i * stride + need]] for i in range(count)])


def draw_between(tokens: Sequence[int], first: Sequence[int], count: int, length: int) -> np.ndarray:
    """int [count, length]: pieces of text to calibrate on, spread evenly, each behind the tokens `first`.

    They begin four tenths of their distance in: with a long text, where the windows of a comparison aren't.

    Raises:
        RotorError: the text is too short.
    """
    need, stride = length - len(first), len(tokens) // count
    if stride < need:
        raise RotorError(
            f"the text has {len(tokens)} tokens, too few for {count} windows of {length}: use a longer --text"
        )
    starts = [min(int((i + 0.4) * stride), len(tokens) - need) for i in range(count)]
    return np.array([[*first, *tokens[at : at + need]] for at in starts])


def draw_needles(tokenizer: Any, tokens: Sequence[int], first: Sequence[int], size: Size) -> list[NeedleTrial]:
    """`size.needles` trials, in turn over every length and depth, in filler drawn from the text.

    Raises:
        RotorError: a length leaves no room for the question, the text is too short, or the tokenizer cuts the code
            off the answer.
    """
    rng, trials = random.Random(f"needle {size.seed}"), []
    cells = [(length, depth) for length in size.lengths for depth in size.depths]
    for i in range(size.needles):
        length, depth = cells[i % len(cells)]
        if len(tokens) <= length:
            raise RotorError(f"a needle of {length} tokens needs a longer text than {len(tokens)} tokens")
        at = rng.randrange(len(tokens) - length)
        filler = tokens[at : at + length]
        try:
            needle = hide(lambda text: encode(tokenizer, text), filler, length - len(first), rng, depth)
        except ValueError as e:
            raise RotorError(f"--needle-lengths {length}: {e}") from e
        if needle.code not in tokenizer.decode(needle.answer):
            raise RotorError("this tokenizer joins the needle's code with the text before it; use --needles 0")
        prompt = [*first, *needle.prompt]
        trials.append(NeedleTrial(length, depth, Needle(prompt, needle.answer, needle.code, needle.depth)))
    return trials


def draw_prompts(tokens: Sequence[int], first: Sequence[int], size: Size) -> np.ndarray:
    """Prompts to continue, [prompts, greedy.PROMPT]. Raises RotorError if more were asked for than the text has."""
    prompts = greedy.draw_prompts(tokens, first, size.greedy)
    if len(prompts) < size.greedy and "greedy" in size.asked:
        raise RotorError(
            f"the text has room for {len(prompts)} prompts of {greedy.PROMPT} tokens; {size.greedy} asked for: use a "
            "longer --text or a smaller --greedy"
        )
    return prompts


def draw(tokenizer: Any, text: str, size: Size, context: int | None) -> Sample:
    """The sample of `size` from `text`. `context`: the longest sequence the model takes, None if unknown.

    Raises:
        RotorError: anything asked for doesn't fit the text, the tokenizer or the context.
    """
    continued = (greedy.PROMPT + greedy.TOKENS,) if size.greedy else ()
    longest = max((size.window, *(size.lengths if size.needles else ()), *continued))
    if context is not None and longest > context:
        raise RotorError(f"{longest} tokens are more than the model's context of {context}")
    tokens, first = encode(tokenizer, text), opening(tokenizer)
    chats = size.chats if "chats" in size.asked or chat.suits(tokenizer) else 0
    return Sample(
        tokens,
        draw_windows(tokens, first, size),
        draw_needles(tokenizer, tokens, first, size),
        chat.draw(tokenizer, chats, size.seed, tokens),
        draw_prompts(tokens, first, size),
    )
