"""Findings of a check (which reader breaks, where, what to do), and config.json's `quantization` by module.

Readers differ in how strictly they take that section.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...host.skeleton import ours

ERROR, WARNING = "error", "warning"

PYTHON = "mlx_lm"
OLDER = "mlx_lm before 0.32.2"
SWIFT = "mlx-swift-lm"
OTHER = "other tools"
ROTOR = "mlx_rotor"
TRUSTING = "mlx_lm --trust-remote-code"
EVERY = (PYTHON, OLDER, SWIFT)


@dataclass(frozen=True)
class Finding:
    """`kind`: a short name that stays the same; `readers`: those that fail (error) or do worse (warning);
    `where`: tensors, modules or files; `fix`: what to do."""

    severity: str
    kind: str
    readers: tuple[str, ...]
    what: str
    where: tuple[str, ...]
    fix: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        more = f" and {len(self.where) - 3} more" if len(self.where) > 3 else ""
        where = f" ({', '.join(self.where[:3])}{more})" if self.where else ""
        return f"{self.severity} [{self.kind}; {', '.join(self.readers)}]: {self.what}{where}; {self.fix}"


class Findings:
    """Findings as they come; the same one in many places becomes one with many places."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str, tuple[str, ...], str, str], dict[str, None]] = {}

    def error(self, kind: str, readers: Sequence[str], what: str, where: Iterable[str], fix: str) -> None:
        self._add(ERROR, kind, readers, what, where, fix)

    def warning(self, kind: str, readers: Sequence[str], what: str, where: Iterable[str], fix: str) -> None:
        self._add(WARNING, kind, readers, what, where, fix)

    def listed(self) -> list[Finding]:
        """Errors first, else in the order they were found."""
        found = [
            Finding(severity, kind, readers, what, tuple(places), fix)
            for (severity, kind, readers, what, fix), places in self._places.items()
        ]
        return sorted(found, key=lambda f: f.severity != ERROR)

    def _add(self, severity: str, kind: str, readers: Sequence[str], what: str, where: Iterable[str], fix: str) -> None:
        self._places.setdefault((severity, kind, tuple(readers), what, fix), {}).update(dict.fromkeys(where))


OWN = ("group_size", "bits", "mode")
PASSED_OVER = ("quant_method", "linear_class", "quantization_mode")  # by mlx-swift-lm
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
# What mlx_lm reads without a `quantization`, by `quant_method`.
MX = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
TRANSFORMED = ("awq", "gptq", "bitnet")
COMPRESSED = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4", "pack-quantized": "affine"}


@dataclass(frozen=True)
class Section:
    """`values`: as mlx_lm takes it, empty where nothing is quantized. `overrides`: its settings by module."""

    values: Mapping[str, Any]

    @property
    def overrides(self) -> dict[str, Any]:
        return {k: v for k, v in self.values.items() if k not in (*OWN, *PASSED_OVER)}

    @property
    def ours(self) -> dict[str, dict[str, Any]]:
        """Of the overrides those in formats that MLX doesn't have."""
        return {path: stated for path, stated in self.overrides.items() if ours(stated)}

    @property
    def default(self) -> tuple[int, int, str]:
        return self.values["bits"], self.values["group_size"], self.values.get("mode", "affine")

    def read_by_default(self, path: str) -> tuple[int, int, str] | None:
        """(bits, group size, mode) a reader without inference takes for a module that has scales; None: broken."""
        stated = self.overrides.get(path, True)
        if stated is True:
            return self.default
        if isinstance(stated, dict) and not _missing(stated):
            return stated["bits"], stated["group_size"], stated.get("mode", "affine")
        return None

    def said(self, path: str) -> str:
        stated = self.overrides.get(path)
        if isinstance(stated, dict):
            return ", ".join(f"{k} {v}" for k, v in stated.items())
        return f"{self.default[0]} bits in groups of {self.default[1]} by default"


