"""Quantizing weights: a policy gives every tensor a spec, a plan its bytes, a job streams through a fit."""

from .budget import planned
from .fit import fit_affine
from .job import Result, quantize
from .plan import Plan
from .policy import Policy, Spec, shipped

__all__ = ["Plan", "Policy", "Result", "Spec", "fit_affine", "planned", "quantize", "shipped"]
