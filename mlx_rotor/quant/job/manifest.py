"""The files that a job writes when its weights are there: companions, index, provenance, and config.json last."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import RotorError
from ...experts import standalone
from ...files import write_bytes, write_json
from ..guide import Guide
from ..plan import Entry, Plan, Row
from ..policy import Spec
from ..source import INDEX, Source
from .journal import Journal

PROVENANCE = "mlx_rotor.json"


def config_of(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The source's config.json with the plan's specs in place of its own quantization.

    Under both `quantization` and `quantization_config`: the most frequent of MLX's specs as default, and every module
    with another one by its path. Nothing else may stand there: Swift readers take each key for a module, and they take
    the default for quantized modules that aren't named. A plan with formats that MLX doesn't have names the file that
    has layers for them.
    """
    specs = {entry.module: entry.spec for entry in plan.entries if entry.spec is not None}
    result = {k: v for k, v in source.items() if k not in ("quantization", "quantization_config")}
    if specs:
        known = Counter(spec for spec in specs.values() if spec.format is None)
        default = known.most_common(1)[0][0] if known else Spec(4, 64)  # which no module has
        section: dict[str, Any] = default.as_config()
        section |= {module: spec.as_config() for module, spec in specs.items() if spec != default}
        result |= {"quantization": section, "quantization_config": section}
    if has_formats(plan):
        result |= standalone.FIELDS
    return result


def has_formats(plan: Plan) -> bool:
    """Whether some weight is in a format that MLX doesn't have."""
    return any(entry.spec is not None and entry.spec.format is not None for entry in plan.entries)


def formats_file(source: Mapping[str, Any], plan: Plan) -> dict[str, str]:
    """Name -> text of the model file that config.json names; empty where it names none."""
    return {standalone.NAME: standalone.text(config_of(source, plan))} if has_formats(plan) else {}


def index(plan: Plan, files: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """model.safetensors.index.json for entries by file name."""
    names = {output.name: file for file, entries in files.items() for e in entries for output in e.outputs}
    return {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(names.items())),
    }


def provenance_of(
    plan: Plan,
    *,
    source: str,
    source_files: Mapping[str, Any],
    fit: str,
    calibration: Mapping[str, Any] | None,
    errors: Mapping[str, float],
    measured: float,
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What made the checkpoint: nothing in it depends on when or where, so equal inputs give equal files.

    `measured`: the share of the weights that `errors` were measured on. `files`: size and sha256 of every other file
    but config.json, by name.
    """
    return {
        **versions(),
        "source": source,
        "source_files": dict(source_files),
        "policy": policy(plan),
        "budget": budget(plan),
        "fit": fit,
        "calibration": dict(calibration) if calibration is not None else None,
        "total_size": plan.nbytes,
        "total_parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "relative_error": dict(errors),
        "relative_error_measured_on": measured,
        "plan": [_row(row) for row in plan.rows()],
        "plan_sha256": digest(plan),
        "files": dict(files),
    }


def policy(plan: Plan) -> dict[str, str]:
    return {"name": plan.policy.name, "description": plan.policy.description, "sha256": plan.policy.digest}


def budget(plan: Plan) -> dict[str, Any] | None:
    """The size that the bits were solved for, and by what; None where the policy's rules give them."""
    if plan.solved is None:
        return None
    by = {"source": plan.solved.sensitivities, "sha256": plan.solved.sha256}
    return {"bytes": plan.solved.nbytes, "sensitivities": by}


def digest(plan: Plan) -> str:
    """sha256 of every tensor's place, spec, shape, dtype and fit."""
    rows = [
        [e.module, e.role, e.shape, e.spec.as_config() if e.spec else None, e.fit, e.sources]
        + [[o.name, o.dtype, o.shape] for o in e.outputs]
        for e in plan.entries
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of what decides the bytes of the output."""
    from ... import __version__  # the package imports this module

    return {"mlx_rotor": __version__, "mlx": str(mx.__version__)}  # type: ignore[attr-defined]


def _row(row: Row) -> dict[str, Any]:
    return {
        "role": row.role,
        "layers": row.layers,
        "count": row.count,
        "spec": row.spec.as_config() if row.spec else None,
        "dtype": row.dtype,
        "parameters": row.parameters,
        "bytes": row.nbytes,
    }


@dataclass(frozen=True)
class Outcome:
    """`errors`: role -> |w - stored| / |w| over the `measured` share of all weights."""

    errors: dict[str, float]
    measured: float


@dataclass(frozen=True)
class Made:
    """What the written files are of. `files`: the entries by weight file, `extra`: files to copy."""

    plan: Plan
    source: Source
    config: Mapping[str, Any]
    fit: str
    guide: Guide
    files: Mapping[str, list[Entry]]
    extra: Sequence[Path]


def write(out: Path, made: Made, journal: Journal) -> Outcome:
    """Writes everything beside the weights; over what an earlier run that got this far wrote."""
    outcome = _outcome(made.plan, journal)
    for path in made.extra:
        write_bytes(out / path.name, path.read_bytes())
    texts = {**formats_file(made.config, made.plan), **made.guide.files()}
    for name, text in texts.items():
        write_bytes(out / name, text.encode())
    write_json(out / INDEX, index(made.plan, made.files))
    rows = {name: {"bytes": (out / name).stat().st_size, "sha256": journal.files[name]} for name in made.files}
    for name in [*(path.name for path in made.extra), *texts, INDEX]:
        data = (out / name).read_bytes()
        rows[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    provenance = provenance_of(
        made.plan,
        source=made.source.name,
        source_files=made.source.provenance,
        fit=made.fit,
        calibration=made.guide.describe() or None,
        errors=outcome.errors,
        measured=outcome.measured,
        files=rows,
    )
    write_json(out / PROVENANCE, provenance)
    write_json(out / "config.json", config_of(made.config, made.plan))
    return outcome


def read(out: Path) -> Outcome:
    """The outcome of the job that wrote `out`."""
    made = facts(out)
    return Outcome(made["relative_error"], made["relative_error_measured_on"])


def facts(out: Path) -> dict[str, Any]:
    """What the job that wrote `out` left there about itself. RotorError where no job of this version did."""
    path = out / PROVENANCE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = found["mlx_rotor"], found["plan_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RotorError(f"{path}: not written by `mlx_rotor quantize` ({type(e).__name__}: {e})") from e
    if version[0] != versions()["mlx_rotor"]:
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
