"""Quantizing weights: a source's headers and a recipe resolve to a plan; a job streams the weights through a fit.

Names are imported when first used: most of them load mlx_lm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fit import fit_affine
    from .job import Result
    from .making import quantize
    from .plan import Plan
    from .policy import Policy, Spec, shipped
    from .recipe import Recipe, dry_run

_WHERE = {
    "fit_affine": "fit",
    "Result": "job",
    "quantize": "making",
    "Plan": "plan",
    **dict.fromkeys(("Policy", "Spec", "shipped"), "policy"),
    **dict.fromkeys(("Recipe", "dry_run"), "recipe"),
}
__all__ = ["Plan", "Policy", "Recipe", "Result", "Spec", "dry_run", "fit_affine", "quantize", "shipped"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
