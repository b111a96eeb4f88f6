"""Compressed caches for a stock mlx_lm model: made once, or attached until they are detached, and proved to run.

`IsoQuantCache(bits=4)` and its like are schemes under the names that other packages gave their cache classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from ..cache import DEFAULT, RotorCache, Scheme, parse
from ..errors import RotorError
from . import attention, probe, versions
from .kv_scales import with_own_scales
from .layers import check_limit, compress, limited
from .notes import fingerprint, note, noted
from .slots import slots


def register() -> None:
    """Lets mlx_lm load prompt-cache files of compressed caches: it looks for their class in its own module."""
    setattr(stock, "RotorCache", RotorCache)  # noqa: B010


@dataclass(frozen=True)
class _Hook:
    """The `make_cache` that `attach` puts on a model. `previous`: the hook of somebody else that was there before."""

    model: Any
    scheme: Scheme
    previous: Callable[[], list[Any]] | None

    def __call__(self) -> list[Any]:
        return make_prompt_cache(self.model, self.scheme)


def _hook(model: Any) -> Any:
    """The `make_cache` set on this very instance, ours or another's, or None."""
    return noted(model, "make_cache")


def stock_cache(model: Any) -> list[Any]:
    """The cache list mlx_lm itself would make for `model`, whatever is attached."""
    hook = _hook(model)
    if not isinstance(hook, _Hook):
        return list(stock.make_prompt_cache(model))
    if hook.previous is not None:
        return list(hook.previous())
    if hasattr(type(model), "make_cache"):
        return list(type(model).make_cache(model))
    without_hook: Any = SimpleNamespace(layers=model.layers)
    return list(stock.make_prompt_cache(without_hook))


def layer_cache(scheme: Scheme | None) -> Any:
    """The cache of one layer of no model in particular: packed by `scheme`, or mlx_lm's own for None."""
    if scheme is None:
        return stock_cache(SimpleNamespace(layers=[None]))[0]
    return RotorCache(scheme.k, scheme.v, scheme.sinks, scheme.ring, scheme.block)


def check_model(model: Any) -> None:
    """Raises RotorError for what is no model of mlx_lm's: it has neither layers nor a way to make caches for them."""
    if not (hasattr(model, "layers") or hasattr(model, "make_cache")):
        raise RotorError(f"a model as mlx_rotor.load() returns it is needed, not {type(model).__name__}")


def _scheme(kv: str | Scheme | None, sinks: int | None, ring: int | None, protect_layers: int | None) -> Scheme | None:
    scheme = parse(kv) if isinstance(kv, str) else kv
    return scheme and scheme.keeping(sinks=sinks, ring=ring, protect_layers=protect_layers)


def make_prompt_cache(
    model: Any,
    kv: str | Scheme | None = DEFAULT,
    *,
    sinks: int | None = None,
    ring: int | None = None,
    protect_layers: int | None = None,
    max_kv_size: int | None = None,
) -> list[Any]:
    """A prompt cache for `model`, for `prompt_cache=` of mlx_lm's generate functions or `cache=` of the model.

        cache = mlx_rotor.make_prompt_cache(model, "trellis3")
        mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)

    Layers whose attention would have to expand packed tokens on every step keep mlx_lm's own cache. The first call for
    a model runs it on two tokens to find these layers. `report.describe` says which layers are compressed.

    Args:
        kv: a scheme or its text, `exact` (or None) for mlx_lm's own cache.
        sinks, ring: first and recent tokens kept exact; protect_layers: layers at either end with codecs a step
            wider. None keeps the scheme's.
        max_kv_size: tokens that a layer of full attention sees at most, the first 4 and the most recent ones.

    Returns:
        One cache a layer, in mlx_lm's cache protocol.

    Raises:
        RotorError: unknown scheme, unsupported mlx_lm, or a model with nothing to compress.
    """
    versions.check()
    check_model(model)
    scheme = _scheme(kv, sinks, ring, protect_layers)
    caches = stock_cache(model)
    if scheme is None:
        return caches if max_kv_size is None else limited(caches, max_kv_size)
    scheme, this_model = with_own_scales(scheme, model), fingerprint(model)
    if scheme.model not in ("", this_model):
        raise RotorError(f"{scheme.name} was calibrated for another model, or other weights; calibrate it for this one")
    register()
    uses = probe.uses(model, stock_cache(model))
    attention.install()
    if max_kv_size is not None:
        check_limit(max_kv_size, uses)
        caches = limited(caches, max_kv_size)
    return compress(caches, scheme, uses, this_model)


