"""Quantizing weights: a source's headers and a recipe resolve to a plan; a job streams the weights through a fit."""

from .fit import fit_affine
from .job import Result
from .making import quantize
from .plan import Plan
from .policy import Policy, Spec, shipped
from .recipe import Recipe, dry_run

__all__ = ["Plan", "Policy", "Recipe", "Result", "Spec", "dry_run", "fit_affine", "quantize", "shipped"]
