"""A checkpoint's measured quality, and that of other policies made and measured the same way, as data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RotorError
from ..quant import job
from ..quant.plan import Plan, decimal
from ..quant.source import open_folder
from .machine import machine
from .metrics import Divergence, Estimate
from .streamed import Quality, SourceReference

ROOM = 1.02  # of a temporary checkpoint beside its tensors: headers, tokenizer, the job's own files


@dataclass(frozen=True)
class CheckpointRow:
    """A measured checkpoint: its policy's name, its tensors' bytes, the model's number of parameters, its quality."""

    name: str
    nbytes: int
    parameters: int
    fit: str
    calibrated: bool
    quality: tuple[Quality, ...]

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.parameters


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's row and the rows of others that it is compared with, on one machine.

    `whole`: the models ran whole in mlx_lm, instead of layer by layer in float32.
    """

    source: str
    whole: bool
    row: CheckpointRow
    others: tuple[CheckpointRow, ...]
    machine: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return asdict(self) | {"machine": dict(self.machine)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` made `data` of. Raises RotorError for anything else."""
        try:
            others = tuple(row_from_dict(r) for r in data["others"])
            return cls(data["source"], bool(data["whole"]), row_from_dict(data["row"]), others, dict(data["machine"]))
        except (KeyError, TypeError, ValueError) as e:
            raise RotorError(f"the evaluation is damaged ({type(e).__name__}: {e}); measure it again") from e


def evaluate_checkpoint(
    reference: SourceReference,
    folder: str | Path,
    plan: Plan,
    *,
    fit: str,
    calibrated: bool,
    others: Sequence[CheckpointRow] = (),
) -> Evaluation:
    """Measures a finished checkpoint against its source. `others`: rows measured before (see `compare_policies`)."""
    row = CheckpointRow(plan.policy.name, plan.nbytes, plan.parameters, fit, calibrated, reference.compare(folder))
    return Evaluation(reference.folder.resolve().name, reference.whole, row, tuple(others), machine())


def compare_policies(
    reference: SourceReference,
    plans: Sequence[Plan],
    *,
    fit: str = "search",
    guide: job.GuideFactory | None = None,
    folder: str | Path | None = None,
    progress: Callable[[str], Any] | None = None,
) -> list[CheckpointRow]:
    """Rows for other plans: each is quantized from the same source into a temporary folder, measured, and deleted.

    Args:
        fit, guide: as of `job.execute`; the same as the checkpoint's make the rows comparable.
        folder: where the temporary folders are made; default is the system's.
        progress: called with what is being done.

    Raises:
        RotorError: too little disk for the largest of them, before anything is made; and as `job.execute`.
    """
    place = Path(folder or tempfile.gettempdir())
    need, free = round(ROOM * max((p.nbytes for p in plans), default=0)), shutil.disk_usage(place).free
    if need > free:
        largest = max(plans, key=lambda p: p.nbytes).policy.name
        raise RotorError(
            f"{place}: comparing with {largest} needs {decimal(need)} for a while, {decimal(free)} are free; compare"
            " with fewer policies, or set TMPDIR to a bigger disk"
        )
    rows = []
    for plan in plans:
        name = plan.policy.name
        with tempfile.TemporaryDirectory(prefix="mlx_rotor-", dir=place) as temporary:
            out = Path(temporary) / name
            if progress is not None:
                progress(f"{name}: quantizing")
            job.execute(open_folder(reference.folder), out, plan, fit=fit, guide=guide)
            if progress is not None:
                progress(f"{name}: measuring")
            rows.append(
                CheckpointRow(name, plan.nbytes, plan.parameters, fit, guide is not None, reference.compare(out))
            )
    return rows


def row_from_dict(x: Mapping[str, Any]) -> CheckpointRow:
    return CheckpointRow(**{**x, "quality": tuple(_quality(q) for q in x["quality"])})


def _quality(x: Mapping[str, Any]) -> Quality:
    estimates = {name: Estimate(**x[name]) for name in ("source", "perplexity", "change")}
    return Quality(**{**x, **estimates, "divergence": Divergence.from_dict(x["divergence"])})
