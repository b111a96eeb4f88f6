"""What a job writes when its weights are there: companions, index, provenance, and config.json last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RotorError
from ..guide import Guide
from ..plan import Entry, Plan
from ..safetensors_io import write_json, write_whole
from ..source import INDEX
from ..source.origin import Origin
from . import manifest
from .journal import Journal


@dataclass(frozen=True)
class Outcome:
    """`errors`: role -> |w - stored| / |w| over the `measured` share of all weights."""

    errors: dict[str, float]
    measured: float


@dataclass(frozen=True)
class Made:
    """What the written files are of. `files`: the entries by weight file, `extra`: files to copy."""

    plan: Plan
    source: str
    origin: Origin
    config: Mapping[str, Any]
    fit: str
    guide: Guide
    files: Mapping[str, list[Entry]]
    extra: Sequence[Path]


def write(out: Path, made: Made, journal: Journal) -> Outcome:
    """Writes everything beside the weights; over what an earlier run that got this far wrote."""
    outcome = _outcome(made.plan, journal)
    for path in made.extra:
        write_whole(out / path.name, path.read_bytes())
    texts = {**manifest.formats_file(made.config, made.plan), **made.guide.files()}
    for name, text in texts.items():
        write_whole(out / name, text.encode())
    write_json(out / INDEX, manifest.index(made.plan, made.files))
    rows = {name: {"bytes": (out / name).stat().st_size, "sha256": journal.files[name]} for name in made.files}
    for name in [*(path.name for path in made.extra), *texts, INDEX]:
        data = (out / name).read_bytes()
        rows[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    provenance = manifest.provenance(
        made.plan,
        source=made.source,
        source_files=made.origin.provenance,
        fit=made.fit,
        calibration=made.guide.describe() or None,
        errors=outcome.errors,
        measured=outcome.measured,
        files=rows,
    )
    write_json(out / manifest.PROVENANCE, provenance)
    write_json(out / "config.json", manifest.config(made.config, made.plan))
    return outcome


def read(out: Path) -> Outcome:
    """The outcome of the job that wrote `out`."""
    made = facts(out)
    return Outcome(made["relative_error"], made["relative_error_measured_on"])


def facts(out: Path) -> dict[str, Any]:
    """What the job that wrote `out` left there about itself. RotorError where no job of this version did."""
    path = out / manifest.PROVENANCE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = found["mlx_rotor"], found["plan_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RotorError(f"{path}: not written by `mlx_rotor quantize` ({type(e).__name__}: {e})") from e
    if version[0] != manifest.versions()["mlx_rotor"]:
        raise RotorError(f"{path}: written by mlx_rotor {version[0]}, which this isn't")
    return found


def _outcome(plan: Plan, journal: Journal) -> Outcome:
    sums: dict[str, list[float]] = {}
    measured = 0
    for entry in plan.entries:
        unit = journal.units[entry.module]
        total = sums.setdefault(entry.role, [0.0, 0.0])
        total[0] += unit.error
        total[1] += unit.norm
        measured += unit.measured
    errors = {role: (error / norm) ** 0.5 if norm else 0.0 for role, (error, norm) in sums.items()}
    return Outcome(errors, measured / plan.parameters)
