"""The choice of the backend, and the kernels that each operation calls on it."""

import pkgutil

import mlx.core as mx
import pytest

from mlx_rotor import RotorError, codec, kernels
from mlx_rotor.host import attention
from mlx_rotor.kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, launch, metal, reference
from mlx_rotor.kernels.segments import in_order


def exact(*lengths, heads=2, d=64, batch=2):
    return [ExactSegment(*(mx.random.normal((batch, heads, n, d)) for _ in "kv")) for n in lengths]


def packed(name, length=40, d=64):
    c = codec.get(name, d)
    sides = [PackedSide(c, *kernels.encode(c, mx.random.normal((2, 2, length, d)))) for _ in "kv"]
    return PackedSegment(length, *sides)


@pytest.fixture
def made(monkeypatch):
    """The Metal backend with kernels that give zeros; the names of those launched, in order."""
    launched = []

    def maker(name, **source):
        def run(*, output_shapes, output_dtypes, **arguments):
            launched.append(name)
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return run

    metal.use_maker(maker)
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    yield launched
    metal.use_maker(None)


@pytest.mark.parametrize(
    ("available", "device", "best", "reason"),
    [
        (True, mx.gpu, "metal", ""),
        (True, mx.cpu, "reference", "default device is the CPU"),
        (False, mx.cpu, "reference", "no Metal"),
        (False, mx.gpu, "reference", "no Metal"),
    ],
)
def test_the_best_backend_and_why_metal_is_not_it(monkeypatch, available, device, best, reason):
    monkeypatch.delenv("MLX_ROTOR_BACKEND", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: available)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    assert launch.backend() == best and reason in launch.reason() and bool(reason) == bool(launch.reason())
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    assert launch.backend() == "reference"
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    if best == "metal":
        assert launch.backend() == "metal"
    else:
        with pytest.raises(RotorError, match=reason):
            launch.backend()


def test_a_simulator_makes_metal_possible_but_not_the_best(made, monkeypatch):
    assert launch.backend() == "metal"
    monkeypatch.delenv("MLX_ROTOR_BACKEND")
    assert launch.backend() == "reference"
    metal.use_maker(None)
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    with pytest.raises(RotorError, match=r"CPU|no Metal"):
        launch.backend()


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "vulkan")
    c, x = codec.get("turbo4", 64), mx.ones((1, 2, 3, 64))
    calls = [
        lambda: kernels.attend(x, exact(3, batch=1), AttentionArgs(scale=1.0)),
        lambda: kernels.encode(c, x),
        lambda: kernels.dequantize(PackedSide(c, mx.zeros((1, 2, 1, 256), mx.uint32), x), 0, 1, mx.float32),
    ]
    for call in calls:
        with pytest.raises(RotorError, match=r"vulkan: there is metal, reference"):
            call()


def test_no_module_has_an_operations_name():
    modules = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    assert not modules & set(kernels.__all__)


def test_encode_and_attend_launch_kernels(made):
    segment = packed("trellis3")
    assert [name.rsplit("_", 1)[0] for name in made] == ["mlx_rotor_encode_trellis3_64"] * 2
    assert segment.k.tiles.shape == (2, 2, 2, 64 * 3) and segment.k.scale.shape == (2, 2, 64)
    out = kernels.attend(mx.ones((2, 4, 1, 64)), [*exact(4), segment, *exact(9)], AttentionArgs(scale=1.0))
    assert out.shape == (2, 4, 1, 64) and len(made) > 2
    del made[:]
    x = kernels.dequantize(segment.v, 3, 40, mx.float16)
    assert x.shape == (2, 2, 37, 64) and x.dtype == mx.float16 and len(made) == 1


def test_a_codec_without_a_kernel_is_mlxs_operations(made):
    """Alone, or as one side of a segment whose other side has one."""
    segment, other, q = packed("raw32"), packed("turbo4"), mx.random.normal((2, 4, 1, 64))
    del made[:]
    mixed = PackedSegment(40, other.k, segment.v)
    for segments in ([segment], [mixed], [*exact(4), other, mixed]):
        out = kernels.attend(q, segments, AttentionArgs(scale=0.2))
        assert mx.array_equal(out, reference.attend(q, segments, AttentionArgs(scale=0.2))) and out.any()
    shown = kernels.dequantize(segment.k, 0, 4, mx.float16)
    assert mx.array_equal(shown, reference.dequantize(segment.k, 0, 4, mx.float16)) and shown.any()
    assert not made


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("lengths", [(30,), (4, 26)])
@pytest.mark.parametrize("wrapped", [False, True], ids=["stock", "wrapped"])
def test_exact_tokens_alone_go_to_mlxs_attention(made, lengths, wrapped, dtype):
    if wrapped:
        attention.install()
    mx.random.seed(0)
    segments = [ExactSegment(r.k.astype(dtype), r.v.astype(dtype)) for r in exact(*lengths)]
    q = mx.random.normal((2, 4, 5, 64)).astype(dtype)
    seen = mx.random.uniform(shape=(2, 1, 5, 30)) < 0.7
    seen = seen | (mx.arange(30) == 29)
    held = mx.array([[4, 0, 26], [4, 0, 3]] if len(lengths) == 2 else [[0, 0, 30], [2, 0, 0]], mx.int32)
    for options in (
        {},
        {"mask": "causal"},
        {"mask": seen},
        {"mask": mx.random.normal((5, 30)).astype(dtype), "window": 7},
        {"mask": "causal", "sink_logits": mx.random.normal((4,)).astype(dtype)},
        {"mask": "causal", "window": 9},
        {"mask": "causal", "window": 300},
        {"mask": "causal", "window": 9, "keep_first": True},
        {"mask": "causal", "window": 2, "keep_first": True, "lengths": held},
        {"mask": "causal", "lengths": held},
        {"mask": mx.ones((5, 1), mx.bool_), "lengths": held, "window": 3},
    ):
        out = kernels.attend(q, segments, AttentionArgs(scale=0.2, **options))
        assert out.dtype == dtype
        expected = reference.attend(q, segments, AttentionArgs(scale=0.2, **options))
        assert mx.abs(out - expected).max() < (1e-5 if dtype == mx.float32 else 6e-3), options
    assert not made


def test_runs_in_order():
    a, b = exact(4, 9)
    none, body = exact(0)[0], packed("turbo4")
    assert in_order([a, body, b]) == (a, [body], b)
    assert in_order([a, body]) == (a, [body], None)
    assert in_order([body, b]) == (None, [body], b)
    assert in_order([none, body, none]) == (None, [body], None)
    assert in_order([a, b]) == (a, [], b)
    assert in_order([b]) == (None, [], b)
    other = packed("turbo4")
    assert in_order([a, body, PackedSegment(0, body.k, body.v), other, b]) == (a, [body, other], b)
    assert in_order([body, other]) == (None, [body, other], None)
    for wrong in ([a, b, body], [body, b, other], [a, b, a]):
        with pytest.raises(RotorError, match="exact sink tokens, packed ones"):
            in_order(wrong)
