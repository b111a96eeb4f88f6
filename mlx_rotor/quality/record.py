"""A comparison's finished rows in a JSON file, so that an interrupted comparison goes on where it stopped.

The file is `Report.to_dict()`, written whole after every row. A row is used again where its conditions are the same; of
the package itself only the version is compared, so the file has to be deleted after changes to the code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import RotorError
from ..files import write_text
from .footprint import Footprint
from .greedy import Greedy
from .metrics import Divergence, Estimate, Tally
from .report import FORMAT, VERSION, ComparisonRow, Conditions, Report

# What may differ between rows of one file: measuring can take more than a day.
LOOSE = frozenset({"date"})
# Parts of a basis that follow from the rest and aren't known before the reference has run.
FOUND = ("spool_", "reference_weights", "greedy_repeating")


def read(path: Path) -> Report:
    """The report in a file that `write` made. Raises RotorError for anything else."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise RotorError(f"{path}: {e.strerror}") from e
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise RotorError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise RotorError(f"{path}: not written by this version of mlx_rotor evaluate; give another file")
    try:
        conditions = _plain(Conditions, data["basis"])
        rows, missing = [_row(r) for r in data["rows"]], tuple(data["missing"])
        return Report(conditions, rows, dict(data["machine"]), float(data["seconds"]), missing)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise RotorError(f"{path}: damaged ({type(e).__name__}: {e}); delete it") from e


def write(path: Path, report: Report) -> None:
    """Writes the file whole or not at all. Raises RotorError where it can't."""
    write_text(path, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def check_conditions(path: Path, found: Report, conditions: Conditions, machine: Mapping[str, str]) -> None:
    """Raises RotorError naming the first thing that the rows of `found`, read from `path`, and this run don't share."""
    here, there = _as_json(asdict(conditions)), _as_json(asdict(found.conditions))
    for name in (f.name for f in fields(Conditions) if not f.name.startswith(FOUND)):
        _same(path, name.replace("_", " "), there[name], here[name])
    for name in machine.keys() - LOOSE:
        _same(path, name, found.machine.get(name), machine[name])


def _same(path: Path, name: str, there: Any, here: Any) -> None:
    if there != here:
        raise RotorError(
            f"{path} holds rows measured with another {name} ({there!r}, now {here!r}): give another file, or delete it"
        )


def _as_json(x: Any) -> Any:
    return json.loads(json.dumps(x))


def _plain(kind: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass of plain fields; its tuples are lists in JSON."""
    names = {f.name for f in fields(kind)}
    if names - given.keys():
        raise KeyError(*sorted(names - given.keys()))
    return kind(**{n: tuple(v) if isinstance(v := given[n], list) else v for n in names})


def _estimate(x: Mapping[str, Any] | None) -> Estimate | None:
    return None if x is None else Estimate(x["value"], x["se"])


def _tally(x: Mapping[str, Any]) -> Tally:
    return Tally(x["right"], x["of"])


def _row(x: Mapping[str, Any]) -> ComparisonRow:
    divergence, greedy = x["divergence"], x["greedy"]
    plain = {k: x[k] for k in ("label", "path", "fingerprint", "weights", "kv", "is_reference", "seconds")}
    perplexity = _estimate(x["perplexity"])
    if perplexity is None:
        raise ValueError("a row without perplexity")
    return ComparisonRow(
        **plain,
        perplexity=perplexity,
        change=_estimate(x["change"]),
        divergence=None if divergence is None else Divergence.from_dict(divergence),
        greedy=None if greedy is None else _plain(Greedy, greedy),
        needles={(n["length"], n["depth"]): _tally(n) for n in x["needles"]},
        chats={kind: _tally(t) for kind, t in x["chats"].items()},
        footprint=_plain(Footprint, x["kv_memory"]),
    )
