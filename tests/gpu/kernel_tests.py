"""Runs the kernels' own tests with another maker behind their kernels: the GPU's, or one that records launches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import kernel_cases
from metal_sim import Report

FOLDER = Path(__file__).parents[1] / "kernels"
Maker = Callable[..., Callable[..., list[mx.array]]]


class Outcomes:
    """A pytest plugin. `found` is test -> (outcome, what it said), of the tests that launched a kernel."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str]] = {}
        self.launched = False

    def pytest_runtest_setup(self) -> None:
        self.launched = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and self.launched:
            said = report.longreprtext.splitlines()
            self.found[report.nodeid] = (report.outcome, next((x for x in reversed(said) if x.startswith("E ")), ""))


def run(maker: Maker, only: str = "") -> dict[str, tuple[str, str]]:
    """Test -> (outcome, last line of its error). `only` is pytest's -k. Tests of the simulator's own views stay out."""
    outcomes = Outcomes()

    class Instead(kernel_cases.Simulator):
        def __call__(self, **text: Any) -> Callable[..., list[mx.array]]:
            kernel = maker(**text)

            def call(**launch: Any) -> list[mx.array]:
                outcomes.launched = True
                self.reports.append((text["name"], Report()))
                return kernel(**launch)

            return call

    before = kernel_cases.Simulator, kernel_cases.needs_simulator
    kernel_cases.Simulator = Instead
    kernel_cases.needs_simulator = pytest.mark.skip(reason="needs the simulator")
    try:
        pytest.main([str(FOLDER), "-q", "--no-header", "-p", "no:cacheprovider", "-k", only], plugins=[outcomes])
    finally:
        kernel_cases.Simulator, kernel_cases.needs_simulator = before
    return outcomes.found
