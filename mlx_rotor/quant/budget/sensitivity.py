"""Sensitivities: what storing each weight with each spec costs, measured on some text or taken from a prior.

Costs add up, and less is better. `solver` weighs them against bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import RotorError
from ...files import write_json
from ..fit import relative_error
from ..plan import Plan
from ..policy import BITS, GROUP_SIZES, Spec

FORMAT, VERSION = "mlx_rotor sensitivities", 1
PRIOR = "prior"

# What a matrix's relative error counts for, against 1 for a projection of a layer's experts (or of a dense feed-forward
# block), whose output is one of 2 * layers contributions to the residual stream.
# Attention (linear too): q and k err inside a softmax, k and v are read again by every later token, and each serves
# several query heads. Every published mixture gives attention more bits than experts; it is 1 % of a large one's
# weights.
# Embeddings: the first contribution, read by every layer. Mixtures that were measured keep 4 to 6 bits.
# The head is not in the table: no other contribution dilutes its error on the way to the logits, so it counts for all.
ROLE_WEIGHTS = {"attn": 2.0, "linear": 2.0, "embed": 4.0}


@dataclass(frozen=True)
class Sensitivities:
    """`costs`: module -> spec -> cost. A spec that was not measured is derived from the nearest one, see `cost`.

    Attributes:
        source: PRIOR, or the text it was measured on.
        model: `fingerprint` of the plan it belongs to.
        fit: the fit it assumes, one of `fit.FITS`.
    """

    source: str
    model: str
    fit: str
    costs: Mapping[str, Mapping[Spec, float]]

    @cached_property
    def digest(self) -> str:
        """sha256 of all that is in it."""
        return hashlib.sha256(json.dumps(self._body(), sort_keys=True).encode()).hexdigest()

    def cost(self, module: str, spec: Spec) -> float:
        """Of storing `module` as `spec`. Where that was not measured: the cost of the measured spec whose error on
        Gaussian weights is nearest by ratio, times that ratio.

        Raises:
            RotorError: nothing is known of the module.
        """
        known = self.costs.get(module)
        if not known:
            raise RotorError(f"sensitivities ({self.source}) know nothing of {module}; measure them again")
        if spec in known:
            return known[spec]
        error = relative_error(spec.bits, spec.group_size, self.fit, spec.mode)
        ratios = {s: error / relative_error(s.bits, s.group_size, self.fit, s.mode) for s in known}
        nearest = min(ratios, key=lambda s: abs(math.log(ratios[s])))
        return known[nearest] * ratios[nearest]

    def check(self, plan: Plan) -> None:
        """RotorError where it belongs to a model of other dimensions."""
        if self.model != fingerprint(plan):
            raise RotorError(
                f"the sensitivities measured on {self.source} belong to a model of other dimensions; measure them on"
                " this one"
            )

    def write(self, path: Path) -> None:
        """Raises OSError where the file can't be written."""
        write_json(path, self._body() | {"sha256": self.digest})

    def _body(self) -> dict[str, Any]:
        rows = {
            module: [[s.bits, s.group_size, s.mode, cost] for s, cost in sorted(specs.items(), key=_order)]
            for module, specs in self.costs.items()
        }
        head = {"format": FORMAT, "version": VERSION, "source": self.source, "model": self.model, "fit": self.fit}
        return head | {"costs": rows}


def _order(item: tuple[Spec, float]) -> tuple[int, int, str]:
    return item[0].bits, -item[0].group_size, item[0].mode


def read(path: Path, plan: Plan) -> Sensitivities:
    """A file that `Sensitivities.write` made, for this plan's model.

    Raises:
        RotorError: unreadable, another format or version, damaged, or of another model.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RotorError(f"sensitivities {path}: not readable as JSON: {e}") from e
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise RotorError(f"sensitivities {path}: not a file of sensitivities ({FORMAT!r} is missing)")
    if table.get("version") != VERSION:
        raise RotorError(
            f"sensitivities {path}: version {table.get('version')!r}, this release reads {VERSION}; measure them again"
        )
    try:
        costs = {module: dict(_row(row) for row in rows) for module, rows in table["costs"].items()}
        found = Sensitivities(str(table["source"]), str(table["model"]), str(table["fit"]), costs)
    except (KeyError, TypeError, ValueError, AttributeError, RotorError) as e:
        raise RotorError(f"sensitivities {path}: damaged ({e})") from e
    if found.digest != table.get("sha256"):
        raise RotorError(f"sensitivities {path}: changed since they were measured (the sha256 differs)")
    try:
        found.check(plan)
    except RotorError as e:
        raise RotorError(f"sensitivities {path}: {e}") from None
    return found


def _row(row: Any) -> tuple[Spec, float]:
    bits, group_size, mode, cost = row
    if not isinstance(cost, (int, float)) or isinstance(cost, bool) or not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"a cost of {cost!r}")
    return Spec(bits, group_size, mode), float(cost)


def fingerprint(plan: Plan) -> str:
    """16 hexadecimal digits of every entry's module, role and shape: equal for checkpoints of the same dimensions."""
    text = json.dumps([[e.module, e.role, list(e.shape)] for e in plan.entries])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prior(plan: Plan, fit: str = "search") -> Sensitivities:
    """Sensitivities as if all matrices of a kind were equally sensitive: the relative error of Gaussian weights under
    the fit (an entry's own, where the policy forces one), times the role's weight."""
    costs = {}
    for entry in plan.entries:
        if len(entry.shape) > 1:
            weight = role_weight(entry.role, plan)
            specs = [Spec(b, g) for b in BITS for g in GROUP_SIZES if entry.shape[-1] % g == 0]
            costs[entry.module] = {s: weight * relative_error(s.bits, s.group_size, entry.fit or fit) for s in specs}
    return Sensitivities(PRIOR, fingerprint(plan), fit, costs)


def role_weight(role: str, plan: Plan) -> float:
    """What a relative error of 1 in a matrix of this role costs; see ROLE_WEIGHTS."""
    tied = role == "embed" and not any(entry.role == "head" for entry in plan.entries)
    if role == "head" or tied:
        return max(2.0 * plan.layers, ROLE_WEIGHTS["embed"])
    return ROLE_WEIGHTS.get(role.partition(".")[0], 1.0)
