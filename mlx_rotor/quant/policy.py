"""Policies: ordered rules, which weights -> spec, read from TOML. The first rule that covers a weight decides.

description = "..."             optional
group_size = [128, 64]          default of the rules below (64); so are mode = "affine" and fit
awq = 0.5                       optional: what experts read is evened out by this power of its size, where that is known
[[rule]]
roles = ["attn.*", "embed"]     names or patterns of `roles.ROLES`
layers = ["0..1", "last 2"]     optional: all layers; the forms are those of `layers.py`
names = ["*.layers.7.*"]        optional: patterns of module paths; one must match. May stand without roles
bits = 4                        or `keep = true`: source precision (FP8 becomes bf16)
group_size = [128, 64, 32]      the first that divides the weight's rows, or one number
mode = "affine"                 or MLX's mxfp4, mxfp8, nvfp4, which fix bits and group_size; or one of our own formats,
                                lloyd, iq4_nl, q8, whose group_size falls back by itself where none is given
where_possible = true           optional: what the model has no quantized form of keeps its precision
fit = "best"                    fast, search or best, whatever the job's is
[floors]
"attn.*" = 4                    no rule, and no budget, gives these roles fewer bits
[kv]                            optional: beside the weights, where there is a calibration text,
codec = "fp8"                   the scales of this KV codec
[budget]                        optional: the affine specs above are a start, the best ones of this size are solved for
bits_per_weight = 3.25          or size = "86.2 GB"

Norms, biases and the like are never quantized, and need no rule. Nor does the router: a pattern never reaches it,
only a rule whose one role is "router" gives it bits.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RotorError
from ..fit import FITS
from . import selectors as layer_sets
from .selectors import ROLES, Layers, expand, kept_unasked
from .spec import BITS, FIXED, GROUP_SIZES, MODES, OURS, Budget, Spec, bits_of, one_of, parse_table, sizes

__all__ = [
    "BITS",
    "FITS",
    "FIXED",
    "GROUP_SIZES",
    "MODES",
    "OURS",
    "Policy",
    "Rule",
    "Spec",
    "load",
    "parse",
    "shipped",
]

FOLDER = Path(__file__).parent / "policies"
KV_CODECS = ("fp8",)  # those with a scale to calibrate


@dataclass(frozen=True)
class Rule:
    """One [[rule]] of a policy.

    Attributes:
        roles: that it speaks of.
        layers: that it covers; None for all.
        names: patterns of module paths, of which one must match; empty for all modules.
        specs: in order of preference; empty to keep the source's precision.
        fit: whatever the job's is; empty where the job decides.
        where_possible: a module without a quantized form is kept instead of being an error.
    """

    roles: tuple[str, ...]
    layers: Layers | None
    names: tuple[str, ...]
    specs: tuple[Spec, ...]
    fit: str = ""
    where_possible: bool = False


@dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        rules: of which the first that covers a weight decides.
        digest: sha256 of the TOML text, for provenance.
        floors: role -> least bits.
        budget: the size that its specs are solved for; None where the rules stand as they are.
        awq: the power of the inputs' size that scale folding moves into what experts read; 0 for none.
        kv: the KV codec whose scales are calibrated; empty for none.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    digest: str
    floors: Mapping[str, int] = field(default_factory=dict, hash=False)
    budget: Budget | None = None
    awq: float = 0.0
    kv: str = ""

    @cached_property
    def ends(self) -> tuple[int, int]:
        """How many layers at each end some rule selects."""
        return layer_sets.ends(rule.layers for rule in self.rules)

    def rule(self, role: str, module: str, layer: int | None, count: int) -> Rule | None:
        """The rule that decides on a module (`layer` None: unlayered) of a model with `count` layers, if one does.

        Raises:
            RotorError: a rule selects layers the model doesn't have.
        """
        for number, rule in enumerate(self.rules, 1):
            if role not in rule.roles or (rule.names and not any(fnmatchcase(module, p) for p in rule.names)):
                continue
            try:
                if rule.layers is None or (layer is not None and rule.layers.covers(layer, count, self.ends)):
                    return rule
            except RotorError as e:
                raise RotorError(f"policy {self.name}, rule {number}: {e}") from None
        return None

    def spec(self, rule: Rule, role: str, columns: int) -> Spec | None:
        """What `rule` makes of a weight with `columns` input dimensions, not below its role's floor; None means keep.

        Raises:
            RotorError: no group size of the rule divides the columns, or its mode has fewer bits than the floor.
        """
        if not rule.specs:
            return None
        fitting = [spec for spec in rule.specs if spec.divides(columns)]
        if not fitting:
            wanted = ", ".join(str(spec.group_size) for spec in rule.specs)
            first = rule.specs[0]
            would = [str(g) for g in sizes(first.mode) if Spec(first.bits, g, first.mode).divides(columns)] or [
                f"none of {first.mode if first.mode in OURS else 'MLX'}'s: give it a rule with keep = true"
            ]
            raise RotorError(
                f"group_size {wanted} does not divide its {columns} input dimensions; would fit: {', '.join(would)}"
            )
        spec, floor = fitting[0], self.floors.get(role, 0)
        if spec.bits >= floor:
            return spec
        if spec.mode != "affine":
            raise RotorError(f"mode {spec.mode} has {spec.bits} bits, the policy's floor for {role} is {floor}")
        return Spec(floor, spec.group_size)


def shipped() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str | Path) -> Policy:
    """A shipped policy by name, or one from the path of a TOML file.

    Raises:
        RotorError: unknown name, unreadable file, or anything in it that is not understood.

    Example:
        >>> load("config-i").rules[0].roles
        >>> load("mine.toml").floors
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
    where = f"policy {name}"
    try:
        _known(table, {"description", "group_size", "mode", "fit", "awq", "kv", "rule", "floors", "budget"})
        rules = table.get("rule")
        if not isinstance(rules, list) or not rules or not all(isinstance(r, dict) for r in rules):
            raise RotorError("needs at least one [[rule]]")
        floors = _floors(table.get("floors", {}))
        budget = parse_table(table["budget"]) if "budget" in table else None
        awq, kv = _awq(table.get("awq", 0)), _kv(table["kv"]) if "kv" in table else ""
        parsed = []
        for number, rule in enumerate(rules, 1):
            where = f"policy {name}, rule {number}"
            parsed.append(_rule(rule, table))
    except RotorError as e:
        raise RotorError(f"{where}: {e}") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    policy = Policy(name, str(table.get("description", "")), tuple(parsed), digest, floors, budget, awq, kv)
    if any(rule.layers and rule.layers.middle for rule in parsed) and policy.ends == (0, 0):
        raise RotorError(f"policy {name}: a rule selects the middle layers, but none the first or the last")
    return policy


