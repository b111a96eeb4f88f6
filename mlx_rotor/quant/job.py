"""A quantize job: check everything that can be checked cheaply, stream, and leave either a checkpoint or nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RotorError
from . import manifest, stream
from .fit import FITS
from .plan import Entry, Plan, decimal, make_plan, read_config
from .policy import Policy
from .safetensors_io import ShardWriter, header_bytes, write_json
from .source import INDEX, Checkpoint, companions, has_weights, is_repository, locate

SHARD_BYTES = 4_000_000_000

Progress = Callable[[str, int, int], None]  # module, source bytes done, source bytes in all


@dataclass(frozen=True)
class Result:
    """`errors`: role -> |w - stored| / |w| over all its weights. `files`: the weight files' names."""

    plan: Plan
    out: Path
    files: tuple[str, ...]
    source_bytes: int
    seconds: float
    errors: dict[str, float]


def dry_run(model: str | Path, policy: Policy) -> tuple[Plan, int | None]:
    """The plan for a model, and the source's bytes where its weights are in a local folder (they are then checked).

    Raises:
        RotorError: as `make_plan`, `Checkpoint.open` and `Checkpoint.verify`.
    """
    folder = locate(model, config_only=True)
    config = read_config(folder)
    if is_repository(model) or not has_weights(folder):
        return make_plan(config, policy), None
    plan, checkpoint = _opened(folder, config, policy)
    return plan, checkpoint.nbytes


def quantize(
    model: str | Path,
    out: str | Path,
    policy: Policy,
    *,
    fit: str = "search",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Result:
    """Quantizes a checkpoint folder or Hugging Face repository into the new or empty folder `out`.

    Memory is bounded by one piece of one tensor, not by the model. Files appear under temporary names and config.json
    last; on any exception everything this call created is removed.

    Raises:
        RotorError: bad input, no room, or a file that can't be written.
    """
    started, out = time.monotonic(), Path(out)
    if fit not in FITS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(FITS)}")
    if shard_bytes < 1:
        raise RotorError(f"a shard of {shard_bytes} bytes holds nothing")
    # Sizes follow from config.json alone: a full disk shows before a repository is fetched.
    config = read_config(locate(model, config_only=True))
    need = make_plan(config, policy).nbytes
    _check_out(out)
    _check_disk(out, need)

    folder = locate(model)
    plan, checkpoint = _opened(folder, config, policy)
    cut = stream.shards(plan, shard_bytes)
    if len(cut) == 1:
        files = {"model.safetensors": cut[0]}
    else:
        files = {f"model-{i:05d}-of-{len(cut):05d}.safetensors": entries for i, entries in enumerate(cut, 1)}
    extra = companions(folder)
    headers = sum(len(header_bytes(o for e in entries for o in e.outputs)) for entries in cut)
    _check_disk(out, plan.nbytes + headers + sum(path.stat().st_size for path in extra))

    names = [*(path.name for path in extra), *files, INDEX, manifest.PROVENANCE, "config.json"]
    with _all_or_nothing(out, names):
        for path in extra:
            shutil.copyfile(path, out / path.name)
        errors = _write_weights(out, files, checkpoint, fit, progress)
        write_json(out / INDEX, manifest.index(plan, files))
        name = str(model) if is_repository(model) else folder.resolve().name
        write_json(out / manifest.PROVENANCE, manifest.provenance(plan, name, fit, errors))
        write_json(out / "config.json", manifest.config(config, plan))
    return Result(plan, out, tuple(files), checkpoint.nbytes, time.monotonic() - started, errors)


def _opened(folder: Path, config: Mapping[str, Any], policy: Policy) -> tuple[Plan, Checkpoint]:
    checkpoint = Checkpoint.open(folder, config)
    plan = make_plan(config, policy, checkpoint.dtypes)
    checkpoint.verify(plan)
    return plan, checkpoint


def _write_weights(
    out: Path, files: Mapping[str, list[Entry]], checkpoint: Checkpoint, fit: str, progress: Progress | None
) -> dict[str, float]:
    total = sum(checkpoint.source_bytes(entry) for entries in files.values() for entry in entries)
    done = 0
    sums: dict[str, tuple[float, float]] = {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(entry.module, done, total)

    for name, entries in files.items():
        writer = ShardWriter(out / name, (output for entry in entries for output in entry.outputs))
        try:
            for entry in entries:
                error, norm = stream.write_entry(entry, checkpoint, writer, fit, advance)
                before = sums.get(entry.role, (0.0, 0.0))
                sums[entry.role] = (before[0] + error, before[1] + norm)
                mx.clear_cache()  # the next entry's arrays may have other sizes
            writer.finish()
        finally:
            writer.close()
    return {role: (error / norm) ** 0.5 if norm else 0.0 for role, (error, norm) in sums.items()}


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RotorError(f"--out {out} is a file")
    if out.is_dir() and any(out.iterdir()):
        hint = "" if (out / "config.json").exists() else " (an unfinished job has no config.json; delete what it left)"
        raise RotorError(f"--out {out} is not empty; choose a new folder{hint}")


def _check_disk(out: Path, need: int) -> None:
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise RotorError(f"not enough disk for --out {out}: needs {decimal(need)}, {decimal(free)} are free")


@contextmanager
def _all_or_nothing(out: Path, names: Iterable[str]) -> Iterator[None]:
    """Makes `out`; if the body fails, removes the named files (and their .tmp) and the folders that were made."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as e:
        for name in names:
            (out / name).unlink(missing_ok=True)
            (out / f"{name}.tmp").unlink(missing_ok=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(e, OSError):
            raise RotorError(f"--out {out}: {e.strerror or e}; nothing was left behind") from e
        raise
