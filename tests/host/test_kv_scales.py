"""KV scales that come with checkpoints, in the names compressed-tensors and its users give them."""

import mlx.core as mx
import pytest

import mlx_rotor
from mlx_rotor.cache import scheme_file
from mlx_rotor.cache.scheme_file import Sidecar
from mlx_rotor.errors import RotorError
from mlx_rotor.host import kv_scales, report
from tiny_models import tiny


def save(folder, tensors, name="model.safetensors"):
    arrays = {n: x if isinstance(x, mx.array) else mx.array(x, mx.float32) for n, x in tensors.items()}
    mx.save_safetensors(str(folder / name), arrays | {f"{name}.weight": mx.zeros((4, 4), mx.bfloat16)})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{}.self_attn.{}_scale",
        "model.layers.{}.self_attn.attn.{}_scale",
        "model.layers.{}.attn.{}_scale",
        "layers.{}.self_attn.{}_proj.output_scale",
        "language_model.model.layers.{}.self_attn.{}_proj.{}_scale",
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_scales_of_every_layer_in_order(tmp_path, name, dtype):
    expected = [(0.5 + layer, 0.25) for layer in range(12)]
    tensors = {}
    for layer, pair in enumerate(expected):
        tensors |= {name.format(layer, s, s): mx.array([x]).astype(dtype) for s, x in zip("kv", pair, strict=True)}
    names = sorted(tensors)
    save(tmp_path, {n: tensors[n] for n in names[:7]}, "a.safetensors")
    save(tmp_path, {n: tensors[n] for n in names[7:]}, "b.safetensors")
    assert kv_scales.scales(tmp_path) == expected
    found = kv_scales.scheme(tmp_path)
    assert found.name == "fp8" and found.layers[1] == ("fp8:1.5", "fp8:0.25") and len(found.layers) == 12


def test_a_checkpoint_without_scales(tmp_path):
    save(tmp_path, {"model.layers.0.self_attn.k_proj.weight_scale": 1.0, "model.layers.0.mlp.k_scale": 2.0})
    assert kv_scales.scales(tmp_path) is None and kv_scales.scheme(tmp_path) is None
    assert kv_scales.scales(tmp_path / "none") is None


def test_a_sidecar_comes_first(tmp_path):
    save(tmp_path, {"layers.0.self_attn.k_scale": 1.0, "layers.0.self_attn.v_scale": 1.0})
    given = Sidecar("calibrated-3", (("trellis4", "trellis2"),))
    scheme_file.write(tmp_path / kv_scales.FILE, given)
    assert kv_scales.scheme(tmp_path) == given
    (tmp_path / kv_scales.FILE).write_text("{}")
    with pytest.raises(RotorError, match="no KV scheme"):
        kv_scales.scheme(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"layers.3.self_attn.k_scale": 1.0}, "layer 3 has a KV scale of K and none of V"),
        ({"layers.3.self_attn.v_scale": 1.0}, "layer 3 has a KV scale of V and none of K"),
        ({"layers.0.self_attn.k_scale": 0.0}, "k_scale is 0.0; a KV scale must be a finite number above 0"),
        ({"layers.0.self_attn.k_scale": -1.0}, "is -1.0"),
        ({"layers.0.self_attn.k_scale": float("nan")}, "is nan"),
        ({"layers.0.self_attn.k_scale": float("inf")}, "is inf"),
        ({"layers.0.self_attn.k_scale": [1.0, 2.0]}, r"is \[2\]; only one scale a layer"),
        ({"layers.0.self_attn.k_scale": mx.array(3)}, "a scale of type I32"),
        (
            {"layers.0.attn.k_scale": 1.0, "layers.0.self_attn.k_proj.output_scale": 2.0},
            "another scale of the same layer",
        ),
        ({"layers.0.self_attn.k_proj.v_scale": 1.0}, "is a scale of v at k_proj"),
    ],
)
def test_scales_that_are_wrong(tmp_path, tensors, says):
    save(tmp_path, tensors)
    with pytest.raises(RotorError, match=says):
        kv_scales.scales(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0{"])
def test_a_damaged_file(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(RotorError, match=r"model\.safetensors: no safetensors file"):
        kv_scales.scales(tmp_path)


def test_plain_fp8_takes_the_scales_that_came_with_the_model(tmp_path):
    layers = tuple((f"fp8:{0.5 + i}", "fp8:0.25") for i in range(3))
    model = tiny("llama")
    assert mlx_rotor.make_prompt_cache(model, "fp8")[1].codecs == ("fp8", "fp8")
    scheme_file.write(tmp_path / kv_scales.FILE, Sidecar("fp8", layers))
    kv_scales.came_from(model, tmp_path)
    caches = mlx_rotor.attach(model, "fp8").make_cache()
    assert [c.codecs for c in caches] == list(layers)
    assert report.describe(caches).startswith("layers 0-2: K fp8 (scaled), V fp8 (scaled)")
    assert mlx_rotor.make_prompt_cache(model, "k=fp8:2.0,v=fp8")[0].codecs == ("fp8:2.0", "fp8")
    scheme_file.write(tmp_path / kv_scales.FILE, Sidecar("fp8", layers[:2]))
    kv_scales.came_from(model, tmp_path)
    with pytest.raises(RotorError, match="2 layers, and this model has 3"):
        mlx_rotor.make_prompt_cache(model, "fp8")
