"""Runs any architecture of mlx_lm one layer at a time, in float32, with that layer's dense weights alone in memory.

The model's own code runs: its layers are exchanged for stand-ins that record how each is called, and each real layer
is then called the same way. Nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU

from ..errors import RotorError
from . import streamed
from .skeleton import parameters, skeleton
from .streamed import PROJECTIONS, StreamedExperts
from .watch import See, attended

Run = Callable[[mx.array], mx.array]
# Called with the path of a linear layer and its input [.., K].
Watch = Callable[[str, mx.array], None]


class Parameters(Protocol):
    """The model's parameters by their path in the module tree, float32."""

    def names(self) -> Collection[str]:
        """The parameters that are there."""

    def whole(self, name: str) -> mx.array:
        """A parameter in the shape that the model has it."""

    def part(self, name: str, expert: int) -> mx.array:
        """One expert's matrix of a stack."""


class _StandIn:
    """A stand-in for a layer, which records the call and passes the hidden states on.

    Every other attribute is the layer's, its class included: models ask for it to know what to call a layer with.
    """

    def __init__(self, layer: Any, given: mx.array | None = None) -> None:
        self._layer, self._given = layer, given
        self.hidden: mx.array | None = None
        self.others: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, hidden: mx.array, *args: Any, **named: Any) -> mx.array:
        self.hidden, self.others = hidden, (args, named)
        return hidden if self._given is None else self._given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._layer)


class _Watched(nn.Module):
    """A linear layer whose inputs are shown to `watch`."""

    def __init__(self, inner: nn.Module, path: str, watch: Watch) -> None:
        super().__init__()
        self["_inner"] = inner  # first: what else is set is looked up in it
        self._path, self._watch = path, watch

    def __call__(self, x: mx.array, *args: Any, **named: Any) -> mx.array:
        # A MultiLinear that is used transposed meets its input dimension on the other side.
        if not args and not named:
            self._watch(self._path, x)
        out: mx.array = self._inner(x, *args, **named)
        return out

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else getattr(self["_inner"], name)


class Layer:
    """One layer with its weights in place; called with hidden states [B, L, ..] it gives the next ones.

    Attributes:
        experts: path of each mixture of experts in the layer -> what stands for it.
    """

    def __init__(self, run: Run, experts: Mapping[str, StreamedExperts]) -> None:
        self._run, self.experts = run, dict(experts)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._run(hidden)


