"""Loading a model: mlx_lm's loader, the bundled model as default, and a dtype the backend can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load as stock_load

from ..bundled import MODEL
from ..errors import RotorError
from . import versions
from .kv_scales import came_from


def run_dtype(model: Any) -> None:
    """On a CPU backend, casts a model in place to float32: MLX's CPU gathers no 16-bit experts and multiplies 16-bit
    quantized weights many times slower. Scales are cast, codes are not; no value changes."""
    if mx.default_device() == mx.Device(mx.gpu):
        return
    parameters: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    if any(a.dtype in (mx.bfloat16, mx.float16) for _, a in parameters):
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())


def located(path: str | Path | None) -> str:
    """What mlx_lm's loader is to be given for `path`: a folder, or a name that is none here. None is the bundled model.

    Raises:
        RotorError: a folder that does not exist or holds no model.
    """
    target = MODEL if path is None else path
    folder = Path(target).expanduser()
    if not folder.exists() and (Path(str(target)).is_absolute() or str(target).startswith((".", "~"))):
        raise RotorError(f"no model at {target}: the folder does not exist")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RotorError(f"no model at {target}: the folder has no config.json")
    if folder.is_dir():
        check_config(folder / "config.json")
    return str(folder if folder.is_dir() else target)


def check_config(file: Path) -> None:
    """Raises RotorError for a config.json that can't be read or holds no JSON object."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise RotorError(f"{file} can't be read: {e.strerror if isinstance(e, OSError) else e}") from e
    if not isinstance(config, dict):
        raise RotorError(f"{file} must hold a JSON object, not a {type(config).__name__}")


@contextmanager
def explained(target: str) -> Iterator[None]:
    """Turns what mlx_lm's loader raises over `target` into a RotorError that names the cause."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError, ImportError) as e:
        why = " ".join(line.strip() for line in str(e).splitlines() if line.strip()) or type(e).__name__
        why = f"{why} is missing" if isinstance(e, KeyError) else why
        if not Path(target).is_dir():
            why = f"no such folder here, and fetching it from Hugging Face failed ({why})"
        raise RotorError(f"can't load {target}: {why}") from e


def load(path: str | Path | None = None, **kwargs: Any) -> tuple[Any, ...]:
    """Loads a model as `mlx_lm.load` does; on a CPU in float32, which it computes fastest.

    Args:
        path: a model's folder or Hugging Face repository; None is the bundled model.
        kwargs: keyword arguments of `mlx_lm.load`, such as `adapter_path`.

    Returns:
        (model, tokenizer), with `return_config=True` (model, tokenizer, config).

    Raises:
        RotorError: no model there, or one mlx_lm can't read; the cause is named.

    Example:
        >>> model, tokenizer = mlx_rotor.load()
    """
    versions.check()
    target = located(path)
    with explained(target):
        loaded = stock_load(target, **kwargs)
    run_dtype(loaded[0])
    if Path(target).is_dir():
        came_from(loaded[0], target)
    return loaded
