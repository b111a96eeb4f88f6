"""The backend that runs kernels: `MLX_ROTOR_BACKEND` if set, else Metal where MLX can run it, else the reference."""

from __future__ import annotations

import os

import mlx.core as mx

from ..errors import RotorError
from . import metal

BACKENDS = ("metal", "reference")


def reason() -> str:
    """The reason why MLX can't run Metal kernels here and now; "" where it can."""
    if not mx.metal.is_available():
        return "this machine has no Metal"
    if mx.default_device().type != mx.gpu:
        return "MLX's default device is the CPU"
    return ""


def backend() -> str:
    """ "metal" or "reference". Chosen at each call, so that a test or a user can set the variable after the import.

    Raises:
        RotorError: `MLX_ROTOR_BACKEND` names no backend, or one that can't run here.
    """
    wanted = os.environ.get("MLX_ROTOR_BACKEND")
    if not wanted:
        return "reference" if reason() else "metal"
    if wanted not in BACKENDS:
        raise RotorError(f"MLX_ROTOR_BACKEND={wanted}: there is {', '.join(BACKENDS)}; unset it to choose the best")
    if wanted == "metal" and not metal.simulated() and (why := reason()):
        raise RotorError(f"MLX_ROTOR_BACKEND=metal: {why}; unset it, or set it to reference")
    return wanted
