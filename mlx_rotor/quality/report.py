"""The result of a comparison, as tables for people and as one object for machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import tables
from . import greedy
from .footprint import Footprint
from .greedy import Greedy
from .metrics import Divergence, Estimate, Tally, total

NONE = "–"
FORMAT, VERSION = "mlx_rotor evaluation", 1


@dataclass(frozen=True)
class ComparisonRow:
    """One configuration: a model under a KV scheme.

    `change` (of the perplexity), `divergence` and `greedy` are None for the reference itself. `fingerprint` tells
    whether files have changed, see `model.fingerprint`.
    """

    label: str
    path: str
    fingerprint: str
    weights: str
    kv: str
    is_reference: bool
    perplexity: Estimate
    change: Estimate | None
    divergence: Divergence | None
    greedy: Greedy | None
    needles: dict[tuple[int, float], Tally]
    chats: dict[str, Tally]
    footprint: Footprint
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        out["needle"] = _tally(total(list(self.needles.values())))
        out["needles"] = [{"length": n, "depth": d, **_tally(t)} for (n, d), t in self.needles.items()]
        out["chat"] = _tally(total(list(self.chats.values())))
        out["chats"] = {kind: _tally(t) for kind, t in self.chats.items()}
        if self.greedy:
            more = {"mean": asdict(self.greedy.mean), "median": self.greedy.median, "never": _tally(self.greedy.never)}
            out["greedy"] |= more
        kv = out.pop("footprint")
        kv["bytes_per_token"] = self.footprint.bytes / self.footprint.tokens
        kv["of_fp16"] = self.footprint.bytes / self.footprint.fp16
        return {**out, "kv_memory": kv}


def _tally(tally: Tally | None) -> dict[str, Any]:
    return {"right": tally.right, "of": tally.of, **asdict(tally.rate)} if tally else {}


@dataclass(frozen=True)
class Conditions:
    """The conditions that all rows share: reference, text and sample.

    `protection`: the schemes' defaults that the user changed. `spool_*`: the file of the reference's log-probabilities.
    """

    reference: str
    reference_path: str
    reference_weights: str
    reference_fingerprint: str
    text: str
    text_digest: str
    text_tokens: int
    windows: int
    window: int
    chunk: int
    needles: int
    needle_lengths: tuple[int, ...]
    depths: tuple[float, ...]
    chats: int
    greedy: int
    greedy_repeating: int
    seed: int
    protection: dict[str, int]
    spool_bytes: int
    spool_dtype: str


@dataclass(frozen=True)
class Report:
    """A comparison. `seconds`: the time of all rows together; `missing`: rows asked for and not measured yet."""

    conditions: Conditions
    rows: list[ComparisonRow]
    machine: dict[str, str]
    seconds: float
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Perplexities a token, divergences in nats a token, `se` one standard error."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "basis": asdict(self.conditions),
            "rows": [row.to_dict() for row in self.rows],
            "machine": self.machine,
            "seconds": self.seconds,
            "missing": list(self.missing),
        }

    def markdown(self) -> str:
        """The tables, and notes on the sample, the reference and the machine."""
        columns = [c for c in _COLUMNS if c != _GREEDY or self.conditions.greedy]
        parts = [_table(columns, self.rows)]
        cells = list(self.rows[0].needles) + list(self.rows[0].chats)
        if cells:
            parts.append(_table(_detail_columns(self.rows[0]), self.rows))
        return "\n\n".join([*parts, self._notes()]) + "\n"

    def _notes(self) -> str:
        b, m, tokens = self.conditions, self.machine, self.rows[0].footprint.tokens
        sample = [f"{b.windows} windows × {b.window} tokens of {b.text}, fed {b.chunk} at a time"]
        sample += [f"{b.needles} needles"] if b.needles else []
        sample += [f"{b.chats} chats"] if b.chats else []
        sample += [f"{b.greedy} prompts of {greedy.PROMPT} tokens continued greedily"] if b.greedy else []
        changed = "".join(f", {k.replace('_', ' ')} {v}" for k, v in b.protection.items())
        quantized = "quantized" in b.reference_weights
        warning = " (quantized: name a float model with --against to see what that cost)" if quantized else ""
        lines = [
            f"Sample: {', '.join(sample)}, seed {b.seed}{changed}.",
            f"Reference: {b.reference}, {b.reference_weights}, exact KV{warning}. KL(reference ‖ row) in nats a token.",
            "± is one standard error: between windows for perplexity, its change (paired with the reference's), KL and "
            "top-1; between prompts for greedy tokens; under a flat prior for needles and chats.",
            f"KV bytes a token at {tokens} tokens, with exact first and recent tokens (in the model's own type) and "
            "spare room; then what each further token adds. In brackets: against stock fp16. Bits: a packed element's.",
        ]
        if b.greedy:
            lines.insert(
                3,
                f"Same greedily: of {greedy.TOKENS} tokens, how many precede the first that is not the reference's: "
                f"mean over prompts (one that never differs counts {greedy.TOKENS}), median, how many never differ. "
                f"{b.greedy_repeating} of the reference's {b.greedy} continuations end in a loop.",
            )
        if self.missing:
            lines.append(f"Not measured yet: {', '.join(self.missing)}.")
        fell = [f"{r.label} {r.kv}" for r in self.rows if r.footprint.fallback_calls]
        if fell:
            lines.append(
                f"Not always attended to in packed form (values right, nothing saved then): {', '.join(fell)}."
            )
        lines.append(
            f"{m['machine']}, MLX {m['mlx']} on {m['device']}, mlx-lm {m['mlx_lm']}, mlx_rotor {m['mlx_rotor']}, "
            f"Python {m['python']}, {m['date']}; {self.seconds:.0f} s."
        )
        return "\n".join(f"- {line}" for line in lines)


Column = tuple[str, Callable[[ComparisonRow], str]]


def _table(columns: Sequence[Column], rows: Sequence[ComparisonRow]) -> str:
    cells = [[show(row) for _, show in columns] for row in rows]
    return tables.markdown([title for title, _ in columns], cells, left=(0, 1))


def _estimate(e: Estimate | None, digits: int | None = None, percent: bool = False, sign: bool = False) -> str:
    """`10.65 ± 0.31`; digits None shows two of the error's, so that small KLs keep their meaning."""
    if e is None:
        return NONE
    factor, unit = (100, " %") if percent else (1, "")
    value, se = e.value * factor, None if e.se is None else e.se * factor
    if digits is None:
        scale = se or abs(value)
        digits = max(0, min(7, 1 - math.floor(math.log10(scale)))) if scale else 1
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text + (f" ± {se:.{digits}f}" if se is not None else "") + unit


