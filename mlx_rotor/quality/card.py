"""The model card: README.md of a checkpoint folder, rendered from data alone, which lies beside it as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import tables
from ..cache import DEFAULT
from ..errors import RotorError
from ..experts import formats
from ..files import write_json, write_text
from ..quant.job.manifest import PROVENANCE
from ..quant.source import is_repository
from .evaluation import CheckpointRow, Evaluation
from .metrics import Estimate
from .streamed import Quality

CARD = "README.md"
TAGS = ("mlx", "quantized", "mlx_rotor")
# Of mlx_rotor.json.
NEEDED = (
    *("source", "source_files", "policy", "plan", "plan_sha256", "fit", "calibration", "relative_error"),
    *("total_size", "total_parameters", "mlx_rotor", "mlx"),
)
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Card:
    """All that a card says.

    Attributes:
        name: the checkpoint's: a folder, or the repository it goes to.
        base: the source's repository on the hub, empty where it isn't known.
        inherited: `license` and the like from the source's own card.
        made: mlx_rotor.json of the checkpoint, see `quant.job.manifest`.
        evaluation: None where nothing was measured, which the card then says.
    """

    name: str
    base: str
    inherited: Mapping[str, Any]
    made: Mapping[str, Any]
    evaluation: Evaluation | None

    def markdown(self) -> str:
        """README.md, the same for the same data."""
        parts = [self._header(), self._intro(), self._stored(), self._fitted(), self._quality()]
        return "\n\n".join([*parts, self._others(), self._run(), self._origin(), self._unmeasured()]) + "\n"

    def _header(self) -> str:
        from huggingface_hub import ModelCardData

        data = ModelCardData(
            **self.inherited,
            library_name="mlx",
            pipeline_tag="text-generation",
            base_model=self.base or None,
            base_model_relation="quantized" if self.base else None,
            tags=list(TAGS),
        )
        return f"---\n{data.to_yaml()}\n---"

    def _intro(self) -> str:
        made, policy = self.made, self.made["policy"]
        source = f"[{self.base}](https://huggingface.co/{self.base})" if self.base else f"`{made['source']}`"
        about = f" ({policy['description'].rstrip('.')})" if policy["description"] else ""
        size, count = made["total_size"], made["total_parameters"]
        table = _table(
            [
                ("size", f"{billions(size)} GB = {billions(size, 2**30)} GiB ({size:,} bytes of tensors)"),
                ("bits a weight", f"{size * 8 / count:.4f}, scales and biases included"),
                ("weights", f"{count:,}"),
            ]
        )
        return (
            f"# {self.name}\n\n{source} quantized by mlx_rotor {made['mlx_rotor']}, policy `{policy['name']}`{about}."
            f" {self._readers()} GB are 10⁹ bytes, GiB 2³⁰.\n\n{table}"
        )

    @property
    def _formats(self) -> list[str]:
        """Modes of its weights that MLX doesn't have."""
        modes = {row["spec"]["mode"] for row in self.made["plan"] if row["spec"]}
        return [mode for mode in formats.ours() if mode in modes]

    def _readers(self) -> str:
        if not self._formats:
            return "The files are MLX's own format: stock `mlx_lm` reads them."
        return (
            f"Some weights are in formats that MLX does not have ({', '.join(self._formats)}): `mlx_rotor` reads them,"
            " and so does `mlx_lm` with `--trust-remote-code`, slowly; mlx-swift-lm does not."
        )

    def _stored(self) -> str:
        rows: list[Sequence[str]] = [("role", "layers", "tensors", "bits", "group", "mode", "bytes", "share")]
        for row in self.made["plan"]:
            spec = row["spec"] or {"bits": row["dtype"].lower(), "group_size": "", "mode": ""}
            share = f"{row['bytes'] / self.made['total_size']:.1%}"
            cells = (row["role"], row["layers"], row["count"], spec["bits"], spec["group_size"], spec["mode"])
            rows.append((*map(str, cells), f"{row['bytes']:,}", share))
        return f"## What is stored how\n\n{_table(rows, numbers=(2, 3, 4, 6, 7))}"

    def _fitted(self) -> str:
        calibration = self.made["calibration"]
        how = "without calibration: weights alone decided"
        if calibration:
            facts = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in calibration.items())
            how = f"with calibration ({facts})"
        errors = {role: e for role, e in self.made["relative_error"].items() if e}
        listed = ", ".join(f"{role} {e:.2%}" for role, e in errors.items())
        note = "".join(f" ({note})" for mode in self._formats if (note := formats.kind(mode).note))
        tail = f"\n\n|w − stored| / |w| by role: {listed}{note}." if listed else ""
        return f"## How it was fitted\n\nFit `{self.made['fit']}`, {how}.{tail}"

    def _quality(self) -> str:
        head = "## Quality against the source\n\n"
        if self.evaluation is None:
            return f"{head}Not measured."
        rows: list[Sequence[str]] = [
            ("text", "tokens", "KL, nats a token", "KL, 99 %", "top-1 the same", "perplexity", "source's", "change")
        ]
        for q in self.evaluation.row.quality:
            d = q.divergence
            cells = (f"{d.p99:.3g}", percent(d.agreement), pm(q.perplexity), pm(q.source), percent(q.change))
            rows.append((f"{q.domain} ({q.text})", f"{q.tokens:,}", pm(d.mean), *cells))
        first, m = self.evaluation.row.quality[0], self.evaluation.machine
        how = "in float32, layer by layer, without a KV cache: what differs is the stored weights"
        if self.evaluation.whole:
            how = "in mlx_lm, with its own KV cache"
        return (
            f"{head}{_table(rows, numbers=range(1, 8))}\n\nKL(source ‖ this) and perplexity on the same tokens,"
            f" {first.windows} windows of {first.window} spread evenly over each text; ± is the standard error between"
            f" windows, of the change the paired one. Source and checkpoint both ran {how}. "
            f"Texts by digest: {', '.join(f'{q.domain} {q.text_digest}' for q in self.evaluation.row.quality)}. "
            f"Measured on {m['machine']} ({m['device']}), mlx {m['mlx']}, mlx-lm {m['mlx_lm']}, mlx_rotor"
            f" {m['mlx_rotor']}, Python {m['python']}, {m['date']}."
        )

    def _others(self) -> str:
        head = "## Other policies by the same tool\n\n"
        if self.evaluation is None or not self.evaluation.others:
            return f"{head}Not measured."
        names = [q.domain for q in self.evaluation.row.quality]
        columns = [f"{what}, {name}" for name in names for what in ("KL", "top-1", "perplexity")]
        rows: list[Sequence[str]] = [("policy", "fit", "calibrated", "GB", "GiB", "bits a weight", *columns)]
        for row in (self.evaluation.row, *self.evaluation.others):
            name = f"**{row.name}, this one**" if row is self.evaluation.row else row.name
            sizes = (billions(row.nbytes), billions(row.nbytes, 2**30), f"{row.bits_per_weight:.4f}")
            rows.append((name, row.fit, "yes" if row.calibrated else "no", *sizes, *_figures(row, names)))
        note = "Perplexity is the change against the source's. Same source, texts and windows in every row."
        return f"{head}{_table(rows, numbers=range(3, 6 + 3 * len(names)))}\n\n{note}"

    def _run(self) -> str:
        trust = " --trust-remote-code" if self._formats else ""
        return f"""## Run it

```bash
pip install mlx-lm mlx_rotor
mlx_lm.generate --model {self.name}{trust} --prompt "Hello"
python -m mlx_rotor.generate --model {self.name} --prompt "Hello" --kv {DEFAULT}
python -m mlx_rotor.server --model {self.name} --kv {DEFAULT}
```

`--kv` compresses the KV cache; without mlx_rotor the cache is mlx_lm's."""

    def _origin(self) -> str:
        made = self.made
        rows = [
            ("source", made["source"]),
            ("its files", digest(made["source_files"])),
            ("policy", f"{made['policy']['name']}, sha256 {made['policy']['sha256']}"),
            ("plan", f"sha256 {made['plan_sha256']}"),
            *([("bits solved for", _solved(budget))] if (budget := made.get("budget")) else []),
            ("versions", f"mlx_rotor {made['mlx_rotor']}, mlx {made['mlx']}"),
        ]
        note = (
            f"The digest of the source's files is that of `source_files` in `{PROVENANCE}` as compact JSON with sorted"
        )
        note += " keys; size and sha256 of every file here are there too, and the figures above."
        return f"## Made from\n\n{_table(rows)}\n\n{note}"

    def _unmeasured(self) -> str:
        missing = ["speed and memory, on a Mac or anywhere else", "benchmarks of tasks", "chats and tool calls"]
        if self.evaluation is not None:
            missing.append(
                f"text further than {max(q.window for q in self.evaluation.row.quality)} tokens into a context"
            )
        return "## Not measured\n\n" + "\n".join(f"- {what}" for what in missing)


