"""Policies and fits applied to one source: size and quality of each, kept in a JSON file, as tables and a drawing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import tables
from ..errors import RotorError
from ..files import write_text
from ..quality.card import percent, pm
from ..quality.evaluation import CheckpointRow, compare_policies, row_from_dict
from ..quality.machine import machine
from ..quality.plot import Panel, Series, svg
from ..quality.record import LOOSE
from ..quality.sample import Domain, Size
from ..quality.streamed import SourceReference
from ..quant import Recipe, dry_run
from ..quant import policy as policies
from ..quant.budget import TooSmall
from ..quant.shards import file_bytes
from ..quant.source import open_folder
from ..quant.spec import BUNDLED, Budget

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
        other, _ = dry_run(source, Recipe(policies.load(self.size_of)))
        recipe = replace(recipe, budget=Budget(nbytes=file_bytes(other, recipe.shard_bytes)))
        return replace(recipe, sensitivities=sensitivities) if self.method == CALIBRATED else recipe


@dataclass(frozen=True)
class Table:
    """Rows by their way; `texts` and `machine` they share."""

    source: str
    texts: dict[str, str]
    size: tuple[int, int]
    machine: dict[str, str]
    rows: dict[Way, CheckpointRow]

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = [{"way": asdict(way), "row": asdict(row)} for way, row in self.rows.items()]
        head = {"format": FORMAT, "version": VERSION, "source": self.source, "texts": self.texts}
        return head | {"size": list(self.size), "machine": self.machine, "rows": rows}

    def write(self, path: Path) -> None:
        """The whole file or nothing. RotorError where it can't be written."""
        write_text(path, json.dumps(self.facts(), indent=1) + "\n")


def read(path: Path) -> Table:
    """A file that `Table.write` made. Raises RotorError for anything else."""
    try:
        data = json.loads(path.read_text("utf-8"))
        if (data.pop("format"), data.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format or version")
        rows = {Way(**item["way"]): row_from_dict(item["row"]) for item in data.pop("rows")}
        return Table(**{**data, "size": tuple(data["size"])}, rows=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RotorError(f"{path}: not a file of weight quality ({e}); give another, or delete it") from e


def ways(listed: Sequence[str], methods: Sequence[str] = METHODS, solved: str = SOLVED) -> list[Way]:
    """Every listed policy, and the solved one, if any, at the size of each, by every method."""
    return [Way(*w) for p in listed for m in methods for w in ((p, m), (solved, m, p)) if w[0]]


def measure_policies(
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
        RotorError: a file of other texts, another size or another machine's versions; and as `compare_policies`.
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
    with SourceReference(source, texts, size, progress=progress) as reference:
        for way in left:
            recipe = way.recipe(source, file.with_suffix(".sensitivities.json"))
            try:
                plan = recipe.resolve(open_folder(source), progress)
            except TooSmall as e:
                impossible.append(f"{way.name}, {way.method}: {e}")
                row_done()
                continue
            (row,) = compare_policies(reference, [plan], fit=recipe.fit, guide=recipe.guide(progress))
            table.rows[way] = replace(row, name=way.name, nbytes=file_bytes(plan, recipe.shard_bytes))
            table.write(file)
            row_done()
    return table, impossible


STYLES = {"fast": ("#555555", "o"), "search": ("#1f4e9e", "s"), CALIBRATED: ("#0b6e4f", "D")}


def markdown(table: Table) -> str:
    """KL divergence of every policy by method; then all figures of every row; what they rest on below."""
    windows, window = table.size
    m, texts = table.machine, ", ".join(f"{name} {digest}" for name, digest in table.texts.items())
    notes = (
        f"- {windows} windows of {window} tokens of each text ({texts});"
        " KL(source ‖ row) in nats a token, perplexity as its change; ± one standard error between windows.",
        "- fast: mx.quantize; a few rounds of k-means for codebooks. search: least squares. calibrated: search with the"
        " inputs of another text and errors fed"
        " back (GPTQ); where bits are solved for, by sensitivities measured on that text, else by the prior.",
        f"- MB: weight files with headers. {m['machine']} ({m['device']}), mlx {m['mlx']}, mlx-lm {m['mlx_lm']},"
        f" mlx_rotor {m['mlx_rotor']}, Python {m['python']}, {m['date']}.",
    )
    return "\n".join([_divergences(table), "", _everything(table), "", *notes]) + "\n"


def _divergences(table: Table) -> str:
    """A line for each policy and size, a column for each text and method."""
    methods = [m for m in METHODS if any(way.method == m for way in table.rows)]
    head = ["policy", "MB", "bits a weight", *(f"KL, {name}: {m}" for name in table.texts for m in methods)]
    lines = []
    by_name: dict[str, dict[str, CheckpointRow]] = {}
    for way, row in _ordered(table):
        by_name.setdefault(row.name, {})[way.method] = row
    for name, rows in by_name.items():
        first = next(iter(rows.values()))
        cells = [name, f"{first.nbytes / 1e6:.2f}", f"{first.bits_per_weight:.2f}"]
        for nth in range(len(table.texts)):
            cells += [pm(rows[m].quality[nth].divergence.mean) if m in rows else "" for m in methods]
        lines.append(cells)
    return tables.markdown(head, lines, padded=False)


def _everything(table: Table) -> str:
    names = list(table.texts)
    head = ["policy", "fit", "bytes"]
    head += [f"{what}, {name}" for name in names for what in ("KL", "same top-1", "perplexity")]
    lines = []
    for way, row in _ordered(table):
        cells = [row.name, way.method, f"{row.nbytes:,}"]
        for q in row.quality:
            cells += [pm(q.divergence.mean), percent(q.divergence.agreement), percent(q.change)]
        lines.append(cells)
    return tables.markdown(head, lines, left=(0, 1), padded=False)


def _ordered(table: Table) -> list[tuple[Way, CheckpointRow]]:
    """By size, the listed policy before what is solved for its size, then by method."""
    sizes = {way.policy: row.nbytes for way, row in table.rows.items() if not way.size_of}

    def key(item: tuple[Way, CheckpointRow]) -> tuple[int, bool, int]:
        way, row = item
        return sizes.get(way.size_of or way.policy, row.nbytes), bool(way.size_of), METHODS.index(way.method)

    return sorted(table.rows.items(), key=key)


def drawing(table: Table) -> str:
    """KL divergence against size, a panel a text, as SVG. Solved policies are a line, listed ones hollow marks.

    Raises:
        RotorError: no matplotlib, or nothing to draw.
    """
    if not table.rows:
        raise RotorError("--plot: no row was measured")
    panels = [
        Panel(
            name,
            "MB of weight files",
            [s for method in STYLES for solved in (True, False) if (s := _series(table, nth, method, solved)).marks],
        )
        for nth, name in enumerate(table.texts)
    ]
    y_label = "KL(source ‖ quantized), nats a token, ± one standard error"
    return svg(panels, y_label, width=10, margin=0.12, names=7, columns=1)


def _series(table: Table, nth: int, method: str, solved: bool) -> Series:
    """The rows of one method on text `nth`, by size. Names are written once, at the fast fit's listed policies."""
    part = sorted(
        (row for way, row in table.rows.items() if way.method == method and bool(way.size_of) == solved),
        key=lambda row: row.nbytes,
    )
    named = not solved and method == "fast"
    marks = [(row.nbytes / 1e6, row.quality[nth].divergence.mean, row.name if named else "") for row in part]
    return Series(f"{'solved' if solved else 'listed'}, {method}", *STYLES[method], marks, solved)
