"""The JSON files of an output checkpoint: config for every MLX reader, index, and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...experts import standalone
from ..plan import Entry, Plan, Row
from ..policy import Spec

PROVENANCE = "mlx_rotor.json"


def config(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
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
    return {standalone.NAME: standalone.text(config(source, plan))} if has_formats(plan) else {}


def index(plan: Plan, files: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """model.safetensors.index.json for entries by file name."""
    names = {output.name: file for file, entries in files.items() for e in entries for output in e.outputs}
    return {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(names.items())),
    }


def provenance(
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
