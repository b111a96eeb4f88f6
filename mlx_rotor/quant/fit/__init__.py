"""Weights to what is stored of them: codes, and what a group's codes stand for."""

from ..policy import FITS
from .affine import fit_affine
from .fitted import Fitted, decode, fit, squared_error, sum_of_squares
from .gptq import Hessian
from .packing import pack

__all__ = [
    "FITS",
    "Fitted",
    "Hessian",
    "decode",
    "fit",
    "fit_affine",
    "pack",
    "squared_error",
    "sum_of_squares",
]