def billions(nbytes: int, unit: int = 10**9) -> str:
    """In GB, or GiB for 2**30: to a thousandth, of small models to a millionth."""
    return f"{nbytes / unit:.{3 if nbytes >= 10**9 else 6}f}"


def pm(e: Estimate, scale: float = 1.0, unit: str = "") -> str:
    """`0.0612 ± 0.0031`: the error to two digits, the value as far; without an error, four digits."""
    if not e.se:
        return f"{e.value * scale:.4g}{unit}"
    places = max(0, 1 - math.floor(math.log10(e.se * scale)))
    return f"{e.value * scale:.{places}f} ± {e.se * scale:.{places}f}{unit}"


def percent(e: Estimate) -> str:
    """`84.52 ± 0.31 %`."""
    return pm(e, 100, " %")


def digest(data: Any) -> str:
    """`sha256 …` of plain data, as compact JSON with sorted keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def card_of(
    folder: str | Path,
    evaluation: Evaluation | None = None,
    *,
    name: str = "",
    base: str = "",
    source: str | Path | None = None,
) -> Card:
    """The card of a checkpoint that `mlx_rotor quantize` made.

    Args:
        evaluation: default is the one a card was written with before.
        name: what the card calls it, a repository's name where it is to be uploaded; default is the folder's.
        base: the source's repository; default is the source's name where that is one.
        source: the source's folder, for the licence its own card names.

    Raises:
        RotorError: the folder holds no mlx_rotor.json, or a damaged one.
    """
    folder = Path(folder)
    made = _made(folder)
    stored = made.pop("evaluation", None)
    if evaluation is None and stored is not None:
        evaluation = Evaluation.from_dict(stored)
    if not base and is_repository(made["source"]):
        base = made["source"]
    return Card(name or folder.resolve().name, base, inherited(source), made, evaluation)


def write(folder: str | Path, card: Card) -> None:
    """README.md, and the evaluation into mlx_rotor.json. Raises RotorError where they can't be written."""
    folder = Path(folder)
    text = card.markdown()
    try:
        if card.evaluation is not None:
            write_json(folder / PROVENANCE, {**card.made, "evaluation": card.evaluation.to_dict()})
    except OSError as e:
        raise RotorError(f"{folder / PROVENANCE}: {e.strerror}") from e
    write_text(folder / CARD, text)


