"""Quantizing weights: a policy gives every tensor a spec, a plan its bytes, a job streams through a fit."""

from .job import Result, quantize
from .plan import Plan, make_plan
from .policy import Policy, Spec, shipped

__all__ = ["Plan", "Policy", "Result", "Spec", "make_plan", "quantize", "shipped"]
