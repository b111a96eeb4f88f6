"""Tables and sizes as people read them: the one writer of each, for commands and for the files they make."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def text(titles: Sequence[str], rows: Rows, left: Collection[int] = (0,)) -> str:
    """Columns under their titles, two spaces apart; those in `left` to the left, all others, numbers, to the right."""
    wide = _widths(titles, rows)
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, wide, strict=True)))
        for line in (titles, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(titles: Sequence[str], rows: Rows, left: Collection[int] = (0,), *, padded: bool = True) -> str:
    """A Markdown table; columns in `left` to the left, all others to the right; `padded`: aligned as it stands, too."""
    wide = _widths(titles, rows) if padded else [0] * len(titles)
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, wide, strict=True)) + " |" for line in (titles, *rows)]
    rule = "|" + "|".join("-" * max(w + 1, 3) + ("-" if i in left else ":") for i, w in enumerate(wide)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _widths(titles: Sequence[str], rows: Rows) -> list[int]:
    return [max(len(line[i]) for line in (titles, *rows)) for i in range(len(titles))]


def size(nbytes: int) -> str:
    """`92.871 GB`, or MB below one GB; both decimal: a GB is 1e9 bytes."""
    return f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3f} MB"
