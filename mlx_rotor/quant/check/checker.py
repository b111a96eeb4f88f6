"""Whether MLX readers can read a checkpoint, ours or not: found from config.json and tensor headers, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import RotorError
from ...experts import standalone
from ...host.stock_reader import StockReader
from . import formats
from .files import companions, config_of, index, weights
from .finding import ERROR, EVERY, Finding, Findings
from .tensors import tensors


def check(folder: str | Path) -> list[Finding]:
    """Everything wrong with a checkpoint folder, errors first; empty where every reader reads it as it is meant.

    Readers: stock mlx_lm, older mlx_lm (which takes what has no override for the default), mlx-swift-lm (likewise,
    and stricter about config.json and about files).

    Raises:
        RotorError: `folder` is no folder.
    """
    folder, found = Path(folder), Findings()
    if not folder.is_dir():
        raise RotorError(f"{folder}: no such folder; --check takes the folder of a checkpoint")
    config = config_of(folder, found)
    headers, whole = weights(folder, found)
    index(folder, headers, found)
    companions(folder, found)
    if config is None or not headers or not whole:
        return found.listed()
    formatted = bool(standalone.modes(config))
    if formatted:
        formats.model_file(folder, config, found)
    if config.get("model_file") and not formatted:
        what = (
            "runs its own model code, which mlx_lm does not unless it is told to; tensors were not checked against it"
        )
        where, fix = [str(config["model_file"])], "load it with trust_remote_code"
        found.error("custom-code", EVERY, what, where, fix)
        return found.listed()
    try:
        reader = StockReader(config)
    except RotorError as e:
        found.error("unknown-model", EVERY, str(e), ["config.json"], "use an mlx_lm that has this architecture")
        return found.listed()
    tensors(config, headers, reader, found)
    return found.listed()


def text(folder: str | Path, findings: Sequence[Finding]) -> str:
    """For people: a line a finding, and a line that counts them."""
    errors = sum(f.severity == ERROR for f in findings)
    if not findings:
        return f"{folder}: nothing wrong"
    return "\n".join([*map(str, findings), f"{folder}: {errors} errors, {len(findings) - errors} warnings"])


def facts(folder: str | Path, findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: a JSON object."""
    errors = sum(f.severity == ERROR for f in findings)
    return {
        "folder": str(folder),
        "errors": errors,
        "warnings": len(findings) - errors,
        "findings": [f.to_dict() for f in findings],
    }


def status(findings: Sequence[Finding]) -> int:
    """Exit status of a command: 1 where there is an error."""
    return int(any(f.severity == ERROR for f in findings))
