"""Memory of a compressed cache in the two places where savings are easily lost: reading a prompt, and sharing one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..cache import EXACT, RotorCache, Scheme
from ..errors import RotorError
from ..host import make_prompt_cache
from ..host.attachment import layer_cache
from ..host.report import kv_bytes
from ..quality.model import chunks, dtype_of

KV_HEADS, DIM = 8, 128
APPENDED = 64


@dataclass(frozen=True)
class Prefill:
    """Reading the first `tokens` tokens of a prompt, `chunk` at a time.

    Attributes:
        dtype: the model's, which everything but the packed tokens is in.
        peak: most bytes MLX held at once, without the model's own.
        held, packed: bytes of the caches afterwards, and of their packed tokens.
    """

    kv: str
    tokens: int
    chunk: int
    dtype: str
    peak: int
    held: int
    packed: int

    @property
    def peak_16_bit(self) -> int:
        """The peak in 16-bit terms: half of all that is in float32; packed tokens take what they take. At least what a
        16-bit model needs, as all that is packed at the end is taken to have been there at the peak."""
        return (self.peak - self.packed) // 2 + self.packed if self.dtype == "float32" else self.peak

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_16_bit": self.peak_16_bit}


def packed_bytes(cache: Sequence[Any]) -> int:
    return sum(int(a.nbytes) for c in cache if isinstance(c, RotorCache) for a in c.body.arrays)


def prefill(
    model: Any,
    kv: Scheme | None,
    tokens: Sequence[int],
    lengths: Sequence[int],
    chunk: int,
    advance: Callable[[int], Any] = lambda n: None,
) -> Iterator[Prefill]:
    """The peak of one run over `tokens` after each of `lengths`, ascending multiples of `chunk`.

    Args:
        kv: None: with the stock cache.

    Raises:
        RotorError: lengths that are no such, or more than there are tokens.
    """
    if any(n % chunk for n in lengths) or list(lengths) != sorted(set(lengths)) or lengths[-1] > len(tokens):
        raise RotorError(f"prompt lengths {list(lengths)} must be ascending multiples of {chunk} up to {len(tokens)}")
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    cache, dtype = make_prompt_cache(model, kv), dtype_of(model)
    before, done = mx.get_active_memory(), 0
    mx.reset_peak_memory()
    for logits in chunks(model, cache, tokens[: lengths[-1]], chunk):
        done += len(logits)
        del logits
        advance(chunk)
        if done in lengths:
            peak = mx.get_peak_memory() - before
            yield Prefill(kv.name if kv else EXACT, done, chunk, dtype, peak, kv_bytes(cache), packed_bytes(cache))


@dataclass(frozen=True)
class PrefixHit:
    """A cache of `tokens` tokens copied, as a prompt store does on a hit, and `APPENDED` tokens appended to the copy.

    One layer, 8 KV heads of 128, float16. `held`: bytes of the cache; `added`: bytes more in MLX's memory afterwards,
    with both alive; `ring`: bytes of the exact recent tokens, of which the copy has its own.
    """

    kv: str
    tokens: int
    held: int
    added: int
    ring: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prefix_hit(scheme: Scheme | None, tokens: int) -> PrefixHit:
    """Measures a copy under `scheme`, or of the stock cache for None."""
    cache = layer_cache(scheme)
    for i in range(0, tokens, 512):
        x = _random(min(512, tokens - i), i)
        _append(cache, x)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    copied = copy.deepcopy(cache)
    _append(copied, _random(APPENDED, tokens))
    mx.eval(cache.state, copied.state)
    gc.collect()
    added = mx.get_active_memory() - before
    ring = (cache.recent.k, cache.recent.v) if isinstance(cache, RotorCache) else ()
    name = EXACT if scheme is None else scheme.name
    return PrefixHit(name, tokens, int(cache.nbytes), added, sum(int(a.nbytes) for a in ring if a is not None))


def _random(n: int, seed: int) -> mx.array:
    x = mx.random.normal((1, KV_HEADS, n, DIM), key=mx.random.key(seed)).astype(mx.float16)
    mx.eval(x)
    return x


def _append(cache: Any, x: mx.array) -> None:
    if isinstance(cache, RotorCache):
        cache.append(x, x)
    else:
        cache.update_and_fetch(x, x)
    mx.eval(cache.state)