def attach(
    model: Any,
    kv: str | Scheme = DEFAULT,
    *,
    sinks: int | None = None,
    ring: int | None = None,
    protect_layers: int | None = None,
    check: bool = True,
) -> Any:
    """Makes every cache that mlx_lm creates for `model` a compressed one, until `detach`. Returns the model.

        mlx_rotor.attach(model, "trellis3")
        mlx_lm.generate(model, tokenizer, prompt)

    Generation, chat, server and speculative decoding of mlx_lm all ask the model for its cache.

    Args:
        model: as mlx_lm loads it.
        kv: a scheme or its text; `exact` detaches.
        sinks, ring, protect_layers: what stays exact or a step wider, in tokens and layers; None keeps the scheme's.
        check: prove by one short run that each compressed layer really runs compressed.

    Raises:
        RotorError: no model; see `make_prompt_cache` and `verify`.

    Example:
        >>> model, tokenizer = mlx_rotor.load()
        >>> mlx_lm.generate(mlx_rotor.attach(model, "turbo4"), tokenizer, "import os")
    """
    check_model(model)
    scheme = _scheme(kv, sinks, ring, protect_layers)
    if scheme is None:
        return detach(model)
    if check:
        verify(model, scheme)
    else:
        make_prompt_cache(model, scheme)
    before = _hook(model)
    hook = _Hook(model, scheme, before.previous if isinstance(before, _Hook) else before)
    note(model, "make_cache", hook)
    return model


def detach(model: Any) -> Any:
    """Undoes `attach`: mlx_lm makes the same caches for `model` as before. Returns the model."""
    hook = _hook(model)
    if isinstance(hook, _Hook):
        object.__delattr__(model, "make_cache")
        if hook.previous is not None:
            note(model, "make_cache", hook.previous)
    return model


def verify(model: Any, kv: str | Scheme = DEFAULT) -> list[Any]:
    """Runs a few tokens through `model` with no token kept exact, and returns the caches, one a layer.

    Raises:
        RotorError: naming each layer that was to be compressed and packed nothing or attended to expanded arrays, or
            a head dimension the codec can't take.
    """
    scheme = parse(kv) if isinstance(kv, str) else kv
    if scheme is None:
        raise RotorError("exact KV compresses nothing: there is nothing to verify")
    caches = make_prompt_cache(model, scheme, sinks=0, ring=0)
    for tokens in ([0, 1], [0, 1], [0]):
        mx.eval(model(mx.array([tokens]), cache=caches))
    ours = {path: c for path, c in slots(caches).items() if isinstance(c, RotorCache)}
    idle = [path[0] for path, c in ours.items() if c.body.length == 0]
    slow = [path[0] for path, c in ours.items() if path[0] not in idle and c.counts.fallback > 0]
    if idle or slow:
        parts = [f"layers {idle} stored nothing in their cache"] if idle else []
        parts += [f"layers {slow} attended to expanded keys and values"] if slow else []
        raise RotorError(
            f"{scheme.name} does not run compressed on this model ({type(model).__module__}): {'; '.join(parts)}; "
            "run it with --kv exact"
        )
    return caches


@dataclass(frozen=True)
class Recipe(Scheme):
    """A scheme that makes a model's caches when it is called with the model; `attach` takes it too."""

    def __call__(self, model: Any) -> list[Any]:
        """The prompt cache of `model`, one cache a layer; see `make_prompt_cache`."""
        return make_prompt_cache(model, self)


def _recipe(family: str, bits: int, k_bits: int | None, v_bits: int | None, parts: dict[str, Any]) -> Recipe:
    k, v = (f"{family}{bits if own is None else own}" for own in (k_bits, v_bits))
    unknown = parts.keys() - {"sinks", "ring", "protect_layers", "centre"}
    if unknown:
        raise RotorError(
            f"no part of a scheme: {', '.join(sorted(unknown))}; there are sinks, ring, protect_layers, centre"
        )
    return Recipe(k, v, **parts)


def IsoQuantCache(
    bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, mode: str = "fast", **parts: Any
) -> Recipe:
    """Quaternion blocks, multiplied from the left (`mode="fast"`) or from both sides ("full"), 2 to 4 bits.

    Args:
        k_bits, v_bits: of one side, in place of `bits`.
        parts: sinks, ring, protect_layers, centre, see `Scheme`.

    Raises:
        RotorError: bits there is no codec of, K below V, or an unknown mode.
    """
    if mode not in ("fast", "full"):
        raise RotorError(f"IsoQuantCache has modes fast and full, not {mode!r}")
    return _recipe("iso" if mode == "fast" else "isofull", bits, k_bits, v_bits, parts)


def PlanarQuantCache(bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, **parts: Any) -> Recipe:
    """Plane rotations of pairs; otherwise as `IsoQuantCache`."""
    return _recipe("planar", bits, k_bits, v_bits, parts)


def RotorQuantCache(bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, **parts: Any) -> Recipe:
    """Rotors of triples; otherwise as `IsoQuantCache`."""
    return _recipe("rotor", bits, k_bits, v_bits, parts)


def TurboQuantCache(bits: int = 4, *, k_bits: int | None = None, v_bits: int | None = None, **parts: Any) -> Recipe:
    """A Hadamard rotation of the whole vector; otherwise as `IsoQuantCache`."""
    return _recipe("turbo", bits, k_bits, v_bits, parts)
