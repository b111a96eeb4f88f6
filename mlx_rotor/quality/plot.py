"""A comparison as a drawing: KL divergence against stored bits an element, one line a codec family. SVG text only."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RotorError
from .report import ComparisonRow, Report

FAMILIES = ("trellis", "turbo", "isofull", "iso", "planar", "rotor", "fp8", "affine")
COLOURS = ("#0b6e4f", "#1f4e9e", "#7b3fa0", "#c2477f", "#c7671a", "#8a8a1f", "#555555", "#111111")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
OTHER = ("#888888", "h")
# One file for one report, whenever and wherever it is drawn: no date, no random ids, glyphs left to the viewer.
SETTINGS: Any = {"svg.hashsalt": "mlx_rotor", "svg.fonttype": "none", "font.family": "DejaVu Sans"}


@dataclass(frozen=True)
class Point:
    """A compressed row. `mixed`: K and V have different codecs, or layers were calibrated."""

    name: str
    family: str
    bits: float
    kl: float
    se: float | None
    mixed: bool


def available() -> None:
    """Raises RotorError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise RotorError('--plot needs matplotlib: pip install "mlx_rotor[plots]", or pip install matplotlib') from e


def points(rows: Sequence[ComparisonRow]) -> list[Point]:
    """The rows that packed something and have a divergence a logarithmic axis can show, by family and bits."""
    found = []
    for row in rows:
        if row.divergence is None or row.footprint.bits is None or row.divergence.mean.value <= 0:
            continue
        families = {_family(side) for layer in row.footprint.codecs for side in layer.split("/")}
        family = families.pop() if len(families) == 1 else "other"
        kl, name = row.divergence.mean, row.kv.removesuffix(".json").rpartition("/")[2]
        mixed = not re.fullmatch(r"[a-z]+\d+(:.*)?", row.kv)
        found.append(Point(name, family, row.footprint.bits, kl.value, kl.se, mixed))
    return sorted(found, key=lambda p: (_place(p.family), p.bits, p.name))


def _family(name: str) -> str:
    """Of a codec: its name without bits and parameter; the 8 of fp8 is no choice."""
    base = name.partition(":")[0]
    return base if base in FAMILIES else base.rstrip("0123456789")


def _place(family: str) -> int:
    return FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)


def quality(report: Report) -> str:
    """The drawing, SVG. Only rows of the reference's own weights are in it: others lose to quantization, too.

    Raises:
        RotorError: no matplotlib, or no compressed row to draw.
    """
    available()
    drawn = points([r for r in report.rows if r.path == report.conditions.reference_path])
    if not drawn:
        raise RotorError(
            "--plot: no row of the reference model has compressed KV and a divergence above 0; add one with --kv"
        )
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.margins(x=0.1)
        for family in dict.fromkeys(p.family for p in drawn):
            _draw_family(axes, [p for p in drawn if p.family == family], family)
        axes.set_xlabel("stored bits an element, scales and means included, mean over layers")
        axes.set_ylabel("KL(exact KV ‖ row), nats a token, ± one standard error")
        axes.set_title(
            f"{report.conditions.reference}: {report.conditions.windows} windows of {report.conditions.window} tokens"
        )
        axes.grid(True, which="both", alpha=0.25, linewidth=0.5)
        axes.legend(fontsize=8, ncols=2)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _style(family: str) -> tuple[str, str]:
    at = _place(family)
    return (COLOURS[at], MARKERS[at]) if at < len(FAMILIES) else OTHER


def _draw_family(axes: Any, family_points: Sequence[Point], family: str) -> None:
    """Symmetric schemes joined by a line, mixed ones as hollow marks with their names."""
    colour, marker = _style(family)
    for mixed in (False, True):
        part = [p for p in family_points if p.mixed == mixed]
        if not part:
            continue
        style: Mapping[str, Any] = {"mfc": "white", "linestyle": "none"} if mixed else {"linewidth": 1.2}
        label = f"{family}, mixed" if mixed else family
        x, y = [p.bits for p in part], [p.kl for p in part]
        # A bar to 0 can't be drawn on a logarithmic axis.
        low = [min(p.se or 0.0, 0.9 * p.kl) for p in part]
        error = [low, [p.se or 0.0 for p in part]]
        axes.errorbar(x, y, yerr=error, color=colour, marker=marker, label=label, capsize=2, markersize=5, **style)
        # Points of a line are known by it and by their bits; their names would cover each other.
        for p in part if mixed else ():
            axes.annotate(p.name, (p.bits, p.kl), (4, 4), textcoords="offset points", fontsize=6, color=colour)
