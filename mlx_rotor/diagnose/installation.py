"""This machine and installation, and whether they fit together: versions, device, backends, check results."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from .. import bundled, kernels
from ..errors import RotorError
from ..kernels import check_results, launch, metal
from ..quality.machine import machine

# A kernel's work -> the operation of `mlx_rotor.kernels` that runs it, and its Metal source.
OPERATIONS = {
    "encode": ("encode", "attention/encode.h"),
    "attend, decode": ("attend", "attention/decode.h"),
    "attend, prefill": ("attend", "attention/prefill.h"),
    "dequantize": ("dequantize", "attention/dequantize.h"),
    "rotate": ("attend", "attention/rotate.h"),
    "experts, route": ("route", "experts/route.h"),
    "experts, gate and up": ("gate_up", "experts/gate_up.h"),
    "experts, down": ("down", "experts/down.h"),
    "experts, many rows": ("gather", "experts/gather.h"),
    "packed weights": ("matmul", "experts/matvec.h"),
}
MODEL_FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class Finding:
    """A question with an answer. `ok` is False where something must be done, which `text` says."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Operation:
    """The backend that runs an operation, and why; `refused`: checks that failed here, so that it is refused."""

    name: str
    backend: str
    why: str
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """`memory` and `working_set` in bytes; `working_set` is what a GPU's memory recommends, None without one."""

    versions: dict[str, str]
    device: str
    memory: int
    working_set: int | None
    operations: list[Operation]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def diagnose() -> Diagnosis:
    """Looks at this machine and installation; nothing is computed by kernels."""
    info = mx.device_info()
    refused, kernel_finding = _check_results()
    backend, why, backend_finding = _backend()
    operations = [
        Operation(name, backend, why if backend != "metal" else f"{why}; {file}", refused.get(operation, ()))
        for name, (operation, file) in OPERATIONS.items()
    ]
    size = info.get("memory_size")
    working_set = info.get("max_recommended_working_set_size")
    return Diagnosis(
        machine() | {"os": platform.platform()},
        str(info.get("device_name", platform.machine())),
        int(size) if size else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        int(working_set) if working_set else None,
        operations,
        [
            _finding("mlx_lm", _contract),
            _finding("bundled model", _bundled_model),
            _finding("Metal sources", lambda: f"{len(metal.names())} files in {metal.root()}"),
            backend_finding,
            kernel_finding,
        ],
    )


def why_no_kernels() -> str:
    """Why kernels can't be checked here, "" where they can: MLX runs Metal and nothing chose another backend.

    Raises:
        RotorError: if `MLX_ROTOR_BACKEND` is what stands in the way.
    """
    if kernels.backend() == "metal":
        return ""
    if why := launch.reason():
        return why
    raise RotorError("MLX_ROTOR_BACKEND=reference leaves no kernel to check; unset it")


def _contract() -> str:
    try:
        from ..host import versions
    except ImportError as e:
        raise RotorError(f"mlx-lm {machine()['mlx_lm']} lacks what mlx_rotor uses of it: {e}") from e
    versions.check()
    return f"{machine()['mlx_lm']} is supported"


def _backend() -> tuple[str, str, Finding]:
    asked = os.environ.get("MLX_ROTOR_BACKEND")
    try:
        backend = kernels.backend()
    except RotorError as e:
        return "none", "see below", Finding("backend", False, str(e))
    if asked:
        why = f"MLX_ROTOR_BACKEND={asked}"
    else:
        why = launch.reason() or "Metal is there and MLX's default device is the GPU"
    return backend, why, Finding("backend", True, f"{backend}: {why}")


def _check_results() -> tuple[dict[str, tuple[str, ...]], Finding]:
    """Names of failed checks by operation."""
    try:
        failed = check_results.failures()
    except RotorError as e:
        return {}, Finding("checked kernels", False, str(e))
    by_operation: dict[str, tuple[str, ...]] = {}
    for failure in failed:
        by_operation[failure.operation] = (*by_operation.get(failure.operation, ()), failure.check)
    if not failed:
        return {}, Finding("checked kernels", True, "none has failed a check here")
    names = "; ".join(failure.check for failure in failed)
    return by_operation, Finding("checked kernels", False, f"{len(failed)} refused, as they failed: {names}")


def _bundled_model() -> str:
    missing = [name for name in MODEL_FILES if not (bundled.MODEL / name).is_file()]
    weights = sorted(bundled.MODEL.glob("*.safetensors"))
    if missing or not weights:
        what = ", ".join([*missing, *([] if weights else ["*.safetensors"])])
        raise RotorError(f"{bundled.MODEL}: no {what}; reinstall mlx_rotor")
    return f"{sum(file.stat().st_size for file in weights) / 1e6:.1f} MB in {bundled.MODEL}"


def _finding(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except RotorError as e:
        return Finding(name, False, str(e))
