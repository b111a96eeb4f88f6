"""Kernels that failed their check on this machine: kept in the user's cache folder, refused when they are called."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ..errors import RotorError
from . import source
from .spec import KernelCodec

_ignored: ContextVar[bool] = ContextVar("mlx_rotor_verdicts_ignored", default=False)


@dataclass(frozen=True)
class Failure:
    """A check that failed: a call of `operation` with all of `codecs` (`codec_id`s) and `dtype` is refused."""

    check: str
    operation: str
    codecs: tuple[str, ...]
    dtype: str


def codec_id(codec: KernelCodec) -> str:
    """Codecs that differ in their parameter only run the same kernels."""
    return f"{codec.name.partition(':')[0]}@{codec.dim}"


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def path() -> Path:
    """The file of verdicts: in `MLX_ROTOR_CACHE`, else in a folder of the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MLX_ROTOR_CACHE") or user / "mlx_rotor") / "kernels.json"


@cache
def kernels_digest() -> str:
    """Of every Metal source and of the Python that launches them."""
    texts = [source.root().joinpath(*name.split("/")).read_bytes() for name in source.names()]
    texts += [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()[:16]


@cache
def key() -> str:
    """What a verdict holds for: this device, system (its compiler comes with it), MLX and kernels."""
    device = mx.device_info().get("device_name", platform.machine())
    return f"{device}; {platform.platform()}; mlx {version('mlx')}; kernels {kernels_digest()}"


def failures() -> tuple[Failure, ...]:
    """What failed under this `key`, as the file says; nothing if there is no file.

    Raises:
        RotorError: a file that can't be read.
    """
    return _parsed(_load().get(key(), ())) if path().exists() else ()


def record(checks: Iterable[str], failed: Sequence[Failure]) -> None:
    """Stores the outcome of `checks`: `failed` are those that failed. Verdicts on other checks and keys stay.

    Raises:
        RotorError: a file that can't be read or written.
    """
    known, run = _load() if path().exists() else {}, set(checks)
    kept = [failure for failure in failures() if failure.check not in run]
    known[key()] = [asdict(failure) for failure in [*kept, *failed]]
    if not known[key()]:
        del known[key()]
    if not known and not path().exists():
        return
    temporary = path().with_name(f"{path().name}.{os.getpid()}.tmp")
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        os.replace(temporary, path())
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise RotorError(f"{path()}: {e.strerror}; set MLX_ROTOR_CACHE to a folder that can be written") from e
    forget()


def forget() -> None:
    """Reads the file anew at the next call of a kernel."""
    _known.cache_clear()


@contextmanager
def ignored() -> Iterator[None]:
    """Refuses nothing inside: checking a kernel again means running it."""
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def refuse(operation: str, dtype: mx.Dtype, *codecs: KernelCodec) -> None:
    """Call before a Metal kernel of `operation` ("encode", "attend", "dequantize") runs over `codecs` in `dtype`.

    Raises:
        RotorError: if a check of it failed on this machine, with the check's name.
    """
    known = _known()
    if not known or _ignored.get():
        return
    asked = {codec_id(codec) for codec in codecs}
    for failure in known:
        if (failure.operation, failure.dtype) == (operation, dtype_name(dtype)) and asked.issuperset(failure.codecs):
            raise RotorError(
                f"the Metal kernel failed its check on this machine: {failure.check}. Update mlx and run "
                "`mlx_rotor doctor --kernels` again; if it still fails, report it with doctor.json. Until then "
                "MLX_ROTOR_BACKEND=reference runs without Metal kernels, or choose another codec"
            )


@cache
def _known() -> tuple[Failure, ...]:
    return failures()


def _load() -> dict[str, list[dict[str, str]]]:
    try:
        known: dict[str, list[dict[str, str]]] = json.loads(path().read_text("utf-8"))
        for entry in known.values():
            _parsed(entry)
        return known
    except OSError as e:
        raise RotorError(f"{path()}: {e.strerror}; it holds verdicts on kernels: make it readable, or delete it") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise RotorError(f"{path()} is not a file of verdicts on kernels; delete it") from e


def _parsed(entry: Iterable[dict[str, str]]) -> tuple[Failure, ...]:
    return tuple(Failure(f["check"], f["operation"], tuple(f["codecs"]), f["dtype"]) for f in entry)
