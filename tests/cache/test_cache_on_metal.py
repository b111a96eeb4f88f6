"""The cache over real kernels, in the simulator or on a Mac's GPU, against the same cache over their references."""

import mlx.core as mx
import numpy as np
import pytest

from grids import thinned
from kernel_cases import distance, needs_kernels, normal, running
from mlx_rotor.cache import RotorCache

D, CHUNKS = 64, (3, 70, 1, 1, 9, 1)


def attended(backend, monkeypatch, codecs):
    """What each chunk's attention gives, with a trim before the last but one, and the packed tokens at the end."""
    monkeypatch.setenv("MLX_ROTOR_BACKEND", backend)
    rng = np.random.default_rng(0)
    cache, outputs = RotorCache(*codecs, sinks=4, ring=16, block=4), []
    for n in CHUNKS:
        if n == 9:
            assert cache.trim(25) == 25
        k, _ = cache.update_and_fetch(normal(rng, 1, 2, n, D), normal(rng, 1, 2, n, D))
        q = normal(rng, 1, 4, n, D)
        outputs.append(k.rotor.attend(q, D**-0.5, "causal" if n > 1 else None))
    # A view itself: what attention falls back to.
    return [*outputs, *cache.keys_and_values()]


@needs_kernels
@pytest.mark.parametrize("codecs", thinned([("turbo4", "turbo3"), ("trellis3", "rotor2")], 2), ids="-".join)
def test_the_cache_gives_the_same_on_both_backends(monkeypatch, codecs):
    with running() as simulator:
        got = attended("metal", monkeypatch, codecs)
        mx.eval(got)
    want = attended("reference", monkeypatch, codecs)
    assert simulator.objections == []
    # The reference of attention sums in another order; decoded tokens differ by rounding alone.
    assert max(distance(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
