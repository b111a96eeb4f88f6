"""The texts quality is measured on, by domain: code and prose that come with the package, and the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..demo import held_out_prose, held_out_text
from ..errors import RotorError


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