def section_of(config: Mapping[str, Any], packed: bool, found: Findings) -> Section | None:
    """The settings mlx_lm goes by; None where it can't go on or the format is not MLX's. `packed`: scales are there."""
    stated, legacy = config.get("quantization"), config.get("quantization_config")
    if stated is None:
        text = config.get("text_config")
        legacy = text.get("quantization_config") if legacy is None and isinstance(text, dict) else legacy
        return _legacy(legacy, packed, found) if legacy else Section({})
    if not isinstance(stated, dict) or (missing := _missing(stated)):
        what = f"`quantization` has no {' and no '.join(missing)}" if isinstance(stated, dict) else "is no object"
        found.error("no-default", EVERY, what, ["config.json: quantization"], "give group_size and bits")
        return None
    _same_elsewhere(stated, legacy, found)
    _swift(stated, found)
    return Section(stated)


def strangers(section: Section, modules: Mapping[str, Any], found: Findings) -> None:
    """Overrides for what is no module."""
    lost = [k for k, v in section.overrides.items() if isinstance(v, (dict, bool)) and k not in modules]
    if lost:
        what = "overrides for modules that the model does not have: no reader applies them"
        fix = "name modules as in the model that mlx_lm makes, after its own renaming"
        found.warning("override-unknown", EVERY, what, lost, fix)


def _legacy(stated: Any, packed: bool, found: Findings) -> Section | None:
    """As mlx_lm reads `quantization_config` alone."""
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method is None:
        what = "`quantization_config` alone, without quant_method: mlx_lm does not read it"
        found.error("only-quantization-config", EVERY, what, ["config.json"], "add the same under `quantization`")
        return None
    if method in TRANSFORMED:
        what, fix = f"{method}: mlx_lm repacks it whenever it loads, which is not checked", "convert it"
        found.warning("foreign-format", (SWIFT,), what, ["config.json"], fix)
        return None
    mode = {"mxfp4": "mxfp4", "mxfp8": "mxfp8"}.get(method)
    if method == "fp8" and stated.get("scale_fmt") == "ue8m0" and stated.get("weight_block_size") == [32, 32]:
        mode = "mxfp8"
    elif method == "modelopt":
        settings = stated.get("quantization", stated)
        mode = "nvfp4" if settings.get("quant_algo") == "NVFP4" else ""
    elif method == "compressed-tensors":
        mode = COMPRESSED.get(stated.get("format"), "")
    if mode == "":
        what = f"{method} in a form that mlx_lm refuses"
        found.error("foreign-format", EVERY, what, ["config.json"], "start from an unquantized or FP8 checkpoint")
        return None
    if mode is None:
        return Section({})
    bits, group = MX.get(mode, (4, 32))
    found.warning("foreign-format", (SWIFT,), f"{method}: no `quantization` of MLX's", ["config.json"], "convert it")
    return Section({"group_size": group, "bits": bits, "mode": mode})


def _same_elsewhere(stated: Mapping[str, Any], legacy: Any, found: Findings) -> None:
    if legacy is None or legacy == stated:
        return
    method = legacy.get("quant_method") if isinstance(legacy, dict) else None
    what = "`quantization_config` is not the same as `quantization`: other tools go by it"
    if method:
        what = f"`quantization_config` still says {method}, as the source did: other tools go by it"
    found.warning("stale-quantization-config", (OTHER,), what, ["config.json"], "copy `quantization` there")


def _swift(stated: Mapping[str, Any], found: Findings) -> None:
    """What mlx-swift-lm's decoder does not take: it fails on the whole file."""
    for key, value in [("", stated), *stated.items()]:
        if key in (*OWN, *PASSED_OVER) or isinstance(value, bool):
            continue
        where = [f"quantization.{key}" if key else "quantization"]
        if not isinstance(value, dict):
            what = "a key that is no module: mlx-swift-lm takes every key for one"
            found.error("foreign-key", (SWIFT,), what, where, "keep what is no module's setting in another file")
        elif missing := _missing(value):
            what = f"an override without {' and '.join(missing)}"
            found.error("incomplete-override", (SWIFT,), what, where, "give both group_size and bits")
        elif key and ours(value):
            continue  # `formats` speaks of them
        elif value.get("mode", "affine") not in MODES:
            what = f"mode {value['mode']!r}"
            found.error("unknown-mode", EVERY, what, where, f"modes: {', '.join(MODES)}")


def _missing(stated: Mapping[str, Any]) -> list[str]:
    return [k for k in ("group_size", "bits") if type(stated.get(k)) is not int]
