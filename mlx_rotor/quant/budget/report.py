"""A summary of where a plan's bytes go, and plans side by side: the table of `quantize --dry-run --report`.

Errors are those of Gaussian weights, so they are known before a weight is read; a job reports the real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...tables import text
from ..fit import relative_error
from ..plan import Entry, Plan
from ..policy import Spec
from ..shards import file_bytes

PLAIN = "fast"  # the fit that is MLX's own


@dataclass(frozen=True)
class Summary:
    """One plan.

    Attributes:
        nbytes: weight files, headers included.
        stacks: specs of expert projections (of feed-forward matrices in a model without experts), as `3b g128`, and how
            many have each, fewest bits first.
        plain, fitted: mean relative squared error of their weights with MLX's own quantization and with `fit`.
        attention, embed, head: bits, as `8`, `4, 8` where they differ, or the dtype where kept.
    """

    name: str
    nbytes: int
    bits_per_weight: float
    stacks: dict[str, int]
    stack_bytes: int
    plain: float
    fitted: float
    fit: str
    attention: str
    embed: str
    head: str

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"gb": self.nbytes / 1e9, "gib": self.nbytes / 2**30}


def summarise(name: str, plan: Plan, *, fit: str, shard_bytes: int) -> Summary:
    """`fit`: what the job would use where the policy leaves it open."""
    stacks = [e for e in plan.entries if e.role.startswith("expert.")]
    stacks = stacks or [e for e in plan.entries if e.role.startswith("mlp.")]
    stacks = [e for e in stacks if len(e.shape) > 1]
    specs = Counter(e.spec for e in stacks)
    order = sorted(specs, key=lambda s: (s.bits, -s.group_size) if s else (16, 0))
    nbytes = file_bytes(plan, shard_bytes)
    return Summary(
        name,
        nbytes,
        nbytes * 8 / plan.parameters,
        {_spec(spec): specs[spec] for spec in order},
        sum(e.nbytes for e in stacks),
        _mean_error(stacks, PLAIN, forced=False),
        _mean_error(stacks, fit, forced=True),
        fit,
        _bits(plan, "attn."),
        _bits(plan, "embed"),
        _bits(plan, "head"),
    )


def _mean_error(entries: Sequence[Entry], fit: str, *, forced: bool) -> float:
    """Over all their weights; 0 for kept ones. `forced`: an entry's own fit goes before `fit`."""
    total = sum(e.parameters for e in entries)
    errors = ((e.parameters, _error(e.spec, (forced and e.fit) or fit)) for e in entries)
    return sum(n * error for n, error in errors) / total if total else 0.0


def _error(spec: Spec | None, fit: str) -> float:
    return relative_error(spec.bits, spec.group_size, fit, spec.mode) if spec else 0.0


def _spec(spec: Spec | None) -> str:
    return "kept" if spec is None else spec.short


def _bits(plan: Plan, role: str) -> str:
    """Bits of all matrices whose role begins so, by how many weights have them; empty where there are none."""
    weights: Counter[str] = Counter()
    for e in plan.entries:
        if e.role.startswith(role) and len(e.shape) > 1:
            weights[str(e.spec.bits) if e.spec else e.outputs[0].dtype.lower()] += e.parameters
    return ", ".join(bits for bits, _ in weights.most_common())


def table(summaries: Sequence[Summary]) -> str:
    """Summaries side by side, one a line, columns aligned. They must share their fit."""
    large = max(s.nbytes for s in summaries) >= 10**9
    decimal, binary = (10**9, 2**30) if large else (10**6, 2**20)
    head = [
        "plan",
        *(("GB", "GiB") if large else ("MB", "MiB")),
        "bits",
        "expert stacks",
        "error, fast",
        f"error, {summaries[0].fit}",
    ]
    head += ["attention", "embed", "head"]
    lines = []
    for s in summaries:
        stacks = ", ".join(f"{count} x {spec}" for spec, count in s.stacks.items())
        sizes = [f"{s.nbytes / decimal:.3f}", f"{s.nbytes / binary:.2f}", f"{s.bits_per_weight:.4f}"]
        errors = [f"{s.plain:.4f}", f"{s.fitted:.4f}"]
        lines.append([s.name, *sizes, stacks, *errors, s.attention, s.embed, s.head])
    return text(head, lines, left=(0, 4, 7, 8, 9))
