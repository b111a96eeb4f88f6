"""Attaching fused experts to a stock mlx_lm model, detaching them, and proving that they run.

A layer keeps its module, its parameters and their names. Only its class changes, to one that computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from ..errors import RotorError
from ..experts.fused import MAX_ROWS, Counts
from ..experts.layers import packed_of
from ..kernels import backend, check_results, launch
from ..kernels.spec import PackedWeight
from . import routers, versions
from .attachment import check_model, stock_cache
from .expert_layers import PROJECTIONS, State, kernel_name, put, take
from .report import ExpertLayer, ExpertReport, formats

AUTO, FUSED, STOCK = MODES = ("auto", "fused", "stock")
ASKED = "--experts stock"
UNUSED = "the model does not call them when it decodes"
ALL = frozenset(range(1, MAX_ROWS + 1))


def mode_of_draft(mode: str) -> str:
    """The mode of a draft model beside a model in `mode`: the draft may have no experts, or other ones."""
    return STOCK if mode == STOCK else AUTO


def check_mode(mode: str) -> None:
    """RotorError for an unknown mode."""
    if mode not in MODES:
        raise RotorError(f"experts {mode!r}: there is {', '.join(MODES)}")


def attach_experts(model: Any, mode: str = AUTO) -> ExpertReport:
    """Makes the expert layers of `model` decode through the expert kernels, until `detach_experts`.

    One step's graph is built, and nothing of it computed, to find out which layers do.

    Args:
        model: a model of mlx_lm, with its experts quantized.
        mode: `auto`, where kernels run and are not known to be slower on this machine; `fused`, all; `stock`, none.

    Returns:
        The report: layers that are fused, those left to mlx_lm and why, and counts of their calls.

    Raises:
        RotorError: an unknown mode, an unsupported mlx_lm, or `fused` for a model without expert layers or with some
            that can't be fused, each with the reason.

    Example:
        >>> model, tokenizer = mlx_rotor.load("examples/minimax_m27")
        >>> print(mlx_rotor.attach_experts(model).describe())
    """
    versions.check()
    check_mode(mode)
    check_model(model)
    detach_experts(model)
    layers = _found(model)
    if mode == FUSED and not layers:
        raise RotorError("--experts fused: this model has no expert layers; leave it out")
    packed = {path: _packed(layer) for path, layer in layers.items()}
    left = {path: _objection(layers[path], weights, mode) for path, weights in packed.items()}
    states: dict[str, State] = {}
    try:
        for path, layer in layers.items():
            if not left[path]:
                states[path] = State(kernel_name(layer.activation) or "", frozenset(_rows(packed[path], mode)))
                put(layer, states[path])
        own = routers.attach(model, {path: layers[path] for path in states})
        tried = _try(model, states) if states else {}
        for path, state in states.items():
            left[path] = state.refused or ("" if tried[path].fused else UNUSED)
            if left[path]:
                take(layers[path])
        report = ExpertReport(
            mode,
            backend() if states else "",
            tuple(
                ExpertLayer(path, left=left[path])
                if left[path]
                else _fused(path, packed[path], states[path], tried[path], own[path])
                for path in layers
            ),
        )
        if mode == FUSED and any(why not in ("", UNUSED) for why in left.values()):
            raise RotorError(f"--experts fused can't be done: {report.describe_left()}; use --experts auto")
        return report
    except BaseException:
        detach_experts(model)
        raise


def detach_experts(model: Any) -> Any:
    """Gives every layer of `model` its own class back. Returns the model."""
    routers.detach(model)
    for layer in _found(model).values():
        take(layer)
    return model


def _found(model: Any) -> dict[str, Any]:
    """Expert layers by path, in the model's order."""

    def order(path: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]

    every = {path: m for path, m in model.named_modules() if isinstance(m, (SwitchGLU, SwitchMLP))}
    return {path: every[path] for path in sorted(every, key=order)}


def _packed(layer: Any) -> list[PackedWeight] | str:
    """The three projections as packed weights, or the reason why the kernels can't read them."""
    if type(layer) is not SwitchGLU:
        return f"{type(layer).__name__} is no SwitchGLU"
    packed = []
    for name in PROJECTIONS:
        weight = packed_of(layer[name])
        if weight is None:
            if type(layer[name]) is SwitchLinear:
                return f"{name} is not quantized"
            mode = getattr(layer[name], "mode", None)
            return f"{name} is a {type(layer[name]).__name__}{f' of mode {mode}' if mode else ''}"
        packed.append(weight)
    return packed


def _objection(layer: Any, packed: list[PackedWeight] | str, mode: str) -> str:
    """The reason why this layer is left to mlx_lm, or ""."""
    if mode == STOCK:
        return ASKED
    if isinstance(packed, str):
        return packed
    if kernel_name(layer.activation) is None:
        return f"its activation, {type(layer.activation).__name__}, is none of the kernels'"
    if mode == AUTO and backend() == "reference":
        return f"no kernels run here: {launch.reason() or 'MLX_ROTOR_BACKEND=reference'}"
    if not _rows(packed, mode):
        return str(check_results.prefers_stock(check_results.experts_key(*packed), 1))
    return ""


def _rows(packed: list[PackedWeight] | str, mode: str) -> set[int]:
    """The numbers of tokens that the kernels are to be used for."""
    assert not isinstance(packed, str)
    if mode == FUSED:
        return set(ALL)
    key = check_results.experts_key(*packed)
    return {n for n in ALL if check_results.prefers_stock(key, n) is None}


def _try(model: Any, states: Mapping[str, State]) -> dict[str, Counts]:
    """Counts of each layer's calls in one decoding step, which is built and not computed."""
    for state in states.values():
        state.trying = True
    try:
        model(mx.array([[0]]), cache=stock_cache(model))
    except (ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise RotorError(f"{type(model).__module__} does not run on one token and its own caches: {e}") from e
    finally:
        found = {}
        for path, state in states.items():
            state.trying, found[path], state.counts = False, state.counts, Counts()
    return found


def _fused(
    path: str, packed: Sequence[PackedWeight] | str, state: State, tried: Counts, own_router: str
) -> ExpertLayer:
    assert not isinstance(packed, str)
    return ExpertLayer(
        path,
        formats(packed),
        summed=tried.summed == tried.fused or state.chosen == 1,
        own_router=own_router,
        slow=tuple(sorted(ALL - state.rows)),
        counts=state.counts,
    )
