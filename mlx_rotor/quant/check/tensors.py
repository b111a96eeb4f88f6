"""Tensors against config.json's quantization and against mlx_lm's own module tree, as each reader takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx

from ...errors import RotorError
from ...experts.formats import beside, ours
from ...host.skeleton import Placeholders, StockReader, stored_spec
from ..safetensors_io import TensorInfo
from . import formats
from .section import EVERY, OLDER, PYTHON, SWIFT, Findings, Section, section_of, strangers

PARTS = ("weight", "scales", "biases", "global_scale")
FLOATS = {mx.bfloat16, mx.float16, mx.float32}
AGAIN = "quantize it again"
Stored = tuple[int, int, str]  # bits, group size, mode


def tensors(config: Mapping[str, Any], headers: Mapping[str, TensorInfo], reader: StockReader, found: Findings) -> None:
    """Holds every tensor against what the readers will look for."""
    try:
        weights = reader.sanitized({name: (info.dtype, info.shape) for name, info in headers.items()})
    except RotorError as e:
        found.error("sanitize-fails", EVERY, str(e), [], "tensors are missing or not of this architecture")
        return
    _naming(headers, weights, found)
    packed = [name for name in weights if name.endswith(tuple(f".{kind}" for kind in beside(ours())))]
    section = section_of(config, bool(packed), found)
    if section is None:
        return
    plain = [p for p in reader.modules if p not in section.ours]
    stored = {p: spec for p in plain if (spec := _stored(reader, weights, p)) is not None}
    if not section.values and packed:
        what = "tensors are quantized, config.json has no quantization"
        found.error("no-quantization", EVERY, what, packed, "add `quantization` with group_size, bits and overrides")
        return
    strangers(section, reader.modules, found)
    done = _modules(section, reader, weights, stored, found) if section.values else set[str]()
    done |= formats.held(section, reader, weights, found)
    _tree(reader, weights, done, found)
    _dtypes(reader, weights, stored, section.ours, found)
    every: dict[str, Any] = {p: spec[0] for p, spec in stored.items()}
    every |= {p: stated.get("bits") for p, stated in section.ours.items()}
    for path, bits in every.items():
        if isinstance(bits, int) and bits < 8 and _is_router(path, reader):
            what, fix = f"a router of {bits} bits picks wrong experts", "keep routers in source precision or 8 bits"
            found.warning("router-bits", EVERY, what, [path], fix)


def _naming(headers: Mapping[str, TensorInfo], weights: Placeholders, found: Findings) -> None:
    gone = [name for name in headers if name not in weights]
    fp8 = any(info.dtype.startswith("F8") for info in headers.values())
    if weights.keys() - headers.keys() or (gone and fp8):
        what = "in the naming of the source, not of MLX: mlx_lm renames or joins them whenever it loads, others may not"
        if fp8:
            what = "FP8 of the source: mlx_lm expands them whenever it loads, others may not"
        found.warning("source-naming", (SWIFT,), what, gone, "convert it")
    elif gone:
        what = "not used: mlx_lm drops them when it loads, others may not"
        found.warning("unused-tensor", (SWIFT,), what, gone, "leave them out")


def _stored(reader: StockReader, weights: Placeholders, path: str) -> Stored | None:
    """How a module's weight is packed; None where it is not."""
    weight, scales = (weights.get(f"{path}.{part}") for part in ("weight", "scales"))
    if not hasattr(reader.modules[path], "to_quantized") or weight is None or scales is None:
        return None
    return stored_spec(reader.inner(path), weight, scales) if weight.shape and scales.size else None


def _modules(
    section: Section, reader: StockReader, weights: Placeholders, stored: Mapping[str, Stored], found: Findings
) -> set[str]:
    """Modules against their settings. Returns the names of parameters that need no further word."""
    before, done = reader.parameters(), set[str]()
    failed = reader.quantize(section.values, weights)
    expected = reader.parameters()
    for path, module in reader.modules.items():
        if path in section.ours:
            if path in failed:
                found.error("wrong-override", formats.OURS, f"{section.said(path)}: {failed[path]}", [path], AGAIN)
                done.update(n for n in weights if n.rpartition(".")[0] == path)
            continue
        names = [f"{path}.{part}" for part in PARTS]
        have, stated = stored.get(path), section.overrides.get(path)
        wrong = path in failed or any(
            expected.get(n) != (tuple(weights[n].shape) if n in weights else None) for n in names
        )
        if have is None and not stated:
            continue  # a plain module, or one whose parts the tree will miss
        if have is None:
            if not hasattr(module, "to_quantized") or before.get(names[0]) == _shape(weights, names[0]):
                what, fix = "an override for a module whose tensors are not quantized", "remove it, or make it false"
                found.error("override-unquantized", (PYTHON, OLDER), what, [path], fix)
                done.update(names)
            continue
        words = _words(have)
        if stated is False:
            what = f"config.json says it is not quantized, its tensors are packed as {words}"
            found.error("override-false", EVERY, what, [path], f"make the override {_json(have)}")
            done.update(names)
        elif path in failed and stated is None:
            what, fix = f"packed as {words}, which no reader takes: {failed[path]}", AGAIN
            found.error("unreadable-module", EVERY, what, [path], fix)
            done.update(names)
        elif path in failed or (wrong and stated is not None and section.read_by_default(path) != have):
            what = f"config.json says {section.said(path)}, its tensors are packed as {words}"
            what += f": {failed[path]}" if path in failed else ""
            breaks = EVERY if section.read_by_default(path) != have else (PYTHON, OLDER)
            found.error("wrong-override", breaks, what, [path], f"make the override {_json(have)}")
            done.update(names)
        elif section.read_by_default(path) not in (have, None):
            what = f"no override, packed as {words}, while the default is {_words(section.default)}"
            fix = f"add an override {_json(have)}: only mlx_lm from 0.32.2 on infers it"
            found.error("missing-override", (OLDER, SWIFT), what, [path], fix)
    return done


