"""The Python file that a checkpoint in our formats carries, so that mlx_lm alone can load it with --trust-remote-code.

config.json names it as `model_file`; with mlx_rotor imported it is not needed and not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RotorError
from . import formats

NAME = "mlx_rotor_formats.py"
VERSION_KEY, VERSION = "mlx_rotor_format", 1
FIELDS = {"model_file": NAME, VERSION_KEY: VERSION}  # of the config.json of a checkpoint that carries the file
TEMPLATE = Path(__file__).with_name("standalone.py.txt")


def modes(config: Mapping[str, Any]) -> set[str]:
    """Our modes that a config.json names in its `quantization`."""
    quantization = config.get("quantization")
    specs = [quantization, *quantization.values()] if isinstance(quantization, dict) else []
    named = [spec.get("mode") for spec in specs if isinstance(spec, dict)]
    return {mode for mode in formats.ours() if mode in named}


def text(config: Mapping[str, Any]) -> str:
    """The file's content for a checkpoint with this config.json.

    Raises:
        RotorError: the config names no mode of ours, so that mlx_lm needs no file to load it.
    """
    if not modes(config):
        raise RotorError(f"config.json has no weights in {', '.join(formats.ours())}: mlx_lm loads it without {NAME}")
    return TEMPLATE.read_text(encoding="utf-8").replace("{version}", str(VERSION))


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
