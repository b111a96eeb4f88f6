"""The Python file that a checkpoint in our formats carries, so that mlx_lm alone can load it with --trust-remote-code.

config.json names it as `model_file`; with mlx_rotor imported it is not needed and not run. Its layers are a template;
its decoders are the sources of the decoders of the formats that the checkpoint has.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RotorError
from . import formats
from .formats.base import codes, source

NAME = "mlx_rotor_formats.py"
VERSION_KEY, VERSION = "mlx_rotor_format", 1
FIELDS = {"model_file": NAME, VERSION_KEY: VERSION}  # of the config.json of a checkpoint that carries the file
TEMPLATE = Path(__file__).with_name("standalone.py.txt")


def modes(config: Mapping[str, Any]) -> set[str]:
    """Our modes that a config.json names in its `quantization`."""
    named = [spec.get("mode") for spec in _specs(config)]
    return {mode for mode in formats.ours() if mode in named}


def _specs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The default of a config.json's `quantization` and what it says of single modules."""
    quantization = config.get("quantization")
    specs = [quantization, *quantization.values()] if isinstance(quantization, dict) else []
    return [spec for spec in specs if isinstance(spec, dict)]


def text(config: Mapping[str, Any]) -> str:
    """The file's content for a checkpoint with this config.json.

    Raises:
        RotorError: the config names no mode of ours, so that mlx_lm needs no file to load it; or bits or a group size
            that the mode does not have.
    """
    if not modes(config):
        raise RotorError(f"config.json has no weights in {', '.join(formats.ours())}: mlx_lm loads it without {NAME}")
    ours = [spec for spec in _specs(config) if spec.get("mode") in formats.ours()]
    used = {formats.get(spec["mode"], spec.get("bits", 0), spec.get("group_size", 0)) for spec in ours}
    forms = {(f.mode, f.bits, f.group_size): dict.fromkeys(f.beside, f.per_group) for f in used}
    decoders = {mode: source(formats.kind(mode).decoder, mode).strip() for mode in sorted(modes(config))}
    filled = {
        "version": str(VERSION),
        "forms": "\n".join(f"    {name!r}: {beside!r}," for name, beside in sorted(forms.items())).replace("'", '"'),
        "decoders": "\n\n\n".join([inspect.getsource(codes).strip(), *decoders.values()]),
        "names": ", ".join(f'"{mode}": decode_{mode}' for mode in decoders),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in filled.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def without_model_file(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it is to be read where mlx_rotor's own layers do what the file does; another's file stays.

    Raises:
        RotorError: a checkpoint of a later version of the formats.
    """
    if VERSION_KEY not in config:
        return config
    if config[VERSION_KEY] != VERSION:
        raise RotorError(
            f"config.json: {VERSION_KEY} is {config[VERSION_KEY]!r}, this mlx_rotor reads {VERSION}; "
            "run: pip install -U mlx_rotor"
        )
    return {key: value for key, value in config.items() if (key, value) != ("model_file", NAME)}


def with_model_file(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a loaded checkpoint as its file has it, for whoever saves the model again."""
    return {**FIELDS, **config} if VERSION_KEY in config else config
