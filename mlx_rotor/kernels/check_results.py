"""Results of checks and timings of kernels on this machine, kept in a file in the user's cache folder.

A kernel that failed its check is refused when it is called. `--experts auto` leaves experts to mlx_lm where their
kernels failed, or were slower than mlx_lm's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RotorError
from ..files import write_bytes
from . import metal
from .spec import Codec, PackedWeight, WeightFormat

TIMED_ROWS = (1, 2, 4, 8)  # rows that expert kernels are timed at
OF_EXPERTS = ("route", "gate_up", "down")  # operations that fused experts are made of
Entries = list[dict[str, Any]]
_ignored: ContextVar[bool] = ContextVar("mlx_rotor_check_results_ignored", default=False)


@dataclass(frozen=True)
class Failure:
    """A check that failed: a call of `operation` with all of `codecs` and `dtype` is refused.

    `codecs` are `codec_id`s, or `format_id`s where the operation reads weights; empty: all calls.
    """

    check: str
    operation: str
    codecs: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Slower:
    """A timing that mlx_lm's experts won: milliseconds a call of both, for `key` (`experts_key`) and `rows`."""

    key: str
    rows: int
    fused_ms: float
    stock_ms: float


def codec_id(codec: Codec) -> str:
    """Name without parameter, and dimension, as in "trellis3@128": codecs that differ in a parameter share kernels."""
    return f"{codec.name.partition(':')[0]}@{codec.dim}"


def format_id(form: WeightFormat) -> str:
    """Mode, bits and group size, as in "affine4:64"."""
    return f"{form.mode}{form.bits}:{form.group_size}"


