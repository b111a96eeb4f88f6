"""Prompt-cache files of mlx_lm, plain or compressed: written whole, refused where they don't fit or are damaged."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from ..cache import RotorCache, Scheme
from ..errors import RotorError
from ..files import replacing
from .attachment import make_prompt_cache, register, stock_cache
from .layers import SHORTEST_WINDOW, compress, limited
from .notes import fingerprint
from .probe import uses
from .slots import slots

CHECKSUM = "mlx_rotor_checksum"


def _checksum(caches: list[Any]) -> str:
    """CRC-32 of all arrays, in order."""
    total = 0
    leaves: list[tuple[str, Any]] = tree_flatten([c.state for c in caches])  # type: ignore[assignment]
    for name, value in sorted((n, v) for n, v in leaves if isinstance(v, mx.array)):
        flat = mx.contiguous(value).reshape(-1)
        total = zlib.crc32(
            np.array(mx.view(flat, mx.uint8)).data if flat.size else b"", zlib.crc32(name.encode(), total)
        )
    return f"{total:08x}"


def written_path(path: str | Path) -> Path:
    """The file that `path` stands for in writing and in reading: with .safetensors at its end."""
    target = Path(path)
    return target if target.suffix == ".safetensors" else target.with_name(target.name + ".safetensors")


def save_prompt_cache(path: str | Path, caches: list[Any], metadata: dict[str, str] | None = None) -> Path:
    """Writes caches as `mlx_lm.models.cache.save_prompt_cache` does, with a checksum, and all of the file or nothing.

    Returns the file's path, which ends in .safetensors.

    Raises:
        RotorError: the file can't be written.
    """
    target = written_path(path)
    # mlx writes no other name than one that ends in .safetensors.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.safetensors")
    try:
        with replacing(target, temporary):
            stock.save_prompt_cache(str(temporary), caches, {**(metadata or {}), CHECKSUM: _checksum(caches)})
    except (OSError, RuntimeError) as e:
        raise RotorError(f"can't write the prompt cache {target}: {e}") from e
    return target


def read_prompt_cache(path: str | Path) -> tuple[list[Any], dict[str, Any]]:
    """(caches, metadata) of a file that `save_prompt_cache` or `mlx_lm cache_prompt` wrote. Arrays are evaluated.

    Raises:
        RotorError: an unreadable, foreign or damaged file.
    """
    register()
    path = written_path(path)
    try:
        caches, metadata = stock.load_prompt_cache(str(path), return_metadata=True)
        metadata = dict(metadata or {})
        wanted = metadata.pop(CHECKSUM, None)
        # Evaluated here: a server hands caches to another thread.
        mx.eval([c.state for c in caches])
        damaged = wanted is not None and wanted != _checksum(caches)
    except RotorError as e:
        raise RotorError(f"{path}: {e}") from e
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise RotorError(f"can't read the prompt cache {path}: {str(e) or type(e).__name__}") from e
    if damaged:
        raise RotorError(
            f"the prompt cache {path} is damaged: its tokens are not those that were written; make it again"
        )
    return caches, metadata


def fit_prompt_cache(
    path: str | Path, caches: list[Any], model: Any, scheme: Scheme | None, max_kv_size: int | None = None
) -> list[Any]:
    """Caches from a file as `model` uses them under `scheme`: plain ones are compressed, compressed ones must fit.

    Raises:
        RotorError: caches of another model, compressed to another scheme, or of another limit than `max_kv_size`.
    """
    layers = len(stock_cache(model))
    if len(caches) != layers:
        raise RotorError(f"the prompt cache {path} has {len(caches)} layers, and the model {layers}")
    ours = {at: c for at, c in slots(caches).items() if isinstance(c, RotorCache)}
    if scheme is None:
        if ours:
            raise RotorError(
                f"the prompt cache {path} is compressed; --kv exact, --kv-bits and a --max-kv-size below "
                f"{SHORTEST_WINDOW} are for plain ones: leave them out, or make a plain one"
            )
        _same_limit(path, caches, model, max_kv_size)
        return caches
    if not ours:
        _same_limit(path, caches, model, max_kv_size)
        return compress(caches, scheme, uses(model, stock_cache(model)), fingerprint(model))
    if {c.fingerprint for c in ours.values()} - {"", fingerprint(model)}:
        raise RotorError(f"the prompt cache {path} was made with another model, or other weights; make it again")
    wanted = slots(make_prompt_cache(model, scheme, max_kv_size=max_kv_size))
    for at, held in slots(caches).items():
        if _parts(held) != _parts(wanted.get(at)):
            raise RotorError(
                f"the prompt cache {path} holds layer {at[0]} as {_parts(held)}; {scheme.name} wants "
                f"{_parts(wanted.get(at))}: ask for what it was made with (--kv, --kv-sinks, --kv-ring, "
                "--max-kv-size), or make it again"
            )
    return caches


def _same_limit(path: str | Path, caches: list[Any], model: Any, max_kv_size: int | None) -> None:
    """Plain caches that were made without a limit, or with another, can't be given one."""
    if max_kv_size is None:
        return
    wanted = slots(limited(stock_cache(model), max_kv_size))
    for at, held in slots(caches).items():
        limit = getattr(wanted.get(at), "max_size", None)
        if limit is not None and getattr(held, "max_size", None) != limit:
            raise RotorError(
                f"the prompt cache {path} was not made with --max-kv-size {max_kv_size}: leave it out, or make the "
                "file with it"
            )


def _parts(c: Any) -> str:
    if not isinstance(c, RotorCache):
        return type(c).__name__
    k, v = c.codecs
    window = "" if c.window is None else f", window {c.window}"
    means = "" if c.body.centre else ", no means subtracted"
    return f"K {k}, V {v}, {c.sinks} sink tokens, ring {c.ring}{window}{means}"