def inherited(source: str | Path | None) -> dict[str, Any]:
    """Licence and languages that the card in a source's folder states; nothing where there is none."""
    path = Path(source) / CARD if source is not None else None
    if path is None or not path.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):  # no front matter, or none that is YAML
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}


def _made(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RotorError(f"{path}: a card needs what `mlx_rotor quantize` writes there ({e})") from e
    if not isinstance(made, dict) or (missing := [key for key in NEEDED if key not in made]):
        what = f"has no {', '.join(missing)}" if isinstance(made, dict) else "is no JSON object"
        raise RotorError(f"{path} {what}: quantize the model again")
    return made


def _figures(row: CheckpointRow, names: Sequence[str]) -> list[str]:
    known: dict[str, Quality] = {q.domain: q for q in row.quality}
    cells = []
    for name in names:
        q = known.get(name)
        cells += (
            [pm(q.divergence.mean), percent(q.divergence.agreement), percent(q.change)] if q else ["not measured"] * 3
        )
    return cells


def _table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Markdown. The first row is the head; a table of pairs has an empty one. `numbers`: columns aligned right."""
    head, *rest = [("", ""), *rows] if len(rows[0]) == 2 else rows
    return tables.markdown(head, rest, left=set(range(len(head))) - set(numbers), padded=False)


def _solved(budget: Mapping[str, Any]) -> str:
    by = budget["sensitivities"]
    return f"{budget['bytes']:,} bytes of weight files, by sensitivities: {by['source']}, sha256 {by['sha256']}"


def _plain(x: Any) -> str:
    if isinstance(x, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in x.items())
    if isinstance(x, list):
        return f"{len(x)}, listed in {PROVENANCE}"
    return f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)
