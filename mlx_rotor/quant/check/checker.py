"""Checks whether MLX readers can read a checkpoint, ours or not, from its files, config.json and tensor headers.

No weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...errors import RotorError
from ...experts import standalone
from ...host.skeleton import StockReader
from ..safetensors_io import TensorInfo, read_header
from ..source import INDEX
from . import formats
from .section import ERROR, EVERY, OLDER, OTHER, PYTHON, SWIFT, Finding, Findings
from .tensors import tensors

TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("tiktoken.model",))
TEMPLATES = ("chat_template.jinja", "chat_template.json")
AGAIN = "download it again"


def config_of(folder: Path, found: Findings) -> dict[str, Any] | None:
    """config.json, or None with a finding."""
    if not (folder / "config.json").is_file():
        found.error("no-config", EVERY, "config.json is missing", [], "copy it from where the weights come from")
        return None
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        found.error("bad-json", EVERY, "not a JSON object", ["config.json"], AGAIN)
        return None
    if not isinstance(config.get("model_type"), str):
        found.error("no-model-type", EVERY, "config.json names no model_type", ["config.json"], "add it")
        return None
    return config


def weights(folder: Path, found: Findings) -> tuple[dict[str, TensorInfo], bool]:
    """Tensors of the files that mlx_lm reads, and whether all of those files are whole."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        found.error("no-weights", EVERY, "no model*.safetensors", [], "mlx_lm reads weights from files of that name")
    for path in sorted(folder.rglob("*.safetensors")):
        if path not in files:
            what = "mlx-swift-lm reads every *.safetensors below the folder, this one too; mlx_lm does not"
            name = path.relative_to(folder).as_posix()
            found.error("sidecar", (SWIFT,), what, [name], "give what is no weight of the model another extension")
    tensors: dict[str, TensorInfo] = {}
    whole = True
    for path in files:
        try:
            header = read_header(path)
        except RotorError as e:
            found.error("damaged-file", EVERY, str(e).removeprefix(f"{path}: "), [path.name], "no reader takes it")
            whole = False
            continue
        if twice := [name for name in header if name in tensors]:
            what = "in more than one file: which one counts depends on the order of reading"
            found.warning("duplicate-tensor", EVERY, what, twice, "delete the stale files")
        tensors |= header
    return tensors, whole


def index(folder: Path, tensors: Mapping[str, TensorInfo], found: Findings) -> None:
    """model.safetensors.index.json against the files."""
    path, files = folder / INDEX, {info.path.name for info in tensors.values()}
    if not path.is_file():
        if len(files) > 1:
            what = f"{INDEX} is missing: without it other tools don't find the weights"
            found.warning("no-index", (OTHER,), what, [], "write one")
        return
    table = _json(path)
    stated = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(stated, dict) or not all(isinstance(v, str) for v in stated.values()):
        found.warning("bad-index", (OTHER,), "not a safetensors index", [INDEX], "write it anew")
        return
    if absent := sorted({name for name in stated.values() if not (folder / name).is_file()}):
        found.error("missing-shard", EVERY, f"{INDEX} names files that are not there", absent, AGAIN)
        return
    fix = "write the index anew"
    if lost := [name for name, file in stated.items() if fnmatchcase(file, "model*") and name not in tensors]:
        found.warning("index-missing-tensor", (OTHER,), f"{INDEX} names tensors that no file holds", lost, fix)
    if unnamed := [name for name in tensors if name not in stated]:
        found.warning("index-unnamed-tensor", (OTHER,), f"not in {INDEX}", unnamed, fix)
    if wrong := [n for n, info in tensors.items() if n in stated and stated[n] != info.path.name]:
        found.warning("index-wrong-shard", (OTHER,), f"in another file than {INDEX} says", wrong, fix)
    metadata = table.get("metadata")
    size, real = (
        metadata.get("total_size") if isinstance(metadata, dict) else None,
        sum(info.nbytes for info in tensors.values()),
    )
    if size is not None and size != real:
        what = f"{INDEX} says total_size {size}, the tensors have {real} bytes"
        found.warning("index-total-size", (OTHER,), what, [INDEX], fix)


