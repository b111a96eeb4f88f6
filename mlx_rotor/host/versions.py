"""Which mlx_lm this package fits. The seams it uses have moved between mlx_lm's minor versions before."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from ..errors import RotorError

MLX_LM = (0, 32)
MLX_LM_PATCH = 2


@cache
def check(installed: str | None = None) -> None:
    """Refuses an mlx_lm whose insides are unknown.

    Raises:
        RotorError: with the command that installs a fitting one.
    """
    installed = installed or version("mlx-lm")
    parts = [*installed.split("."), "0", "0"][:3]
    major, minor, patch = (int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
    if (major, minor) != MLX_LM or patch < MLX_LM_PATCH:
        low, high = ".".join(map(str, (*MLX_LM, MLX_LM_PATCH))), f"{MLX_LM[0]}.{MLX_LM[1] + 1}"
        raise RotorError(f'mlx-lm {installed} is not supported; run: pip install "mlx-lm>={low},<{high}"')
