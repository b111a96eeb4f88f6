"""The drawing of a comparison: which rows are in it, where, and that it is the same every time."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quality import plot
from mlx_rotor.quality.footprint import Footprint
from mlx_rotor.quality.metrics import Divergence, Estimate
from mlx_rotor.quality.report import ComparisonRow, Conditions, Report

SVG = "{http://www.w3.org/2000/svg}"


def row(kv, bits, kl, path="/m", codecs=None):
    codecs = (f"{kv}/{kv}", "turbo4/turbo4" if kv.startswith("turbo") else f"{kv}/{kv}") if codecs is None else codecs
    divergence = None if kl is None else Divergence(Estimate(kl, kl / 10), kl, kl, (kl,), Estimate(0.9, None))
    footprint = Footprint(100, 1000, 2000, 10.0, bits, codecs, 8, 8, 1, 0)
    return ComparisonRow(
        "m", path, "", "float32", kv, kl is None, Estimate(8.0, 0.1), None, divergence, None, {}, {}, footprint, 1.0
    )


def report(*rows):
    names = [f.name for f in dataclasses.fields(Conditions)]
    basis = dict.fromkeys(names, 0) | {"reference": "m", "reference_path": "/m", "windows": 3, "window": 64}
    return Report(Conditions(**basis), list(rows), {}, 1.0)


ROWS = [
    row("exact", None, None),
    row("turbo4", 4.2, 0.001),
    row("turbo2", 2.2, 0.02),
    row("turbo4v2", 3.2, 0.004, codecs=("turbo4/turbo3", "turbo4/turbo2")),
    row("trellis3", 3.2, 0.0015),
    row("fp8", 8.0, 0.0001),
    row("some/fp8-mine.json", 8.0, 0.00009, codecs=("fp8:0.1/fp8:0.2",)),
    row("k=trellis4,v=iso3", 3.7, 0.002, codecs=("trellis4/iso3",)),
    row("calibrated.json", 3.0, 0.003, codecs=("trellis4/trellis3", "trellis2/trellis2")),
    row("turbo3", 3.2, 0.5, path="/other weights"),
]


def test_points_are_the_compressed_rows_by_family():
    found = plot.points(ROWS[:-1])
    assert [(p.name, p.family, p.mixed) for p in found] == [
        ("calibrated", "trellis", True),
        ("trellis3", "trellis", False),
        ("turbo2", "turbo", False),
        ("turbo4v2", "turbo", True),
        ("turbo4", "turbo", False),
        ("fp8", "fp8", False),
        ("fp8-mine", "fp8", True),
        ("k=trellis4,v=iso3", "other", True),
    ]
    assert (found[2].bits, found[2].kl) == (2.2, Estimate(0.02, 0.002))


def test_the_drawing_names_families_and_mixed_points_and_no_other_weights():
    pytest.importorskip("matplotlib")
    root = ElementTree.fromstring(plot.quality(report(*ROWS)))
    texts = ["".join(t.itertext()) for t in root.iter(f"{SVG}text")]
    for kv in ("turbo4v2", "fp8-mine", "calibrated", "k=trellis4,v=iso3"):
        assert kv in texts
    assert {"turbo", "turbo, mixed", "trellis", "fp8", "other, mixed", "m: 3 windows of 64 tokens"} <= set(texts)
    assert "planar" not in texts
    drawn = plot.quality(report(*ROWS, row("planar3", 3.2, 0.5, path="/other weights")))
    assert drawn == plot.quality(report(*ROWS)), "rows of other weights are left out"


def test_lower_divergence_is_drawn_lower():
    pytest.importorskip("matplotlib")
    text = plot.quality(
        report(row("turbo4v2", 2.2, 0.02, codecs=("turbo4/turbo2",)), row("trellis4v2", 2.2, 0.01, codecs=()))
    )
    at = {name: float(re.search(rf' y="([\d.]+)"[^<>]*>{name}</text>', text)[1]) for name in ("turbo4v2", "trellis4v2")}
    assert at["trellis4v2"] > at["turbo4v2"], "SVG's y grows downwards"


def test_the_same_report_is_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_plot as t\n"
        "print(t.plot.quality(t.report(*t.ROWS)), end='')"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert other == plot.quality(report(*ROWS)) and "<svg" in other and "dc:date" not in other


def test_nothing_to_draw():
    pytest.importorskip("matplotlib")
    with pytest.raises(RotorError, match="no row of the reference model has compressed KV and a divergence above 0"):
        plot.quality(report(ROWS[0], ROWS[-1], row("affine8", 8.5, 0.0)))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RotorError, match=r'pip install "mlx_rotor\[plots\]"'):
        plot.available()