def companions(folder: Path, found: Findings) -> None:
    """Tokenizer, chat template, generation defaults."""
    have = {path.name for path in folder.iterdir() if path.is_file()}
    fix = "copy it from the source model"
    if not any(have.issuperset(names) for names in TOKENIZERS) and not any(n.endswith(".tiktoken") for n in have):
        found.error("no-tokenizer", EVERY, "no tokenizer (tokenizer.json or another form) is there", [], fix)
    elif "tokenizer.json" not in have:
        found.error("no-tokenizer-json", (SWIFT,), "mlx-swift-lm needs tokenizer.json", [], fix)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if name in have and not isinstance(_json(folder / name), dict):
            breaks = (OTHER,) if name.startswith("generation") else EVERY
            (found.warning if breaks == (OTHER,) else found.error)("bad-json", breaks, "not a JSON object", [name], fix)
    if "tokenizer_config.json" not in have:
        what = "tokenizer_config.json is missing"
        found.error("no-tokenizer-config", (SWIFT,), what, [], fix)
        return
    settings = _json(folder / "tokenizer_config.json")
    if not have.intersection(TEMPLATES) and not (isinstance(settings, dict) and settings.get("chat_template")):
        found.warning(
            "no-chat-template", (PYTHON, OLDER, SWIFT), "no chat template: chats go in as plain text", [], fix
        )
    if "generation_config.json" not in have:
        what = "generation_config.json is missing: ends of a reply and sampling defaults are those of config.json"
        found.warning("no-generation-config", (PYTHON, OLDER, SWIFT), what, [], fix)


def _json(path: Path) -> Any:
    """The parsed file, None where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check(folder: str | Path) -> list[Finding]:
    """Everything wrong with a checkpoint folder, errors first; empty where every reader reads it as it is meant.

    Readers: stock mlx_lm, older mlx_lm (which takes what has no override for the default), mlx-swift-lm (likewise,
    and stricter about config.json and about files).

    Raises:
        RotorError: `folder` is no folder.
    """
    folder, found = Path(folder), Findings()
    if not folder.is_dir():
        raise RotorError(f"{folder}: no such folder; --check takes the folder of a checkpoint")
    config = config_of(folder, found)
    headers, whole = weights(folder, found)
    index(folder, headers, found)
    companions(folder, found)
    if config is None or not headers or not whole:
        return found.listed()
    formatted = bool(standalone.modes(config))
    if formatted:
        formats.model_file(folder, config, found)
    if config.get("model_file") and not formatted:
        what = (
            "runs its own model code, which mlx_lm does not unless it is told to; tensors were not checked against it"
        )
        where, fix = [str(config["model_file"])], "load it with trust_remote_code"
        found.error("custom-code", EVERY, what, where, fix)
        return found.listed()
    try:
        reader = StockReader(config)
    except RotorError as e:
        found.error("unknown-model", EVERY, str(e), ["config.json"], "use an mlx_lm that has this architecture")
        return found.listed()
    tensors(config, headers, reader, found)
    return found.listed()


def text(folder: str | Path, findings: Sequence[Finding]) -> str:
    """For people: a line a finding, and a line that counts them."""
    errors = sum(f.severity == ERROR for f in findings)
    if not findings:
        return f"{folder}: nothing wrong"
    return "\n".join([*map(str, findings), f"{folder}: {errors} errors, {len(findings) - errors} warnings"])


def facts(folder: str | Path, findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: a JSON object."""
    errors = sum(f.severity == ERROR for f in findings)
    return {
        "folder": str(folder),
        "errors": errors,
        "warnings": len(findings) - errors,
        "findings": [f.to_dict() for f in findings],
    }


def status(findings: Sequence[Finding]) -> int:
    """Exit status of a command: 1 where there is an error."""
    return int(any(f.severity == ERROR for f in findings))