class Layerwise:
    """`layers`: how many there are. All sequences have `length` tokens."""

    def __init__(self, config: Mapping[str, Any], source: Parameters, length: int) -> None:
        """
        Raises:
            RotorError: as `skeleton`, or an architecture whose layers pass more than hidden states to one another.
        """
        self._source, self._type = source, config.get("model_type")
        self.model = skeleton(config)
        self.model.eval()
        self._drop_what_is_not_there()
        self._layers = self._found_layers()
        self.layers = len(self._layers)
        self._shapes = parameters(self.model)
        under = [path for path, module in self.model.named_modules() if any(module is x for x in self._layers)]
        self._paths = sorted(under, key=lambda path: int(path.rsplit(".", 1)[1]))
        if len(self._paths) != self.layers:
            raise self._refusal("they are not one list in the module tree")
        self._calls = self._recorded(length)

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens: int [B, L] -> the first layer's hidden states, evaluated."""
        with self.start() as run:
            return run(tokens)

    @contextmanager
    def start(self) -> Iterator[Run]:
        """A context with the model's start in place; yields tokens [B, L] -> the first layer's hidden states."""
        with self._in_place(n for n in self._outside() if n not in self._heads()):

            def run(tokens: mx.array) -> mx.array:
                hidden = self._through(tokens)[0].hidden
                assert hidden is not None
                hidden = hidden.astype(mx.float32)
                mx.eval(hidden)
                return hidden

            yield run

    @contextmanager
    def layer(
        self, number: int, watch: Watch | None = None, watched: tuple[str, ...] = (), see: See | None = None
    ) -> Iterator[Layer]:
        """A layer with its weights in place, while the context lasts. `watched`: paths of modules whose inputs
        `watch` gets. `see` gets what its attention takes for keys and values.

        Raises:
            RotorError: the layer returns more than hidden states.
        """
        path, layer = self._paths[number], self._layers[number]
        mixtures = {f"{path}.{inner}": m for inner, m in layer.named_modules() if isinstance(m, SwitchGLU)}
        stacks = {f"{mixture}.{projection}.weight" for mixture in mixtures for projection in PROJECTIONS}
        args, named = self._calls[number]

        def run(hidden: mx.array) -> mx.array:
            out = layer(hidden, *args, **named)
            if not isinstance(out, mx.array):
                raise self._refusal("they return more than hidden states")
            mx.eval(out)
            return out

        needed = (n for n in self._shapes if n.startswith(f"{path}.") and n not in stacks)
        with self._in_place(needed), self._exchanged(streamed.linears(path, layer)), streamed.attention():
            experts = {m: StreamedExperts(module, self._reader(m)) for m, module in mixtures.items()}
            taps = self._taps(watch, watched)
            with self._exchanged({**taps, **experts}), attended(see) if see else nullcontext():
                yield Layer(run, experts)

    @contextmanager
    def end(self, watch: Watch | None = None, watched: tuple[str, ...] = ()) -> Iterator[Run]:
        """A context with the model's end in place; yields the last hidden states [B, L, ..] -> logits [B, L, vocab].

        Logits are not evaluated. `watched`: as for a layer.
        """
        embeddings, heads = self._embeddings(), self._heads()
        tied = not heads

        def run(hidden: mx.array) -> mx.array:
            stand_ins = [_StandIn(layer, hidden if i == 0 else None) for i, layer in enumerate(self._layers)]
            with self._standing_in(stand_ins):
                logits: mx.array = self.model(mx.zeros(hidden.shape[:2], mx.int32))
            return logits

        needed = (n for n in self._outside() if tied or n not in embeddings)
        with self._in_place(needed), self._exchanged(self._taps(watch, watched)):
            yield run

    def linear(self, name: str) -> bool:
        """Whether a path in the module tree is a linear layer, whose inputs can be watched."""
        return isinstance(self._at(name), nn.Linear | MultiLinear)

    # ---------------------------------------------------------------- finding out
    def _found_layers(self) -> list[Any]:
        """The list itself that the model's code goes through; `model.layers` may be a copy."""
        layers = getattr(self.model, "layers", None)
        for _, module in self.model.named_modules():
            for value in module.values():
                if layers and isinstance(value, list) and value and value[0] is layers[0]:
                    return value
        raise self._refusal("it has no list of them")

    def _drop_what_is_not_there(self) -> None:
        """Some models tie their head to the embeddings when they are given weights without one."""
        there = self._source.names()
        lazy: Any = tree_flatten(self.model.parameters())
        if hasattr(self.model, "sanitize") and any(name not in there for name, _ in lazy):
            self.model.sanitize({name: array for name, array in lazy if name in there})

    def _recorded(self, length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments that each layer is called with beside hidden states."""
        runs = [self._through(mx.full((1, length), token, dtype=mx.int32)) for token in (0, 1)]
        calls = []
        for first, second in zip(*runs, strict=True):
            assert first.others is not None and second.others is not None
            values = [[*others[0], *others[1].values()] for others in (first.others, second.others)]
            for a, b in zip(*values, strict=True):
                self._check(a, b, length)
            calls.append(first.others)
        return calls

    def _check(self, a: Any, b: Any, length: int) -> None:
        """Refuses an argument that may depend on the tokens: recorded for some, it would be wrong for others."""
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            for inner in zip(a, b, strict=True):
                self._check(*inner, length)
        elif a is None or isinstance(a, str | int | float):
            if type(a) is not type(b) or a != b:
                raise self._refusal("how they are called depends on the text")
        # One number a position, or a mask.
        elif not isinstance(a, mx.array) or a.size not in (length, length * length) or not mx.array_equal(a, b):
            raise self._refusal(f"they take another {type(a).__name__} beside hidden states and mask")

    def _through(self, tokens: mx.array) -> list[_StandIn]:
        """The model on `tokens` with every layer handing its hidden states on, lazily."""
        stand_ins = [_StandIn(layer) for layer in self._layers]
        try:
            with self._standing_in(stand_ins):
                self.model(tokens)
        except RotorError:
            raise
        except Exception as e:  # each architecture's code fails in its own way on layers that only hand on
            raise self._refusal(str(e)) from e
        if any(s.hidden is None for s in stand_ins):
            raise self._refusal("some are never called")
        return stand_ins

    def _refusal(self, why: str) -> RotorError:
        return RotorError(f"{self._type}: its layers can't be run one by one ({why}); quantize without calibration")

    def _outside(self) -> list[str]:
        """Parameters that belong to no layer."""
        return [n for n in self._shapes if not any(n.startswith(f"{path}.") for path in self._paths)]

    def _embeddings(self) -> set[str]:
        outside = [(p, m) for p, m in self.model.named_modules() if isinstance(m, nn.Embedding)]
        return {f"{path}.weight" for path, _ in outside} & set(self._outside())

    def _heads(self) -> set[str]:
        """Parameters outside the layers with an embedding's shape: needed for logits only."""
        embeddings = self._embeddings()
        shapes = {self._shapes[name] for name in embeddings}
        return {n for n in self._outside() if n not in embeddings and self._shapes[n] in shapes}

    # ---------------------------------------------------------------- putting things in place and taking them out
    def _at(self, path: str) -> Any:
        found = self.model
        for key in path.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found

    def _put(self, path: str, value: Any) -> None:
        owner, key = path.rsplit(".", 1) if "." in path else ("", path)
        holder = self._at(owner) if owner else self.model
        if isinstance(holder, list):
            holder[int(key)] = value
        else:
            holder[key] = value

    def _taps(self, watch: Watch | None, watched: tuple[str, ...]) -> dict[str, nn.Module]:
        return {} if watch is None else {name: _Watched(self._at(name), name, watch) for name in watched}

    def _reader(self, path: str) -> Callable[[str, int], mx.array]:
        return lambda projection, expert: self._source.part(f"{path}.{projection}.weight", expert)

    @contextmanager
    def _in_place(self, names: Iterator[str]) -> Iterator[None]:
        lazy: dict[str, mx.array] = {}
        try:
            for name in names:
                value = self._source.whole(name)
                if value.shape != self._shapes[name]:
                    raise RotorError(
                        f"{name} has shape {list(value.shape)}, mlx_lm's model takes {list(self._shapes[name])}"
                    )
                lazy[name] = self._at(name)
                self._put(name, value)
            yield
        finally:
            for name, value in lazy.items():
                self._put(name, value)

    @contextmanager
    def _exchanged(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        stock = {path: self._at(path) for path in modules}
        for path, module in modules.items():
            self._put(path, module)
        try:
            yield
        finally:
            for path, module in stock.items():
                self._put(path, module)

    @contextmanager
    def _standing_in(self, stand_ins: list[_StandIn]) -> Iterator[None]:
        layers = list(self._layers)
        self._layers[:] = stand_ins
        try:
            yield
        finally:
            self._layers[:] = layers
