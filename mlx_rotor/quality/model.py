"""A model under evaluation: its folder, weights and caches, and the ways that tokens are fed through it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.utils
import numpy as np

from ..bundled import MODEL
from ..errors import RotorError
from ..host import load, make_prompt_cache

Cache = list[Any]


def chunks(model: Any, cache: Cache, tokens: Sequence[int], chunk: int) -> Iterator[mx.array]:
    """Feeds `tokens` through `cache`, `chunk` at a time; yields each chunk's logits [n, vocab].

    The cache's state is evaluated with each chunk: what attention doesn't read would stay a growing lazy graph.
    """
    ids = mx.array(list(tokens))
    for i in range(0, len(tokens), chunk):
        logits = model(ids[i : i + chunk][None], cache=cache)[0]
        mx.eval(logits, [c.state for c in cache])
        yield logits


def log_probabilities(logits: mx.array) -> np.ndarray:
    """logits: [n, vocab], any float type -> natural log-probabilities, float32 NumPy [n, vocab]."""
    x = logits.astype(mx.float32)
    return np.array(x - mx.logsumexp(x, axis=-1, keepdims=True))


def prefill(model: Any, cache: Cache, tokens: Sequence[int], chunk: int) -> int:
    """Feeds a prompt; returns the token that greedy decoding gives next."""
    last: mx.array | None = None
    for logits in chunks(model, cache, tokens, chunk):
        last = logits[-1]
    if last is None:
        raise ValueError("an empty prompt")
    return _best(last)


def step(model: Any, cache: Cache, token: int) -> int:
    """Feeds one token; returns the next one, greedily."""
    return _best(model(mx.array([[token]]), cache=cache)[0, -1])


def prefill_rows(model: Any, cache: Cache, prompts: np.ndarray, chunk: int) -> np.ndarray:
    """Feeds prompts int [rows, n], all of one length, as one batch; returns each row's next token, greedily: [rows]."""
    ids, logits = mx.array(prompts), None
    for i in range(0, ids.shape[1], chunk):
        logits = model(ids[:, i : i + chunk], cache=cache)
        mx.eval(logits, [c.state for c in cache])
    if logits is None:
        raise ValueError("empty prompts")
    return np.array(mx.argmax(logits[:, -1], axis=-1))


def step_rows(model: Any, cache: Cache, tokens: np.ndarray) -> np.ndarray:
    """Feeds one token a row, [rows]; returns the next ones, greedily."""
    return np.array(mx.argmax(model(mx.array(tokens)[:, None], cache=cache)[:, -1], axis=-1))


def _best(logits: mx.array) -> int:
    return int(np.array(mx.argmax(logits)))


BUNDLED = "bundled"


@dataclass(frozen=True)
class NamedModel:
    """`label` names it in tables; `path` is a folder or a Hugging Face repository."""

    label: str
    path: str

    @property
    def where(self) -> str:
        """The path in reports and files, which is the same on every machine for the bundled model."""
        return BUNDLED if self.path == str(MODEL) else self.path

    @classmethod
    def parse(cls, text: str | None) -> NamedModel:
        """`PATH`, `NAME=PATH`, or `bundled` (also None) as the path.

        Raises:
            RotorError: the path can only be a local folder and holds no model.
        """
        text = BUNDLED if text is None else text
        label, given, path = text.rpartition("=")
        if not given or Path(text).exists() or "/" in label:
            label, path = "", text
        local = Path(path).expanduser()
        if path == BUNDLED and not local.exists():
            return cls(label or BUNDLED, str(MODEL))
        if local.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            if not (local / "config.json").is_file():
                raise RotorError(f"{path}: no config.json there; a model is a folder, a repository or {BUNDLED!r}")
            return cls(label or local.resolve().name, str(local.resolve()))
        return cls(label or path, path)


def fingerprint(target: NamedModel, kv: str) -> str:
    """A digest that changes with a configuration's files: a model folder's names, sizes and times, a scheme's text.

    A model that is no folder on this machine counts by its name.
    """
    folder, digest = Path(target.path), hashlib.sha256(target.where.encode())
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in (".safetensors", ".json", ".jinja"):
            stat = file.stat()
            digest.update(f"\n{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    if (scheme := Path(kv)).is_file():
        digest.update(b"\n" + scheme.read_bytes())
    return digest.hexdigest()[:16]


def dtype_of(model: Any) -> str:
    """The name of the dtype that most of a model's parameters have."""
    sizes: dict[mx.Dtype, int] = {}
    parameters: Any = mlx.utils.tree_flatten(model.parameters())
    for _, p in parameters:
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.size
    return str(max(sizes, key=lambda d: sizes[d])).removeprefix("mlx.core.")


class EvaluatedModel:
    """A loaded model. Raises RotorError where it can't be loaded."""

    def __init__(self, target: NamedModel) -> None:
        self.target = target
        self.model, self.tokenizer = load(target.path)

    def new_cache(self, kv: str, **protection: int) -> list[Any]:
        """An empty KV cache under scheme `kv`. Raises RotorError for an unknown scheme."""
        return make_prompt_cache(self.model, kv=kv, **protection)

    @property
    def context(self) -> int | None:
        return getattr(getattr(self.model, "args", None), "max_position_embeddings", None)

    @cached_property
    def weights(self) -> str:
        """In words: `float32`, or `quantized to 2, 3, 8 bits`."""
        parameters: Any = mlx.utils.tree_flatten(self.model.parameters())
        if any(name.endswith("scales") for name, _ in parameters):
            bits = sorted({m.bits for m in self.model.modules() if isinstance(getattr(m, "bits", None), int)})
            return f"quantized to {', '.join(map(str, bits))} bits"
        return dtype_of(self.model)
