"""Runs the source model on some text, layer by layer ahead of the job, and sums up the inputs of every weight.

The source's own outputs go from layer to layer, never a quantized layer's, so that statistics depend on the text
alone. Hidden states lie on disk: a job that was killed goes on at its layer, with the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...cache import scheme_file
from ...errors import RotorError
from ...files import write_json
from ...host import kv_scales
from ...host.layerwise import Layer, Layerwise
from ...host.streamed import PROJECTIONS
from ...host.watch import KvLargest, compressed_layers
from ..guide import EntryParameters, Statistics, Weights
from ..plan import Entry, Plan
from ..policy import FIXED
from ..selectors import ROLES
from .kept import HiddenFiles
from .moments import Coverage, LayerStatistics, Mixture, Moments

VERSION = 1
STATE = "calibration.json"
# Tokens run at once. Fewer read a layer's experts more often, more hold larger intermediate results.
CHUNK = 8192

Progress = Callable[[str, int, int], None]  # what runs, chunks done, chunks in all


class Calibration:
    """A guide (see `quant.guide`) whose statistics come from running the source on `tokens`.

    Attributes:
        coverage: module of a mixture of experts -> the rows its experts saw, of the layers run so far.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        plan: Plan,
        tokens: np.ndarray,
        folder: str | Path,
        *,
        products: bool = True,
        kv: str = "",
        chunk: int = CHUNK,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            weights: the source's, not folded.
            tokens: int [sequences, length], see `text.sequences`.
            folder: for hidden states, made if it isn't there; what another calibration left in it is deleted.
            products: whether Hessians will be asked for, of entries whose fit makes use of them.
            kv: a codec of the KV cache with a scale a layer, whose file `files` then has; empty: none.
            chunk: tokens run at once, rounded to whole sequences, one at least.

        Raises:
            RotorError: an architecture whose layers can't be run one by one, or tokens outside the vocabulary.
        """
        self._weights, self._plan, self._products = weights, plan, products
        self._tokens = np.ascontiguousarray(tokens, np.int32)
        self._folder, self._progress = Path(folder), progress
        self._step = max(1, chunk // self._tokens.shape[1])
        self._walk = Layerwise(config, EntryParameters(plan, weights), self._tokens.shape[1])
        if self._walk.layers != plan.layers:
            raise RotorError(f"mlx_lm's model has {self._walk.layers} layers to run, the plan {plan.layers}")
        vocabulary = [entry.shape[0] for entry in plan.entries if entry.role == "embed"]
        if vocabulary and int(self._tokens.max()) >= max(vocabulary):
            raise RotorError(
                f"the calibration text has token {self._tokens.max()}, the model {max(vocabulary)} embeddings: is the"
                " tokenizer another model's?"
            )
        self._kv = KvLargest(compressed_layers(self._walk.model, kv)) if kv else None
        self._hidden_files = HiddenFiles(self._folder)
        self.coverage: dict[str, Coverage] = {}
        self._restore()

    @cached_property
    def digest(self) -> str:
        """sha256 of the tokens and all else the statistics depend on beside the model."""
        head = [VERSION, list(self._tokens.shape), self._step, self._products]
        head += [] if self._kv is None else ["kv"]
        return hashlib.sha256(json.dumps(head).encode() + self._tokens.astype("<i4").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the output's metadata: how much text, its digest, and what experts saw of it, over all layers."""
        count, length = self._tokens.shape
        found: dict[str, Any] = {"sequences": count, "length": length, "digest": self.digest}
        if self.coverage:
            every = list(self.coverage.values())
            found["expert_rows"] = {
                "least": min(c.least for c in every),
                "median": float(np.median([c.median for c in every])),
                "unseen": sum(c.unseen for c in every),
                "experts": sum(c.experts for c in every),
            }
        return found

    def files(self) -> dict[str, str]:
        """See `quant.guide.Guide`: the KV cache's scales, where they were asked for. RotorError if a layer with a
        cache was not run."""
        if self._kv is None:
            return {}
        count, length = self._tokens.shape
        made = {"text": "calibration", "windows": count, "window": length, "digest": self.digest}
        return {kv_scales.FILE: scheme_file.text(scheme_file.scheme(self._kv.pairs(), made))}

    def layer(self, number: int | None, entries: Sequence[Entry]) -> tuple[Weights, Statistics | None]:
        """See `quant.guide.Guide`. Runs the layer, and those before it that have not been run yet.

        Raises:
            RotorError: the source can't be read, or its activations are not finite.
            OSError: the folder can't be written.
        """
        self._hidden_files.drop_experts()
        if number is None and not any(entry.role == "head" for entry in entries):
            return self._weights, None
        last = self._plan.layers if number is None else number
        self._reach(last)
        self._hidden_files.drop(last)
        if number is None:
            return self._weights, self._head(entries)
        return self._weights, self._gathered(number)

    def hidden(self, number: int) -> np.ndarray:
        """float32 [sequences, length, ..]: what layer `number` takes, if it is that of the last call to `layer` or
        the one after it."""
        return self._hidden_files.read(number)

    @property
    def walk(self) -> Layerwise:
        return self._walk

    @property
    def disk(self) -> int:
        """Bytes that work files may still take: two generations of hidden states and what the experts take."""
        hidden = max((entry.shape[-1] for entry in self._plan.entries if entry.role == "embed"), default=0)
        there = sum(path.stat().st_size for path in self._folder.glob("*"))
        return max(0, 3 * 4 * hidden * self._tokens.size - there)

    # ---------------------------------------------------------------- running
    def _reach(self, number: int) -> None:
        """Makes the input of layer `number`, from the nearest there is before it."""
        at = self._hidden_files.newest(number)
        if at is None:
            with self._walk.start() as run:
                self._hidden_files.write(0, len(self._tokens), self._run("embeddings", run, lambda: self._tokens))
            at = 0
        for layer in range(at, number):
            with self._walk.layer(layer, see=None if self._kv is None else self._kv.of(layer)) as run:
                self._pass(layer, run)
            self._hidden_files.drop(layer)

    def _pass(self, number: int, run: Layer) -> None:
        """A layer over all sequences. Its output may be there already, when a job went on or asks again: it is what
        would be written."""
        out = self._run(f"layer {number}", run, lambda: self._hidden_files.read(number))
        if self._hidden_files.path(number + 1).exists():
            for _ in out:
                pass
        else:
            self._hidden_files.write(number + 1, len(self._tokens), out)

    def _run(
        self, what: str, run: Callable[[mx.array], mx.array], inputs: Callable[[], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """`inputs` is asked for each chunk: a file that stays mapped counts as memory once it was read."""
        chunks = range(0, len(self._tokens), self._step)
        for done, start in enumerate(chunks, 1):
            out = run(mx.array(inputs()[start : start + self._step])).astype(mx.float32)
            if not mx.all(mx.isfinite(out)).item():
                raise RotorError(f"calibration: {what} of the source gives values that are not finite")
            yield np.array(out)
            mx.clear_cache()
            if self._progress is not None:
                self._progress(what, done, len(chunks))

    def _gathered(self, number: int) -> LayerStatistics:
        linear: dict[str, Moments] = {}
        products = self._wanted(number)
        watch = _Watch(linear, products, self._stacked(number))
        mixtures: dict[str, Mixture] = {}
        see = None if self._kv is None else self._kv.of(number)
        with self._walk.layer(number, watch, self._watchable(number), see) as run:
            for nth, (path, experts) in enumerate(run.experts.items()):
                together = any(f"{path}.{name}" in products for name in PROJECTIONS[:2])
                mixtures[path] = Mixture(self._hidden_files.experts(number, nth), together)
                experts.watch = mixtures[path].add
            self._pass(number, run)
            for path, experts in run.experts.items():
                experts.watch = None
                mixtures[path].finish(experts)
                self.coverage[path] = mixtures[path].coverage
        if mixtures or self._kv is not None:
            self._remember()
        return LayerStatistics(linear, mixtures, products)

    def _head(self, entries: Sequence[Entry]) -> LayerStatistics:
        linear: dict[str, Moments] = {}
        products = self._wanted(None)
        watch = _Watch(linear, products, frozenset())
        names = tuple(e.module for e in entries if e.role == "head" and self._walk.linear(e.module))
        with self._walk.end(watch, names) as run:
            for start in range(0, len(self._tokens), self._step):
                inputs = self._hidden_files.read(self._plan.layers)[start : start + self._step]
                run(mx.array(inputs))  # the logits are never computed
                mx.clear_cache()
        return LayerStatistics(linear, {}, products)

    def _wanted(self, number: int | None) -> frozenset[str]:
        """Modules whose fit makes use of a Hessian."""
        return frozenset(
            e.module
            for e in self._plan.entries
            if self._products and e.layer == number and e.spec and e.spec.mode not in FIXED and e.fit != "fast"
        )

    def _watchable(self, number: int) -> tuple[str, ...]:
        return tuple(
            entry.module
            for entry in self._plan.entries
            if entry.layer == number
            and ROLES[entry.role].quantizable
            and len(entry.source_shape) == 2
            and self._walk.linear(entry.module)
        )

    def _stacked(self, number: int) -> frozenset[str]:
        return frozenset(e.module for e in self._plan.entries if e.layer == number and len(e.shape) == 3)

    # ---------------------------------------------------------------- going on after an end
    def _restore(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {}
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
        if state.get("digest") != self.digest:
            state = {}
            self._hidden_files.clear()
            self._remember()
        self.coverage = {path: Coverage(**found) for path, found in state.get("coverage", {}).items()}
        if self._kv is not None:
            self._kv.restore(state.get("kv", {}))

    def _remember(self) -> None:
        state: dict[str, Any] = {"digest": self.digest}
        state["coverage"] = {path: asdict(c) for path, c in self.coverage.items()}
        if self._kv is not None:
            state["kv"] = self._kv.state()
        write_json(self._folder / STATE, state)


class _Watch:
    """Sums up inputs by module; modules that get the same array in one pass share their sums. `products`: modules that
    want those, `stacked`: those with one input a matrix."""

    def __init__(self, linear: dict[str, Moments], products: frozenset[str], stacked: frozenset[str]) -> None:
        self._linear, self._products, self._stacked = linear, products, stacked
        self._last: tuple[mx.array, Moments] | None = None

    def __call__(self, path: str, x: mx.array) -> None:
        wanted = path in self._products
        if self._last is not None and self._last[0] is x and (self._last[1].wanted or not wanted):
            self._linear[path] = self._last[1]
            return
        if path not in self._linear:
            self._linear[path] = Moments(wanted, path in self._stacked)
        self._linear[path].add(x)
        self._last = (x, self._linear[path])
