"""Which implementation of the kernels runs: `MLX_ROTOR_BACKEND` if set, else the best this machine has."""

from __future__ import annotations

import os

import mlx.core as mx

from ..errors import RotorError
from . import metal

BACKENDS = ("metal", "reference")


def reason() -> str:
    """Why MLX itself can't run Metal kernels here and now; "" where it can."""
    if not mx.metal.is_available():
        return "this machine has no Metal"
    if mx.default_device().type != mx.gpu:
        return "MLX's default device is the CPU"
    return ""


def backend() -> str:
    """The backend's name. Chosen at call time, so that a test or a user can set the variable after import.

    Raises:
        RotorError: if `MLX_ROTOR_BACKEND` names none, or one that can't run here.
    """
    wanted = os.environ.get("MLX_ROTOR_BACKEND")
    if not wanted:
        return "reference" if reason() else "metal"
    if wanted not in BACKENDS:
        raise RotorError(f"MLX_ROTOR_BACKEND={wanted}: there is {', '.join(BACKENDS)}; unset it to choose the best")
    if wanted == "metal" and not metal.simulated() and (why := reason()):
        raise RotorError(f"MLX_ROTOR_BACKEND=metal: {why}; unset it, or set it to reference")
    return wanted
