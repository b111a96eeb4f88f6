"""The work of the commands, as functions: `mlx_rotor.plan`, `mlx_rotor.quantize`, `mlx_rotor.evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bundled import MODEL
from .cache import DEFAULT, EXACT
from .quality.compare import compare
from .quality.report import Report
from .quality.sample import QUICK, Size
from .quant import making
from .quant.events import Progress
from .quant.job import Result
from .quant.plan import Plan
from .quant.recipe import dry_run
from .quant.request import recipe


def plan(model: str | Path | None = None, policy: str | Path | None = None, **asked: Any) -> Plan:
    """Which bits every tensor of a checkpoint gets and what that takes, before a weight is read.

    Args:
        model: checkpoint folder or Hugging Face repository, of which config.json is enough; None is the bundled model.
        policy: a shipped policy's name or a TOML file; None is `rotor` where a size is given, else `config-i`.
        asked: at most one of `target_size` (bytes, or text such as "86GB"), `target_bpw` (bits a weight) and `memory`
            (a Mac's RAM, as "128GB", with `context` in tokens, `kv` and `wired_limit`); and further fields of
            `quant.recipe.Recipe`.

    Returns:
        The plan: `nbytes` of all tensors, `bits_per_weight`, and `entries`, one a tensor.

    Raises:
        RotorError: no such model or policy, a size that no bits give, or a model with unknown tensors.

    Example:
        >>> mlx_rotor.plan("examples/minimax_m27").nbytes
        92871229440
    """
    model = MODEL if model is None else model
    return dry_run(model, recipe(model, policy, **asked)[0])[0]


def quantize(
    model: str | Path | None,
    out: str | Path,
    policy: str | Path | None = None,
    *,
    workers: int | None = None,
    resume: bool = False,
    stream_source: bool = False,
    progress: Progress | None = None,
    **asked: Any,
) -> Result:
    """Quantizes a checkpoint into MLX safetensors that stock mlx_lm loads.

    Memory is bounded by a piece of one tensor for each worker. A job that was stopped goes on with `resume`, to files
    that are equal to the byte.

    Args:
        model: checkpoint folder or Hugging Face repository; None is the bundled model.
        out: a new or empty folder; with `resume`, one with an unfinished job.
        policy: as of `plan`.
        workers: threads; None: by the machine.
        stream_source: fetch a repository's files one at a time and delete each after its last use.
        progress: called with an `Event` for everything that gets done.
        asked: as of `plan`; among a recipe's fields are `fit` ("fast", "search" or "best") and `calibration` (a text
            file, or "bundled").

    Returns:
        The result: its `plan`, its `files`, `seconds`, and `errors` by role as |w - stored| / |w|.

    Raises:
        RotorError: bad input, no room, a file that can't be read or written; with `resume`, another job.

    Example:
        >>> mlx_rotor.quantize(None, "out", "uniform-4bit", fit="fast").files
        ('model.safetensors',)
    """
    model = MODEL if model is None else model
    wanted, _ = recipe(model, policy, **asked)
    return making.quantize(
        model, out, wanted, workers=workers, resume=resume, stream_source=stream_source, progress=progress
    )


def evaluate(
    models: Sequence[str | None] = (None,),
    kv: Sequence[str] = (EXACT, DEFAULT),
    *,
    against: str | None = None,
    text: str | None = None,
    text_name: str = "given text",
    size: Size = QUICK,
    protection: Mapping[str, int] | None = None,
    file: Path | None = None,
    progress: bool = False,
) -> Report:
    """Measures what compression costs: perplexity, KL divergence, needles and memory of models under KV schemes.

    Args:
        models: folders, repositories, `NAME=PATH`, or None (the bundled model).
        kv: schemes; `exact` is mlx_lm's own cache.
        against: the reference model, with exact KV; None is the first of `models`.
        text: what is measured on; None is text that the bundled model has not seen.
        text_name: what the report calls that text.
        size: of the sample: `quality.sample.QUICK`, `THOROUGH` or `TINY`; `QUICK.with_(windows=4)` changes one part.
        protection: `sinks`, `ring` and `protect_layers` of every scheme but exact.
        file: JSON that keeps every finished row; rows it holds are not measured again.
        progress: a bar on stderr.

    Returns:
        The report: `rows`, one a model and scheme in the order asked for, and `markdown()`.

    Raises:
        RotorError: unknown model or scheme, or a sample that doesn't fit text or model.

    Example:
        >>> [row.kv for row in mlx_rotor.evaluate(kv=["exact", "turbo4"]).rows]
        ['exact', 'turbo4']
    """
    return compare(
        models,
        kv,
        against=against,
        text=text,
        text_name=text_name,
        size=size,
        protection=protection,
        file=file,
        progress=progress,
    )
