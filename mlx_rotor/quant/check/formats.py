"""Weights in formats that MLX doesn't have: their tensors, and the file that mlx_lm alone loads them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import RotorError
from ...experts import standalone
from ...experts.formats import Format, beside, get, modes
from ...host.skeleton import Placeholders, StockReader
from .section import EVERY, ROTOR, TRUSTING, Findings, Section

OURS = (ROTOR, TRUSTING)
AGAIN = "quantize it again"


def held(section: Section, reader: StockReader, weights: Placeholders, found: Findings) -> set[str]:
    """Tensors of modules in our formats against what those are. Returns the names of those that were found wrong, or
    are missing."""
    done = set[str]()
    modules = [path for path in section.ours if path in reader.modules]
    if modules:
        modes = sorted({str(section.ours[path]["mode"]) for path in modules})
        what = (
            f"weights in {', '.join(modes)}, which MLX does not have: mlx_lm reads them once mlx_rotor is imported, or"
        )
        what += " with --trust-remote-code; mlx-swift-lm does not"
        fix = "for readers without mlx_rotor take a policy of MLX's own modes, such as config-i"
        found.warning("rotor-format", EVERY, what, modules, fix)
    for path in modules:
        try:
            stated = section.ours[path]
            form = get(stated["mode"], stated.get("bits", 0), stated.get("group_size", 0))
            expected = form.tensors(*reader.dimensions(path))
        except RotorError:
            continue  # the layer could not be made either, which is told
        done |= _tensors(form, path, {t.kind: (t.dtype, t.shape) for t in expected}, weights, found)
    return done


def _tensors(
    form: Format,
    path: str,
    expected: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]],
    weights: Placeholders,
    found: Findings,
) -> set[str]:
    """One module's."""
    done = set[str]()
    words = f"{form.mode} of {form.bits} bits in groups of {form.group_size}"
    for kind, (dtype, shape) in expected.items():
        name = f"{path}.{kind}"
        array = weights.get(name)
        if array is None:
            found.error("missing-tensor", OURS, f"{kind} of {words} are missing", [name], AGAIN)
        elif tuple(array.shape) != shape:
            what = f"has shape {list(array.shape)}, {words} {list(shape)}"
            found.error("wrong-shape", OURS, what, [name], "correct config.json, or quantize it again")
        elif array.dtype != dtype:
            what = f"{kind} of {words} in {_dtype(array.dtype)}, not {_dtype(dtype)}"
            found.error("wrong-dtype", OURS, what, [name], AGAIN)
        else:
            continue
        done.add(name)
    for kind in beside(modes()):
        if kind not in expected and (name := f"{path}.{kind}") in weights:
            found.error("extra-tensor", OURS, f"{kind}, which {words} does not have", [name], AGAIN)
            done.add(name)
    return done


def model_file(folder: Path, config: Mapping[str, Any], found: Findings) -> None:
    """The file that a checkpoint in our formats carries."""
    named, where = config.get("model_file"), ["config.json"]
    if named != standalone.NAME or config.get(standalone.VERSION_KEY) != standalone.VERSION:
        wrong = {key: config.get(key) for key, value in standalone.FIELDS.items() if config.get(key) != value}
        what = (
            f"{', '.join(f'{key} is {value!r}' for key, value in wrong.items())} in a checkpoint in mlx_rotor's formats"
        )
        fix = ", ".join(f'"{key}": {value!r}'.replace("'", '"') for key, value in standalone.FIELDS.items())
        found.error("no-model-file", OURS, what, where, f"say {fix}")
        return
    path = folder / standalone.NAME
    if not path.is_file():
        found.error("missing-model-file", (TRUSTING,), f"{named} is missing", [standalone.NAME], AGAIN)
        return
    try:
        expected = standalone.text(config)
    except RotorError:
        return  # a form that there is none of, which is told of its module
    if path.read_bytes() != expected.encode():
        what = "is not the file that this mlx_rotor writes, and --trust-remote-code runs it"
        fix = "take the file of a fresh checkpoint, unless you know whose this is, or made it with another version"
        found.warning("other-model-file", (TRUSTING,), what, [standalone.NAME], fix)


def _dtype(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