def _known(table: dict[str, Any], keys: set[str]) -> None:
    unknown = sorted(table.keys() - keys)
    if unknown:
        raise RotorError(f"unknown key {unknown[0]!r}; keys: {', '.join(sorted(keys))}")


def _strings(table: dict[str, Any], key: str) -> list[str]:
    found = table[key]
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise RotorError(f'{key} must be a list, {key} = ["...", ...]')
    return found


def _floors(table: Any) -> dict[str, int]:
    if not isinstance(table, dict):
        raise RotorError("floors must be a table of role = bits")
    found: dict[str, int] = {}
    for pattern, bits in table.items():
        try:
            one_of("bits", bits, BITS)
            found |= {role: max(bits, found.get(role, 0)) for role in expand(pattern)}
        except RotorError as e:
            raise RotorError(f"floors, {pattern!r}: {e}") from None
    return found


def _awq(power: Any) -> float:
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power <= 1:
        raise RotorError(f"awq = {power!r}: must be a number from 0 (none) to 1")
    return float(power)


def _kv(table: Any) -> str:
    if not isinstance(table, dict) or set(table) != {"codec"}:
        raise RotorError('kv must be a table of one codec, codec = "..."')
    one_of("codec", table["codec"], KV_CODECS)
    return str(table["codec"])


def _rule(rule: dict[str, Any], defaults: dict[str, Any]) -> Rule:
    _known(rule, {"roles", "layers", "names", "bits", "group_size", "mode", "fit", "keep", "where_possible"})
    if "roles" not in rule and "names" not in rule:
        raise RotorError('needs roles = ["...", ...], or names')
    patterns = _strings(rule, "roles") if "roles" in rule else ["*"]
    names = tuple(_strings(rule, "names")) if "names" in rule else ()
    layers = layer_sets.parse(rule["layers"]) if "layers" in rule else None
    keep = rule.get("keep", False)
    mode = rule.get("mode", None if keep else defaults.get("mode", "affine"))
    if ("keep" in rule and keep is not True) or keep == ("bits" in rule or mode not in (None, "affine")):
        raise RotorError("needs either bits = N or keep = true")
    roles: dict[str, None] = {}
    for pattern in patterns:
        found = expand(pattern)
        if pattern in ROLES:
            _named(pattern, patterns, keep, layers)
        else:  # a pattern stands for those of its roles that the rule may speak of
            found = tuple(
                r
                for r in found
                if (keep or not kept_unasked(r)) and (layers is None or ROLES[r].layered or r == "norm")
            )
        roles |= dict.fromkeys(found)
    if keep:
        extra = sorted(rule.keys() & {"group_size", "mode", "fit", "where_possible"})
        if extra:
            raise RotorError(f"keep = true takes no {extra[0]}")
        return Rule(tuple(roles), layers, names, ())
    fit = rule.get("fit", defaults.get("fit", ""))
    if fit:
        one_of("fit", fit, FITS)
    loose = rule.get("where_possible", False)
    if not isinstance(loose, bool):
        raise RotorError(f"where_possible = {loose!r}: must be true or false")
    return Rule(tuple(roles), layers, names, _specs(rule, defaults), fit, loose)


def _named(role: str, patterns: list[str], keep: bool, layers: Layers | None) -> None:
    """Refuses what may not be said of a role by its name."""
    if layers is not None and not ROLES[role].layered:
        raise RotorError(f"role {role!r} has no layers to select")
    if keep:
        return
    what = f"role {role!r} ({ROLES[role].what})"
    if not ROLES[role].quantizable:
        raise RotorError(f"{what} is never quantized: use keep = true")
    if ROLES[role].asked and patterns != [role]:
        raise RotorError(f'{what} is quantized only by a rule of its own, roles = ["{role}"]')


def _specs(rule: dict[str, Any], defaults: dict[str, Any]) -> tuple[Spec, ...]:
    usual = defaults.get("mode", "affine")
    mode = rule.get("mode", usual)
    one_of("mode", mode, MODES)
    if mode in FIXED:
        bits, size = FIXED[mode]
        return (Spec(rule.get("bits", bits), rule.get("group_size", size), mode),)
    known = bits_of(mode)
    if "bits" not in rule and len(known) > 1:
        raise RotorError(f"mode {mode} needs bits = N")
    # What stands above the rules is of the mode that stands there.
    fallback = list(sizes(mode)) if mode in OURS else 64
    found = rule.get("group_size", defaults.get("group_size", fallback) if mode == usual else fallback)
    found = found if isinstance(found, list) else [found]
    if not found:
        raise RotorError("group_size: an empty list fits nothing")
    return tuple(Spec(rule.get("bits", known[0]), size, mode) for size in found)