def experts_key(gate: PackedWeight, up: PackedWeight, down: PackedWeight) -> str:
    """The key of a timing of fused experts: the three formats, hidden and intermediate size, as in
    "affine2:64+affine2:64+affine3:64 3072x1536"."""
    return f"{'+'.join(format_id(w.format) for w in (gate, up, down))} {gate.columns}x{gate.rows}"


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def path() -> Path:
    """The file of check results: in `MLX_ROTOR_CACHE`, else in a folder of the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MLX_ROTOR_CACHE") or user / "mlx_rotor") / "kernels.json"


@cache
def kernels_digest() -> str:
    """A digest of every Metal source and of the Python that launches them."""
    texts = [metal.root().joinpath(*name.split("/")).read_bytes() for name in metal.names()]
    texts += [file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()[:16]


@cache
def key() -> str:
    """The device, system (which brings the compiler), version of MLX and text of the kernels that results hold for."""
    device = mx.device_info().get("device_name", platform.machine())
    return f"{device}; {platform.platform()}; mlx {version('mlx')}; kernels {kernels_digest()}"


def failures() -> tuple[Failure, ...]:
    """The checks that failed under this `key`, as the file says; none if there is no file.

    Raises:
        RotorError: a file that can't be read.
    """
    return _failures(_entries())


def slower() -> tuple[Slower, ...]:
    """Timings under this `key` in which mlx_lm was faster. Raises as `failures`."""
    return _slower(_entries())


def record(checks: Iterable[str], failed: Sequence[Failure]) -> None:
    """Stores the outcome of `checks`: `failed` are those that failed. Results of other checks and keys stay.

    Raises:
        RotorError: a file that can't be read or written.
    """
    run = set(checks)
    _store([*(failure for failure in failures() if failure.check not in run), *failed, *slower()])


def record_timings(timed: Iterable[tuple[str, int]], lost: Sequence[Slower]) -> None:
    """Stores the outcome of timing `timed`, pairs of an `experts_key` and rows: in `lost`, mlx_lm was faster. Other
    results stay. Raises as `record`."""
    run = set(timed)
    _store([*failures(), *(known for known in slower() if (known.key, known.rows) not in run), *lost])


def _store(found: Sequence[Failure | Slower]) -> None:
    known = _load() if path().exists() else {}
    known[key()] = [asdict(one) for one in found]
    if not known[key()]:
        del known[key()]
    if not known and not path().exists():
        return
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        # Another process may be writing the same file.
        temporary = path().with_name(f"{path().name}.{os.getpid()}.tmp")
        write_bytes(path(), (json.dumps(known, indent=1) + "\n").encode(), temporary)
    except OSError as e:
        raise RotorError(f"{path()}: {e.strerror}; set MLX_ROTOR_CACHE to a folder that can be written") from e
    forget()


def forget() -> None:
    """Reads the file anew at the next call of a kernel."""
    _known.cache_clear()
    _failed.cache_clear()


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, no kernel is refused: a check has to run the kernel again."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def refuse(operation: str, dtype: mx.Dtype, *codecs: Codec) -> None:
    """Call before a Metal kernel of `operation` ("encode", "attend", "dequantize") runs over `codecs` in `dtype`.

    Raises:
        RotorError: if a check of it failed on this machine, with the check's name.
    """
    if failed := _failed(operation):
        _refuse(failed, dtype, {codec_id(codec) for codec in codecs}, "choose another codec")


def refuse_weights(operation: str, dtype: mx.Dtype, *formats: WeightFormat) -> None:
    """`refuse` for the expert kernels: "gate_up", "down", "gather", "matmul", or "route", which reads no weights."""
    if failed := _failed(operation):
        _refuse(failed, dtype, {format_id(form) for form in formats}, "--experts stock where weights are MLX's own")


def prefers_stock(kernel_key: str, rows: int) -> str | None:
    """The reason why mlx_lm should run experts of `kernel_key` (`experts_key`) with so many rows; None: none is known.

    A number of rows that is not timed counts as the next larger one that is.
    """
    failed, lost = _known()
    if _ignored.get():
        return None
    formats = set(kernel_key.partition(" ")[0].split("+"))
    for failure in failed:
        if failure.operation in OF_EXPERTS and formats.issuperset(failure.codecs):
            return f"its kernel failed a check on this machine: {failure.check}"
    timed = next((n for n in TIMED_ROWS if n >= rows), None)
    for one in lost:
        if (one.key, one.rows) == (kernel_key, timed):
            return (
                f"fused took {one.fused_ms:.3f} ms and stock {one.stock_ms:.3f} for {one.rows} "
                f"row{'s' if one.rows > 1 else ''} on this machine"
            )
    return None


def _refuse(failed: Sequence[Failure], dtype: mx.Dtype, asked: set[str], instead: str) -> None:
    """`failed`: of one operation."""
    if _ignored.get():
        return
    for failure in failed:
        if failure.dtype == dtype_name(dtype) and asked.issuperset(failure.codecs):
            raise RotorError(
                f"the Metal kernel failed its check on this machine: {failure.check}. Update mlx and run "
                "`mlx_rotor doctor --kernels` again; if it still fails, report it with doctor.json. Until then "
                f"MLX_ROTOR_BACKEND=reference runs without Metal kernels, or {instead}"
            )


@cache
def _failed(operation: str) -> tuple[Failure, ...]:
    """Cached: every launch asks."""
    return tuple(failure for failure in _known()[0] if failure.operation == operation)


@cache
def _known() -> tuple[tuple[Failure, ...], tuple[Slower, ...]]:
    return failures(), slower()


def _entries() -> Entries:
    return _load().get(key(), []) if path().exists() else []


def _load() -> dict[str, Entries]:
    try:
        known: dict[str, Entries] = json.loads(path().read_text("utf-8"))
        for entry in known.values():
            _failures(entry), _slower(entry)
        return known
    except OSError as e:
        raise RotorError(
            f"{path()}: {e.strerror}; it holds check results of kernels: make it readable, or delete it"
        ) from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise RotorError(f"{path()} is not a file of check results of kernels; delete it") from e


def _failures(entries: Entries) -> tuple[Failure, ...]:
    return tuple(
        Failure(e["check"], e["operation"], tuple(e["codecs"]), e["dtype"]) for e in entries if "fused_ms" not in e
    )


def _slower(entries: Entries) -> tuple[Slower, ...]:
    return tuple(
        Slower(e["key"], int(e["rows"]), float(e["fused_ms"]), float(e["stock_ms"])) for e in entries if "fused_ms" in e
    )