def _tree(reader: StockReader, weights: Placeholders, done: set[str], found: Findings) -> None:
    """Names and shapes against the model's, all modules quantized as the loader would."""
    expected = reader.parameters()
    extra = [name for name in weights if name not in expected and name not in done]
    missing = [name for name in expected if name not in weights and name not in done]
    if extra:
        fix = "leave them out; what is no weight belongs in another file"
        found.error("extra-tensor", EVERY, "tensors that the model does not have", extra, fix)
    if missing:
        found.error("missing-tensor", EVERY, "tensors that the model needs are missing", missing, AGAIN)
    for name, shape in expected.items():
        if name in weights and name not in done and tuple(weights[name].shape) != shape:
            what = f"has shape {list(weights[name].shape)}, the model {list(shape)}"
            found.error("wrong-shape", EVERY, what, [name], "correct config.json, or quantize it again")


def _dtypes(
    reader: StockReader,
    weights: Placeholders,
    stored: Mapping[str, Stored],
    apart: Collection[str],
    found: Findings,
) -> None:
    """Dtypes that load and then run wrong or slow. `apart`: modules in our own formats, whose layers give back the
    dtype they were given."""
    kinds: dict[mx.Dtype, list[str]] = {}
    for name, array in weights.items():
        path, _, part = name.rpartition(".")
        have = stored.get(path)
        if path in apart and part != "bias":
            continue
        if have is not None and part in ("weight", "scales"):
            right = {mx.uint32} if part == "weight" else FLOATS if have[2] == "affine" else {mx.uint8}
            if array.dtype not in right:
                what = f"{part} of a quantized module in {_dtype(array)}"
                found.error("wrong-dtype", EVERY, what, [name], AGAIN)
        elif have is None and part in ("weight", "bias") and array.dtype not in FLOATS and reader.is_float(path, part):
            what = f"an unquantized {part} in {_dtype(array)}, taken for numbers"
            found.error("wrong-dtype", EVERY, what, [name], "convert it from the source again")
        if reader.keeps_float32(name):
            if array.dtype in FLOATS - {mx.float32}:
                what, fix = f"in {_dtype(array)}, mlx_lm keeps it in float32", "store it as float32"
                found.warning("bias-dtype", EVERY, what, [name], fix)
        elif array.dtype in FLOATS and part != "global_scale" and not _is_router(path, reader):
            kinds.setdefault(array.dtype, []).append(name)
    if len(kinds) > 1:
        ordered = sorted(kinds, key=lambda d: -len(kinds[d]))
        what = f"{' and '.join(str(d).removeprefix('mlx.core.') for d in ordered)} mixed: activations become float32, "
        what += "slower and twice as large"
        rest = [name for dtype in ordered[1:] for name in kinds[dtype]]
        found.warning("mixed-dtypes", EVERY, what, rest, "store scales, biases and norms in one dtype, best bfloat16")


def _is_router(path: str, reader: StockReader) -> bool:
    """A module that scores experts: beside a stack of them, and called so."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part in ("gate", "router")), 0)
    beside = ".".join(parts[:at]) + "."
    return at > 0 and any(
        p.startswith(beside) and len(getattr(m, "weight", mx.zeros(1)).shape) == 3 for p, m in reader.modules.items()
    )


def _shape(weights: Placeholders, name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def _words(spec: Stored | None) -> str:
    return "nothing" if spec is None else f"{spec[0]} bits in groups of {spec[1]}, {spec[2]}"


def _json(spec: Stored) -> str:
    return f'{{"group_size": {spec[1]}, "bits": {spec[0]}, "mode": "{spec[2]}"}}'


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")
