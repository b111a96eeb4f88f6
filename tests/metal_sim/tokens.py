"""Metal source as tokens: enough of a scanner for passes that replace text line for line, no parser."""

from __future__ import annotations

import re
from functools import lru_cache

TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|[A-Za-z_]\w*|\d[\w.]*|\s+"
    r"|::|->|\+\+|--|<<=|>>=|[-+*/%&|^<>=!]=|&&|\|\||<<|.",
    re.DOTALL,
)
OPENING, CLOSING = ("(", "[", "<", "{"), (")", "]", ">", "}")


@lru_cache(maxsize=16)
def _scanned(text: str) -> tuple[list[str], list[int]]:
    """All tokens of `text`, and the places of those that are neither white space nor comments."""
    tokens = TOKEN.findall(text)
    return tokens, [i for i, t in enumerate(tokens) if not (t.isspace() or t.startswith(("//", "/*")))]


class Stream:
    """A text whose tokens can be replaced. `solid` are the tokens that are neither white space nor comments."""

    def __init__(self, text: str):
        tokens, self._place = _scanned(text)
        self._all = list(tokens)
        self.solid = [tokens[i] for i in self._place]

    def replace(self, k: int, text: str) -> None:
        """Puts `text` in the place of solid token `k`; `solid` itself keeps the original."""
        self._all[self._place[k]] = text

    def text(self) -> str:
        return "".join(self._all)


def closing(solid: list[str], k: int) -> int:
    """Index of the bracket that closes the one at `k`, or -1; a `>>` closes two angle brackets."""
    opener = solid[k]
    closer = CLOSING[OPENING.index(opener)]
    depth = 0
    for j in range(k, len(solid)):
        token = solid[j]
        if token == opener:
            depth += 1
        elif token == closer or (opener == "<" and token == ">>"):
            depth -= len(token)
            if depth <= 0:
                return j
        elif opener == "<" and token in (";", "{"):
            return -1
    return -1


def split(solid: list[str]) -> list[list[str]]:
    """`solid` cut at its commas outside of brackets."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in solid:
        depth += (token in OPENING) - (token in CLOSING)
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]