def _figures(x: float) -> str:
    """Two significant figures, without an exponent."""
    return f"{x:.{max(0, min(7, 1 - math.floor(math.log10(x))))}f}" if x > 0 else "0"


def _rate(tallies: Sequence[Tally]) -> str:
    all_ = total(tallies)
    return f"{_estimate(all_.rate, 0, percent=True)} ({all_})" if all_ else NONE


def _memory(per_token: float | None, row: ComparisonRow) -> str:
    """`1,712 (21 %)`: bytes a token, and their share of what fp16 takes."""
    if per_token is None:
        return NONE
    return f"{per_token:,.0f} ({100 * per_token * row.footprint.tokens / row.footprint.fp16:.0f} %)"


def _kl(show: Callable[[Divergence], str]) -> Callable[[ComparisonRow], str]:
    return lambda row: "reference" if row.divergence is None else show(row.divergence)


def _greedy(row: ComparisonRow) -> str:
    """`171 ± 30, 205, 3/8`."""
    if row.greedy is None:
        return "reference" if row.is_reference else NONE
    return f"{_estimate(row.greedy.mean, 0)}, {row.greedy.median:.0f}, {row.greedy.never}"


_GREEDY: Column = ("same greedily", _greedy)
_COLUMNS: tuple[Column, ...] = (
    ("model", lambda r: r.label),
    ("KV", lambda r: r.kv),
    ("perplexity", lambda r: _estimate(r.perplexity, 2)),
    ("change", lambda r: "reference" if r.change is None else _estimate(r.change, percent=True, sign=True)),
    ("KL mean", _kl(lambda d: _estimate(d.mean))),
    ("KL 99 %", _kl(lambda d: _figures(d.p99))),
    ("KL max", _kl(lambda d: _figures(d.max))),
    ("same top-1", _kl(lambda d: _estimate(d.agreement, 1, percent=True))),
    _GREEDY,
    ("needles", lambda r: _rate(list(r.needles.values()))),
    ("chats", lambda r: _rate(list(r.chats.values()))),
    ("bits", lambda r: NONE if r.footprint.bits is None else f"{r.footprint.bits:.2f}"),
    ("KV bytes a token", lambda r: _memory(r.footprint.bytes / r.footprint.tokens, r)),
    ("each further token", lambda r: _memory(r.footprint.further, r)),
)


def _detail_columns(row: ComparisonRow) -> list[Column]:
    """Needles by length and depth, chats by kind; every row has the same."""
    out = list(_COLUMNS[:2])
    out += [(f"{n} @ {100 * d:g} %", _needle(n, d)) for n, d in row.needles]
    return out + [(kind.replace("_", " "), _chat(kind)) for kind in row.chats]


def _needle(length: int, depth: float) -> Callable[[ComparisonRow], str]:
    return lambda row: str(row.needles[length, depth])


def _chat(kind: str) -> Callable[[ComparisonRow], str]:
    return lambda row: str(row.chats[kind])
