"""Layers with packed weights against their expanded weights."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from encoded_models import random_parts
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear

from kernel_cases import needs_kernels, running
from mlx_rotor.errors import RotorError
from mlx_rotor.experts import formats, layers

SPECS = [
    (mode, bits, group)
    for mode in formats.ours()
    for bits in formats.known(mode)[0]
    for group in formats.known(mode)[1]
]
SPEC = ("lloyd", 3, 128)


def filled(stock, spec=SPEC, name="layer", seed=0):
    """(a layer in place of `stock` with random weights, the stock module with the same weights expanded)."""
    layer = layers.of(stock, *spec, name=name)
    *lead, columns = stock.weight.shape
    parts = random_parts(layer.format, lead, columns, seed)
    for kind, part in zip(("weight", *layer.format.beside), parts, strict=True):
        layer[kind] = part
    stock.weight = layer.format.decode(parts, columns)
    if "bias" in stock:
        layer.bias = stock.bias = mx.random.normal(stock.bias.shape, key=mx.random.key(seed))
    return layer, stock


def same(a, b, tolerance=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    error = mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max() / mx.abs(b.astype(mx.float32)).max()
    assert float(error) <= tolerance, float(error)


def normal(*shape, seed=1):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_linear_layer_multiplies_with_the_expanded_weights(spec):
    layer, stock = filled(nn.Linear(512, 24), spec)
    for rows in (1, 8, 9):
        x = normal(2, rows, 512)
        same(layer(x), stock(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_embedding_has_the_rows_and_is_a_head(spec):
    layer, stock = filled(nn.Embedding(40, 256), spec)
    tokens, x = mx.array([[3, 0, 39], [3, 3, 7]]), normal(1, 2, 256)
    same(layer(tokens), stock(tokens).astype(mx.bfloat16), 0)
    same(layer.as_linear(x), stock.as_linear(x))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
def test_experts_multiply_as_mlx_lms_own(spec, tokens):
    layer, stock = filled(SwitchLinear(256, 24, 5, bias=True), spec)
    assert (layer.input_dims, layer.output_dims, layer.num_experts) == (256, 24, 5)
    indices = mx.random.randint(0, 5, (1, tokens, 2), key=mx.random.key(2))
    shared, own = normal(1, tokens, 1, 1, 256), normal(1, tokens, 2, 1, 256)
    for x in (shared, own):
        same(layer(x, indices), stock(x, indices))
    ascending = mx.sort(indices.flatten())
    rows = normal(ascending.size, 1, 256)
    same(layer(rows, ascending, sorted_indices=True), stock(rows, ascending, sorted_indices=True))
    same(layer(rows, indices.flatten()), stock(rows, indices.flatten()))
    several = normal(tokens, 2, 3, 256)
    same(layer(several, indices[0]), stock(several, indices[0]))


@pytest.mark.parametrize("tokens", [1, 50])  # mlx_lm sorts from 64 rows on
def test_a_whole_expert_layer_computes_as_with_expanded_weights(tokens):
    stock = SwitchGLU(256, 128, 6)
    packed = copy.deepcopy(stock)
    for i, (name, spec) in enumerate(
        {"gate_proj": ("lloyd", 2, 256), "up_proj": ("q8", 8, 32), "down_proj": ("iq4_nl", 4, 16)}.items()
    ):
        packed[name], stock[name] = filled(stock[name], spec, seed=i)
    x, indices = normal(1, tokens, 256), mx.random.randint(0, 6, (1, tokens, 3), key=mx.random.key(4))
    same(packed(x, indices), stock(x, indices))


def test_heads_of_latent_attention_multiply_both_ways():
    layer, stock = filled(MultiLinear(128, 48, 3), ("q8", 8, 32))
    for heads in (1, 3):
        x, back = normal(2, heads, 5, 128), normal(2, heads, 5, 48)
        same(layer(x), stock(x))
        same(layer(back, transpose=False), stock(back, transpose=False))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_activations_keep_their_dtype(dtype):
    x = normal(2, 256).astype(dtype)
    linear, _ = filled(nn.Linear(256, 8))
    switch, _ = filled(SwitchLinear(256, 8, 4))
    multi, _ = filled(MultiLinear(256, 8, 2))
    embedding, _ = filled(nn.Embedding(8, 256))
    assert linear["codebooks"].dtype == mx.float16 and linear["bias"].dtype == mx.float32
    sorted_rows = switch(x[:, None], mx.array([0, 1]), sorted_indices=True)
    for out in (linear(x), switch(x[:, None], mx.array([1, 0])), sorted_rows, multi(x), embedding.as_linear(x)):
        assert out.dtype == dtype


def test_embeddings_have_the_dtype_of_the_models_norms():
    embedding, _ = filled(nn.Embedding(8, 256))
    token = mx.array([1])
    assert embedding["codebooks"].dtype == mx.float16 and embedding(token).dtype == mx.bfloat16
    model = nn.Sequential(embedding, nn.LayerNorm(64), nn.RMSNorm(256))
    model.layers[1].set_dtype(mx.float16)
    embedding.follow(model)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model.layers[2].set_dtype(dtype)
        assert embedding(token).dtype == dtype == copy.deepcopy(model).layers[0](token).dtype
    assert {name for name, _ in embedding.named_modules()} == {""}
    alone, _ = filled(nn.Embedding(8, 256))
    alone.set_dtype(mx.float32)
    alone.follow(nn.Sequential(alone))
    assert alone(token).dtype == mx.float32


def test_a_cast_model_has_the_same_weights():
    layer, _ = filled(nn.Linear(256, 16))
    x = normal(3, 256)
    model = nn.Sequential(layer)
    before = model(x)
    model.set_dtype(mx.float32)
    assert layer["weight"].dtype == mx.uint32 and layer["codebooks"].dtype == mx.float32
    same(model(x), before)
    layer["codebooks"] = layer["codebooks"] * 2
    same(model(x) - layer["bias"], 2 * (before - layer["bias"]))


def test_layers_are_not_trained():
    model = nn.Sequential(filled(nn.Linear(256, 16))[0], nn.Linear(16, 4))
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == {"layers.1.weight", "layers.1.bias"}


def test_layers_print_their_shape_and_format():
    layer, _ = filled(SwitchLinear(256, 16, 4))
    assert repr(layer) == "RotorSwitchLinear(shape=[4, 16, 256], bias=True, mode=lloyd, bits=3, group_size=128)"


def test_copies_are_independent():
    layer, _ = filled(nn.Linear(256, 16))
    x = normal(1, 256)
    before, other = layer(x), copy.deepcopy(layer)
    other["codebooks"] = other["codebooks"] * 0
    same(layer(x), before)
    same(other(x)[0], other["bias"])


LOSSES = {
    "evaluated": lambda m: mx.eval(m.parameters()),
    "cast": lambda m: m.set_dtype(mx.float32),
    "updated": lambda m: m.update(tree_map(lambda x: x, m.parameters())),
    "halved": lambda m: m.update(tree_map(lambda x: mx.contiguous(mx.split(x, 2, axis=0)[0]), m.parameters())),
    "copied": lambda m: m.load_weights([(n, mx.array(v)) for n, v in tree_flatten(m.parameters())]),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tensor", ["weight", "codebooks", "bias"])
def test_a_tensor_that_no_checkpoint_had_is_an_error(tensor, loss):
    whole, _ = filled(nn.Linear(256, 16), name="model.layers.0.q_proj")
    model = nn.Sequential(layers.of(nn.Linear(256, 16), *SPEC, name="model.layers.0.q_proj"))
    found = [(f"layers.0.{name}", value) for name, value in whole.items() if name != tensor]
    model.load_weights(found, strict=False)
    LOSSES[loss](model)
    with pytest.raises(RotorError, match=rf"^model\.layers\.0\.q_proj: the checkpoint has no {tensor} for it"):
        model(normal(1, 256))
    with pytest.raises(RotorError, match=rf"lacks layers\.0\.{tensor};"):
        layers.check(model)
    model.load_weights([(f"layers.0.{name}", value) for name, value in whole.items()], strict=False)
    layers.check(model)
    same(model(normal(1, 256)), whole(normal(1, 256)))


def test_a_check_names_every_missing_tensor():
    model = nn.Sequential(*(layers.of(nn.Linear(256, 16), *SPEC) for _ in range(4)))
    with pytest.raises(RotorError, match=r"layers\.0\.weight, layers\.0\.codebooks, .* and 4 more"):
        layers.check(model)


@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        ("weight", mx.zeros((16, 24)), "weight is mlx.core.float32, not the uint32 codes"),
        ("codebooks", mx.zeros((16, 8), mx.float16), r"codebooks is mlx.core.float16 \[16, 8\].*to be \[16, 16\]"),
        ("codebooks", mx.zeros((16, 16), mx.int32), r"codebooks is mlx.core.int32"),
        ("weight", mx.zeros((16, 12), mx.uint32), r"\[16, 12\] of 3 bits .* has to be \[16, 8\]"),
        ("weight", mx.zeros((16, 30), mx.uint32), "a part of 320 of its 256 columns is no whole number"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensor, value, said):
    layer, _ = filled(nn.Linear(256, 16))
    layer[tensor] = value
    with pytest.raises(RotorError, match=said):
        layer(normal(1, 256))


@pytest.mark.parametrize(
    ("module", "spec", "said"),
    [
        (nn.Linear(320, 8), ("lloyd", 3, 128), "^at: lloyd in groups of 128 does not divide rows of 320 weights"),
        (nn.Linear(256, 8), ("lloyd", 5, 128), "^at: lloyd: bits = 5 is not supported"),
        (nn.Linear(256, 8), ("q8", 8, 64), "^at: q8: group_size = 64"),
        (nn.Linear(256, 8), ("nf4", 4, 64), "^at: unknown weight format 'nf4'"),
        (nn.RMSNorm(256), SPEC, "^at: RMSNorm has no form with lloyd weights"),
        (nn.Conv1d(256, 8, 1), SPEC, "^at: Conv1d has no form"),
        (nn.QuantizedLinear(256, 8), SPEC, "^at: QuantizedLinear has no form"),
        (layers.RotorLinear((8, 256), *SPEC), SPEC, "^at: RotorLinear has no form"),
    ],
)
def test_what_has_no_packed_form_is_named(module, spec, said):
    with pytest.raises(RotorError, match=said):
        layers.of(module, *spec, name="at")


def test_a_linear_layer_with_a_call_of_its_own_is_not_replaced():
    class Doubled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    with pytest.raises(RotorError, match="Doubled has no form"):
        layers.of(Doubled(256, 8), *SPEC)


@pytest.mark.parametrize(
    "module",
    [
        nn.QuantizedLinear(256, 8, group_size=32, bits=3),
        QuantizedSwitchLinear(256, 8, 3, group_size=64, bits=2),
        nn.QuantizedEmbedding(8, 256, 128, 8),
    ],
    ids=lambda m: type(m).__name__,
)
def test_mlxs_own_layers_have_packed_weights_too(module):
    packed = layers.packed_of(module)
    assert (packed.columns, packed.rows) == (256, 8)
    assert (packed.bias is not None) == ("bias" in module)
    stock = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
    same(packed.decoded(), stock, 0)


def test_other_modules_have_no_packed_weights():
    for module in (nn.Linear(8, 8), nn.QuantizedLinear(256, 8, mode="mxfp4", group_size=32), nn.RMSNorm(8)):
        assert layers.packed_of(module) is None
    assert layers.packed_of(QuantizedMultiLinear(128, 8, 2, 32, 4, "affine")) is not None
    assert layers.packed_of(nn.QuantizedShardedToAllLinear(256, 8)) is None
    layer, _ = filled(nn.Linear(256, 8))
    assert layers.packed_of(layer) is layer.packed


@needs_kernels
def test_layers_run_the_kernels(monkeypatch):
    linear, _ = filled(nn.Linear(256, 24))
    embedding, _ = filled(nn.Embedding(40, 256), ("q8", 8, 32))
    switch, _ = filled(SwitchLinear(256, 24, 4, bias=True), ("iq4_nl", 4, 16))
    few = normal(1, 2, 1, 1, 256), mx.array([[[3, 0], [1, 3]]])
    each = normal(1, 9, 2, 1, 256), mx.random.randint(0, 4, (1, 9, 2), key=mx.random.key(6))
    many = normal(1, 9, 1, 1, 256), mx.random.randint(0, 4, (1, 9, 2), key=mx.random.key(2))
    ascending = normal(20, 1, 256), mx.array([0] * 7 + [2] * 13), True
    calls = {
        "matvec": lambda: linear(normal(2, 256)),
        "matmul_tiled": lambda: embedding.as_linear(normal(9, 256)),
        "down": lambda: switch(*few),
        "gather_tiled": lambda: mx.concatenate([switch(*how).flatten() for how in (many, each, ascending)]),
    }
    want = {name: call() for name, call in calls.items()}
    mx.eval(want)
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    for name, call in calls.items():
        with running() as simulator:
            got = call()
            mx.eval(got)
        assert simulator.objections == []
        assert all(name in report for report, _ in simulator.reports)
        same(got, want[name])
