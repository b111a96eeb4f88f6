"""Shared by the suite: a lossless codec, the bundled model loaded once."""

import os
import tempfile

import hypothesis
import mlx.core as mx
import pytest

# The same examples on every run and machine, however slow it is.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# What `doctor --kernels` found on this machine is no concern of the tests.
os.environ["MLX_ROTOR_CACHE"] = tempfile.mkdtemp(prefix="mlx_rotor_tests_")

# The reference backend computes the same on every machine only on the same device; set before mlx_lm reads it.
mx.set_default_device(mx.cpu)

from mlx_rotor import codec  # noqa: E402
from small_checkpoint import small  # noqa: E402, F401
from tiny_checkpoints import checkpoints, parrot, tape  # noqa: E402, F401


class Lossless:
    """Stores float32 bit patterns, in a basis with all signs flipped: every path of a codec, no error."""

    name, index_bits, scaled, kernel = "raw32", 32, True, None

    def __init__(self, dim):
        self.dim, self.bits, self.tile_words = dim, 32 + 16 / dim, 32 * dim

    def encode(self, x, mean=None):
        y = -x.astype(mx.float32) - (0 if mean is None else mean)
        words = mx.view(mx.contiguous(y), mx.uint32)
        return codec.Packed(words, mx.ones(x.shape[:-1], mx.float16))

    def decode_rotated(self, packed):
        return mx.view(mx.contiguous(packed.words), mx.float32)

    def decode(self, packed):
        return -self.decode_rotated(packed)

    def rotate(self, x):
        return -x

    def unrotate(self, y):
        return -y


codec.register("raw32", Lossless)


@pytest.fixture(scope="session")
def bundled():
    """(model, tokenizer) of the bundled model, float32, nothing attached."""
    import mlx_rotor

    return mlx_rotor.load()


@pytest.fixture(autouse=True)
def stock_attention():
    """Every test starts and ends with MLX's own attention function in place."""
    from mlx_rotor.host import attention

    attention.uninstall()
    yield
    attention.uninstall()
