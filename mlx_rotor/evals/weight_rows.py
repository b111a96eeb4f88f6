"""Ways to quantize one source side by side: what each takes, and what it costs on code and prose. A file keeps rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RotorError
from ..quant import policy as policies
from ..quant.budget import TooSmall, file_bytes
from ..quant.job import dry_run
from ..quant.recipe import BUNDLED, Recipe
from ..quant.target import Budget
from .domains import Domain
from .evaluation import Row, compared, row_of
from .machine import machine
from .record import LOOSE, replace_text
from .size import Size
from .streamed import Streamed

FORMAT, VERSION = "mlx_rotor weight quality", 1
SOLVED = "rotor"
CALIBRATED = "calibrated"
METHODS = ("fast", "search", CALIBRATED)


@dataclass(frozen=True)
class Way:
    """A policy by one method: a fit, or `calibrated`, which is search with statistics of a text. `size_of`: for a
    policy that is solved, the one whose size it gets."""

    policy: str
    method: str
    size_of: str = ""

    @property
    def name(self) -> str:
        return f"{self.policy} at {self.size_of}'s size" if self.size_of else self.policy

    def recipe(self, source: str | Path, sensitivities: Path) -> Recipe:
        """Budgets go by measured sensitivities where the fit is calibrated, else by the prior."""
        recipe = Recipe(policies.load(self.policy), "search" if self.method == CALIBRATED else self.method)
        if self.method == CALIBRATED:
            recipe = replace(recipe, calibration=BUNDLED)
        if not self.size_of:
            return recipe
        other, _ = dry_run(source, policies.load(self.size_of))
        recipe = replace(recipe, budget=Budget(nbytes=file_bytes(other, recipe.shard_bytes)))
        return replace(recipe, sensitivities=sensitivities) if self.method == CALIBRATED else recipe


@dataclass(frozen=True)
class Table:
    """Rows by their way; `texts` and `machine` they share."""

    source: str
    texts: dict[str, str]
    size: tuple[int, int]
    machine: dict[str, str]
    rows: dict[Way, Row]

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = [{"way": asdict(way), "row": asdict(row)} for way, row in self.rows.items()]
        head = {"format": FORMAT, "version": VERSION, "source": self.source, "texts": self.texts}
        return head | {"size": list(self.size), "machine": self.machine, "rows": rows}

    def write(self, path: Path) -> None:
        """The whole file or nothing. RotorError where it can't be written."""
        replace_text(path, json.dumps(self.facts(), indent=1) + "\n")


def read(path: Path) -> Table:
    """A file that `Table.write` made. Raises RotorError for anything else."""
    try:
        data = json.loads(path.read_text("utf-8"))
        if (data.pop("format"), data.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format or version")
        rows = {Way(**item["way"]): row_of(item["row"]) for item in data.pop("rows")}
        return Table(**{**data, "size": tuple(data["size"])}, rows=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RotorError(f"{path}: not a file of weight quality ({e}); give another, or delete it") from e


def ways(listed: Sequence[str], methods: Sequence[str] = METHODS, solved: str = SOLVED) -> list[Way]:
    """Every listed policy, and the solved one, if any, at the size of each, by every method."""
    return [Way(*w) for p in listed for m in methods for w in ((p, m), (solved, m, p)) if w[0]]


def measure(
    source: str | Path,
    wanted: Iterable[Way],
    texts: Sequence[Domain],
    size: Size,
    file: Path,
    progress: Callable[[str, int, int], Any] | None = None,
    row_done: Callable[[], Any] = lambda: None,
) -> tuple[Table, list[str]]:
    """Makes and measures what is wanted and not in `file` yet, which is written after each row.

    Returns the table, and a line for every way that can't be gone: a size below what the policy's floors allow.

    Raises:
        RotorError: a file of other texts, another size or another machine's versions; and as `compared`.
    """
    fresh = Table(
        Path(source).resolve().name, {t.name: t.digest for t in texts}, (size.windows, size.window), machine(), {}
    )
    table = read(file) if file.exists() else fresh
    for what in ("source", "texts", "size"):
        if getattr(table, what) != getattr(fresh, what):
            raise RotorError(f"{file} holds rows of another {what} ({getattr(table, what)}): give another file")
    if any(table.machine.get(name) != fresh.machine[name] for name in fresh.machine.keys() - LOOSE):
        raise RotorError(f"{file} holds rows of another machine ({table.machine}): give another file")
    left: list[Way] = []
    impossible: list[str] = []
    for way in wanted:
        if way in table.rows:
            row_done()
        else:
            left.append(way)
    if not left:
        return table, impossible
    with Streamed(source, texts, size, progress=progress) as streamed:
        for way in left:
            recipe = way.recipe(source, file.with_suffix(".sensitivities.json"))
            try:
                plan, _ = dry_run(source, recipe.plan(source, progress))
            except TooSmall as e:
                impossible.append(f"{way.name}, {way.method}: {e}")
                row_done()
                continue
            (row,) = compared(streamed, [plan], fit=recipe.fit, guide=recipe.guide(progress))
            table.rows[way] = replace(row, name=way.name, nbytes=file_bytes(plan, recipe.shard_bytes))
            table.write(file)
            row_done()
    return table, impossible
