"""Shared by the oracle's tests: one checkpoint, transformers' reading of it, and ours.

PyTorch is no part of the test extra: without it these tests are skipped, or fail where MLX_ROTOR_ORACLE=1 is set.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import minimax_checkpoint
import mlx.nn as nn
import mlx_side
import numpy as np
import pytest
from traces import Trace

from mlx_rotor.quant import quantize
from mlx_rotor.quant.policy import load

if TYPE_CHECKING:
    from torch_side import Oracle

TOKENS = 96


def _without(reason: str) -> None:
    if os.environ.get("MLX_ROTOR_ORACLE") == "1":
        pytest.fail(f"MLX_ROTOR_ORACLE=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def _torch() -> None:
    if importlib.util.find_spec("torch") is None:
        _without("PyTorch is not installed; pip install 'mlx_rotor[oracle]'")
    if importlib.util.find_spec("transformers.models.minimax_m2") is None:
        _without("this transformers has no MiniMaxM2; pip install 'mlx_rotor[oracle]'")


@pytest.fixture(scope="session")
def checkpoint(_torch: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minimax_checkpoint.write(tmp_path_factory.mktemp("oracle") / "source")


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    from torch_side import Oracle

    return Oracle(checkpoint)


@pytest.fixture(scope="session")
def truth_tokens() -> np.ndarray:
    return minimax_checkpoint.prompt(TOKENS, seed=3)  # one that leaves no router near a tie


@pytest.fixture(scope="session")
def truth(oracle: Oracle, truth_tokens: np.ndarray) -> Trace:
    """transformers' trace of `truth_tokens`."""
    return oracle.trace(truth_tokens)


@pytest.fixture(scope="session")
def unquantized(checkpoint: Path) -> nn.Module:
    return mlx_side.load(checkpoint)


@pytest.fixture(scope="session")
def quantized(checkpoint: Path) -> Callable[[str], nn.Module]:
    """`quantized(policy)`: what a quantize job makes of the checkpoint, loaded."""

    @cache
    def made(policy: str) -> nn.Module:
        out = checkpoint.with_name(policy)
        quantize(checkpoint, out, load(policy))
        return mlx_side.load(out)

    return made
