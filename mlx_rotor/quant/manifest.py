"""The JSON files of an output checkpoint: config for every MLX reader, index, and where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .plan import Entry, Plan

PROVENANCE = "mlx_rotor.json"


def config(source: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The source's config.json with the plan's specs in place of its own quantization.

    Under both `quantization` and `quantization_config`: the most frequent spec as default, and every module with
    another one by its path. Nothing else may stand there: Swift readers take each key for a module, and they take
    the default for quantized modules that aren't named.
    """
    specs = {entry.module: entry.spec for entry in plan.entries if entry.spec is not None}
    result = {k: v for k, v in source.items() if k not in ("quantization", "quantization_config")}
    if specs:
        default = Counter(specs.values()).most_common(1)[0][0]
        section: dict[str, Any] = default.as_config()
        section |= {module: spec.as_config() for module, spec in specs.items() if spec != default}
        result |= {"quantization": section, "quantization_config": section}
    return result


def index(plan: Plan, files: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """model.safetensors.index.json for entries by file name."""
    names = {output.name: file for file, entries in files.items() for e in entries for output in e.outputs}
    return {
        "metadata": {"total_size": plan.nbytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(names.items())),
    }


def provenance(plan: Plan, source: str, fit: str, errors: Mapping[str, float]) -> dict[str, Any]:
    """What made the checkpoint: nothing in it depends on when or where, so equal inputs give equal files."""
    from .. import __version__

    return {
        "mlx_rotor": __version__,
        "source": source,
        "policy": {
            "name": plan.policy.name,
            "description": plan.policy.description,
            "sha256": plan.policy.digest,
        },
        "fit": fit,
        "total_size": plan.nbytes,
        "total_parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "relative_error": dict(errors),
    }
