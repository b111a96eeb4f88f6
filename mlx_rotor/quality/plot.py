"""Drawings of KL divergence as SVG: `svg` draws series in panels, and `quality` a comparison of KV schemes with it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RotorError
from .metrics import Estimate
from .report import ComparisonRow, Report

FAMILIES = ("trellis", "turbo", "isofull", "iso", "planar", "rotor", "fp8", "affine")
COLOURS = ("#0b6e4f", "#1f4e9e", "#7b3fa0", "#c2477f", "#c7671a", "#8a8a1f", "#555555", "#111111")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
OTHER = ("#888888", "h")
# One file for one report, whenever and wherever it is drawn: no date, no random ids, glyphs left to the viewer.
SETTINGS: Any = {"svg.hashsalt": "mlx_rotor", "svg.fonttype": "none", "font.family": "DejaVu Sans"}


@dataclass(frozen=True)
class Series:
    """Marks (x, KL divergence, name) of one colour: joined by a line, or hollow. A name that isn't empty is written."""

    label: str
    colour: str
    marker: str
    marks: Sequence[tuple[float, Estimate, str]]
    joined: bool


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Point:
    """Marks (x, KL divergence, name) of one colour: joined by a line, or hollow. A name that is not "" is written."""

    name: str
    family: str
    bits: float
    kl: Estimate
    mixed: bool


def available() -> None:
    """Raises RotorError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise RotorError('--plot needs matplotlib: pip install "mlx_rotor[plots]", or pip install matplotlib') from e


def svg(
    panels: Sequence[Panel], y_label: str, *, width: float = 8, margin: float = 0.1, names: int = 6, columns: int = 2
) -> str:
    """Panels side by side over one logarithmic axis of KL divergence, with bars of one standard error, as SVG text.

    Args:
        width: of the figure, in inches.
        margin: around the marks, as a share of the axis.
        names: font size of the marks' names.
        columns: of the legend.

    Raises:
        RotorError: matplotlib is missing.
    """
    available()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width, 5), layout="constrained")
        FigureCanvasSVG(figure)
        every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, panel in zip(every, panels, strict=True):
            for series in panel.series:
                _draw(axes, series, names)
            axes.set_yscale("log")
            axes.margins(x=margin)
            axes.set_xlabel(panel.x_label)
            axes.set_title(panel.title)
            axes.grid(True, which="both", alpha=0.25, linewidth=0.5)
        every[0].set_ylabel(y_label)
        every[-1].legend(fontsize=8, ncols=columns)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _draw(axes: Any, series: Series, names: int) -> None:
    x, y = [x for x, _, _ in series.marks], [kl.value for _, kl, _ in series.marks]
    # A bar to 0 can't be drawn on a logarithmic axis.
    low = [min(kl.se or 0.0, 0.9 * kl.value) for _, kl, _ in series.marks]
    error = [low, [kl.se or 0.0 for _, kl, _ in series.marks]]
    style: dict[str, Any] = {"linewidth": 1.2} if series.joined else {"mfc": "white", "linestyle": "none"}
    at = {"color": series.colour, "marker": series.marker, "label": series.label}
    axes.errorbar(x, y, yerr=error, **at, capsize=2, markersize=5, **style)
    for bits, kl, name in series.marks:
        if name:
            axes.annotate(
                name, (bits, kl.value), (4, 4), textcoords="offset points", fontsize=names, color=series.colour
            )


def points(rows: Sequence[ComparisonRow]) -> list[Point]:
    """The rows that packed something and have a divergence a logarithmic axis can show, by family and bits."""
    found = []
    for row in rows:
        if row.divergence is None or row.footprint.bits is None or row.divergence.mean.value <= 0:
            continue
        families = {_family(side) for layer in row.footprint.codecs for side in layer.split("/")}
        family = families.pop() if len(families) == 1 else "other"
        name = row.kv.removesuffix(".json").rpartition("/")[2]
        mixed = not re.fullmatch(r"[a-z]+\d+(:.*)?", row.kv)
        found.append(Point(name, family, row.footprint.bits, row.divergence.mean, mixed))
    return sorted(found, key=lambda p: (_place(p.family), p.bits, p.name))


def _family(name: str) -> str:
    """Of a codec: its name without bits and parameter; the 8 of fp8 is no choice."""
    base = name.partition(":")[0]
    return base if base in FAMILIES else base.rstrip("0123456789")


def _place(family: str) -> int:
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)


def quality(report: Report) -> str:
    """KL divergence against stored bits an element, a line a codec family, as SVG.

    Only rows of the reference's own weights are drawn: others lose to quantized weights, too. Rows of one codec are
    joined by a line and known by their bits; mixed ones are hollow marks with their names.

    Raises:
        RotorError: no matplotlib, or no compressed row to draw.
    """
    available()
    drawn = points([r for r in report.rows if r.path == report.conditions.reference_path])
    if not drawn:
        raise RotorError(
            "--plot: no row of the reference model has compressed KV and a divergence above 0; add one with --kv"
        )
    series = []
    for family in dict.fromkeys(p.family for p in drawn):
        for mixed in (False, True):
            marks = [(p.bits, p.kl, p.name if mixed else "") for p in drawn if (p.family, p.mixed) == (family, mixed)]
            if marks:
                series.append(Series(f"{family}, mixed" if mixed else family, *_style(family), marks, not mixed))
    c = report.conditions
    title = f"{c.reference}: {c.windows} windows of {c.window} tokens"
    panel = Panel(title, "stored bits an element, scales and means included, mean over layers", series)
    return svg([panel], "KL(exact KV ‖ row), nats a token, ± one standard error")


def _style(family: str) -> tuple[str, str]:
    at = _place(family)
    return (COLOURS[at], MARKERS[at]) if at < len(FAMILIES) else OTHER
