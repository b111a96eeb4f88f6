"""Which implementation of the kernels runs: `MLX_ROTOR_BACKEND` if set, else the best this build has."""

from __future__ import annotations

import os

from ..errors import RotorError

BACKENDS = ("reference",)


def backend() -> str:
    """The backend's name. Chosen at call time, so that a test or a user can set the variable after import.

    Raises:
        RotorError: if `MLX_ROTOR_BACKEND` names one this build doesn't have.
    """
    wanted = os.environ.get("MLX_ROTOR_BACKEND") or BACKENDS[0]
    if wanted not in BACKENDS:
        raise RotorError(
            f"MLX_ROTOR_BACKEND={wanted}: this build has {', '.join(BACKENDS)}; unset it to choose the best"
        )
    return wanted
