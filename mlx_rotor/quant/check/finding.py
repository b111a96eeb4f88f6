"""What a check of a checkpoint found: which reader it breaks, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ERROR, WARNING = "error", "warning"

PYTHON = "mlx_lm"
OLDER = "mlx_lm before 0.32.2"
SWIFT = "mlx-swift-lm"
OTHER = "other tools"
ROTOR = "mlx_rotor"
TRUSTING = "mlx_lm --trust-remote-code"
EVERY = (PYTHON, OLDER, SWIFT)


@dataclass(frozen=True)
class Finding:
    """`kind`: a short name that stays the same; `readers`: those that fail (error) or do worse (warning);
    `where`: tensors, modules or files; `fix`: what to do."""

    severity: str
    kind: str
    readers: tuple[str, ...]
    what: str
    where: tuple[str, ...]
    fix: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        more = f" and {len(self.where) - 3} more" if len(self.where) > 3 else ""
        where = f" ({', '.join(self.where[:3])}{more})" if self.where else ""
        return f"{self.severity} [{self.kind}; {', '.join(self.readers)}]: {self.what}{where}; {self.fix}"


class Findings:
    """Findings as they come; the same one in many places becomes one with many places."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str, tuple[str, ...], str, str], dict[str, None]] = {}

    def error(self, kind: str, readers: Sequence[str], what: str, where: Iterable[str], fix: str) -> None:
        self._add(ERROR, kind, readers, what, where, fix)

    def warning(self, kind: str, readers: Sequence[str], what: str, where: Iterable[str], fix: str) -> None:
        self._add(WARNING, kind, readers, what, where, fix)

    def listed(self) -> list[Finding]:
        """Errors first, else in the order they were found."""
        found = [
            Finding(severity, kind, readers, what, tuple(places), fix)
            for (severity, kind, readers, what, fix), places in self._places.items()
        ]
        return sorted(found, key=lambda f: f.severity != ERROR)

    def _add(self, severity: str, kind: str, readers: Sequence[str], what: str, where: Iterable[str], fix: str) -> None:
        self._places.setdefault((severity, kind, tuple(readers), what, fix), {}).update(dict.fromkeys(where))
