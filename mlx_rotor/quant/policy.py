"""Policies: ordered rules, role x layers -> spec, read from TOML. The first rule that covers a tensor decides.

description = "..."             optional
group_size = 64                 default of the rules below; so is mode = "affine"
[[rule]]
roles = ["attn.*", "embed"]     names or patterns of `roles.ROLES`
layers = ["first 2", "last 2", "10-19", 30]     optional: all layers
bits = 4                        or `keep = true`: source precision (FP8 becomes bf16)
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RotorError
from .roles import ROLES, expand

FOLDER = Path(__file__).parent / "policies"
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MODES = ("affine",)


@dataclass(frozen=True)
class Spec:
    """How a weight is stored: bits a code, weights a group (one bf16 scale and bias each), MLX's quantization mode."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("bits", self.bits, BITS),
            ("group_size", self.group_size, GROUP_SIZES),
            ("mode", self.mode, MODES),
        ):
            if isinstance(value, bool) or value not in known:
                raise RotorError(f"{what} = {value!r} is not supported; {what} can be {', '.join(map(str, known))}")

    def as_config(self) -> dict[str, int | str]:
        """The form MLX readers expect in config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class Layers:
    """A set of layers whose ends may depend on how many there are."""

    first: int = 0
    last: int = 0
    ranges: tuple[tuple[int, int], ...] = ()

    def covers(self, layer: int, count: int) -> bool:
        """Whether `layer` of a model with `count` layers is in the set; RotorError where a range leaves the model."""
        beyond = [b for _, b in self.ranges if b >= count]
        if beyond:
            raise RotorError(f"a rule selects layer {beyond[0]}, but the model has layers 0-{count - 1}")
        return layer < self.first or layer >= count - self.last or any(a <= layer <= b for a, b in self.ranges)


@dataclass(frozen=True)
class Rule:
    """`layers` None: all of them. `spec` None: keep the source's precision."""

    roles: tuple[str, ...]
    layers: Layers | None
    spec: Spec | None


@dataclass(frozen=True)
class Policy:
    """`digest`: sha256 of the TOML text, for provenance."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    digest: str

    def spec(self, role: str, layer: int | None, count: int) -> Spec | None:
        """The spec of a role in a layer (None: unlayered) of a model with `count` layers; None means keep.

        Raises:
            RotorError: no rule covers it.
        """
        for rule in self.rules:
            if role in rule.roles and (rule.layers is None or (layer is not None and rule.layers.covers(layer, count))):
                return rule.spec
        where = "" if layer is None else f" in layer {layer}"
        raise RotorError(f"policy {self.name}: no rule covers role {role!r}{where}; add one (`keep = true` leaves it)")


def shipped() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str | Path) -> Policy:
    """A shipped policy by name, or one from the path of a TOML file.

    Raises:
        RotorError: unknown name, unreadable file, or anything in it that is not understood.
    """
    path = FOLDER / f"{name}.toml" if str(name) in shipped() else Path(name)
    if not path.is_file():
        raise RotorError(
            f"unknown policy {str(name)!r}; shipped: {', '.join(shipped())}, or give the path of a TOML file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RotorError(f"policy {path}: {e}") from e
    return parse(text, path.stem)


def parse(text: str, name: str) -> Policy:
    """A policy from TOML text. RotorError names the rule and the key that is wrong."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise RotorError(f"policy {name}: not TOML: {e}") from e
    try:
        _known(table, {"description", "group_size", "mode", "rule"})
        rules = table.get("rule")
        if not isinstance(rules, list) or not rules or not all(isinstance(r, dict) for r in rules):
            raise RotorError("needs at least one [[rule]]")
    except RotorError as e:
        raise RotorError(f"policy {name}: {e}") from None
    parsed = []
    for number, rule in enumerate(rules, 1):
        try:
            parsed.append(_rule(rule, table))
        except RotorError as e:
            raise RotorError(f"policy {name}, rule {number}: {e}") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Policy(name, str(table.get("description", "")), tuple(parsed), digest)


def _known(table: dict[str, Any], keys: set[str]) -> None:
    unknown = sorted(table.keys() - keys)
    if unknown:
        raise RotorError(f"unknown key {unknown[0]!r}; keys: {', '.join(sorted(keys))}")


def _rule(rule: dict[str, Any], defaults: dict[str, Any]) -> Rule:
    _known(rule, {"roles", "layers", "bits", "group_size", "mode", "keep"})
    patterns = rule.get("roles")
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise RotorError('needs roles = ["...", ...]')
    roles = tuple(dict.fromkeys(name for pattern in patterns for name in expand(pattern)))
    layers = _layers(rule["layers"]) if "layers" in rule else None
    unlayered = [name for name in roles if not ROLES[name].layered]
    if layers is not None and unlayered:
        raise RotorError(f"role {unlayered[0]!r} has no layers to select")

    if ("bits" in rule) == ("keep" in rule) or rule.get("keep", True) is not True:
        raise RotorError("needs either bits = N or keep = true")
    if "keep" in rule:
        if "group_size" in rule or "mode" in rule:
            raise RotorError("keep = true takes neither group_size nor mode")
        return Rule(roles, layers, None)
    fixed = [name for name in roles if not ROLES[name].quantizable]
    if fixed:
        raise RotorError(f"role {fixed[0]!r} ({ROLES[fixed[0]].what}) is never quantized: use keep = true")
    group_size, mode = (rule.get(k, defaults.get(k, d)) for k, d in (("group_size", 64), ("mode", "affine")))
    return Rule(roles, layers, Spec(rule["bits"], group_size, mode))


def _layers(items: Any) -> Layers:
    items = items if isinstance(items, list) else [items]
    first = last = 0
    ranges = []
    for item in items:
        match = re.fullmatch(r"(first|last) (\d+)|(\d+)(?:-(\d+))?", str(item).strip())
        if match is None or isinstance(item, (bool, float)):
            raise RotorError(f"layers: {item!r} is none of 'first N', 'last N', 'A-B', N")
        end, count, low, high = match.groups()
        if end == "first":
            first = max(first, int(count))
        elif end == "last":
            last = max(last, int(count))
        elif int(high or low) < int(low):
            raise RotorError(f"layers: {item!r} runs backwards")
        else:
            ranges.append((int(low), int(high or low)))
    if not items:
        raise RotorError("layers: an empty list selects nothing; leave it out for all layers")
    return Layers(first, last, tuple(ranges))
