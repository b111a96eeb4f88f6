"""Rows of `weight_rows` as Markdown tables and as a drawing: KL divergence against size. Knows no model."""

from __future__ import annotations

import io
from typing import Any

from ..errors import RotorError
from .card import percent, pm
from .evaluation import Row
from .plot import SETTINGS, available
from .weight_rows import CALIBRATED, METHODS, Table, Way

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
    return "\n".join([*_divergences(table), "", *_everything(table), "", *notes]) + "\n"


def _divergences(table: Table) -> list[str]:
    """A line for each policy and size, a column for each text and method."""
    methods = [m for m in METHODS if any(way.method == m for way in table.rows)]
    head = ["policy", "MB", "bits a weight", *(f"KL, {name}: {m}" for name in table.texts for m in methods)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    by_name: dict[str, dict[str, Row]] = {}
    for way, row in _ordered(table):
        by_name.setdefault(row.name, {})[way.method] = row
    for name, rows in by_name.items():
        first = next(iter(rows.values()))
        cells = [name, f"{first.nbytes / 1e6:.2f}", f"{first.bits_per_weight:.2f}"]
        for nth in range(len(table.texts)):
            cells += [pm(rows[m].quality[nth].divergence.mean) if m in rows else "" for m in methods]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _everything(table: Table) -> list[str]:
    names = list(table.texts)
    head = ["policy", "fit", "bytes"]
    head += [f"{what}, {name}" for name in names for what in ("KL", "same top-1", "perplexity")]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for way, row in _ordered(table):
        cells = [row.name, way.method, f"{row.nbytes:,}"]
        for q in row.quality:
            cells += [pm(q.divergence.mean), percent(q.divergence.agreement), percent(q.change)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ordered(table: Table) -> list[tuple[Way, Row]]:
    """By size, the listed policy before what is solved for its size, then by method."""
    sizes = {way.policy: row.nbytes for way, row in table.rows.items() if not way.size_of}

    def key(item: tuple[Way, Row]) -> tuple[int, bool, int]:
        way, row = item
        return sizes.get(way.size_of or way.policy, row.nbytes), bool(way.size_of), METHODS.index(way.method)

    return sorted(table.rows.items(), key=key)


def drawing(table: Table) -> str:
    """KL against size, a panel a text, SVG. Solved policies are joined by lines, listed ones are hollow marks.

    Raises:
        RotorError: no matplotlib, or nothing to draw.
    """
    available()
    if not table.rows:
        raise RotorError("--plot: no row was measured")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, len(table.texts), squeeze=False, sharey=True)[0]
        for nth, (axes, name) in enumerate(zip(panels, table.texts, strict=True)):
            for method, (colour, marker) in STYLES.items():
                for solved in (True, False):
                    _series(axes, table, nth, method, solved, colour, marker)
            axes.set_yscale("log")
            axes.margins(x=0.12)  # names stand beside marks
            axes.set_xlabel("MB of weight files")
            axes.set_title(name)
            axes.grid(True, which="both", alpha=0.25, linewidth=0.5)
        panels[0].set_ylabel("KL(source ‖ quantized), nats a token, ± one standard error")
        panels[-1].legend(fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _series(axes: Any, table: Table, nth: int, method: str, solved: bool, colour: str, marker: str) -> None:
    part = sorted(
        (row for way, row in table.rows.items() if way.method == method and bool(way.size_of) == solved),
        key=lambda row: row.nbytes,
    )
    if not part:
        return
    found = [row.quality[nth].divergence.mean for row in part]
    x, y = [row.nbytes / 1e6 for row in part], [kl.value for kl in found]
    low = [min(kl.se or 0.0, 0.9 * kl.value) for kl in found]
    error = [low, [kl.se or 0.0 for kl in found]]
    style: dict[str, Any] = {"linewidth": 1.2} if solved else {"mfc": "white", "linestyle": "none"}
    label = f"{'solved' if solved else 'listed'}, {method}"
    axes.errorbar(x, y, yerr=error, color=colour, marker=marker, label=label, capsize=2, markersize=5, **style)
    for row in part if not solved and method == "fast" else ():
        at = (row.nbytes / 1e6, row.quality[nth].divergence.mean.value)
        axes.annotate(row.name, at, (4, 4), textcoords="offset points", fontsize=7, color=colour)
