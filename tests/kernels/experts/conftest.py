"""Kernels, not references, behind the operations that pick one."""

import pytest


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
