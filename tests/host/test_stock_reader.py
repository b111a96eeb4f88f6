"""What is expected of a checkpoint, against mlx_lm's own loader, for every architecture it has."""

import contextlib
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

import zoo
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import StockReader, stored_spec
from zoo_configs import config

# mlx_lm can't quantize these, or not at these sizes; bitnet's layers are packed in their own way.
UNPACKED = {"afm7", "bitnet", "granite", "granitemoe", "prism_hadamard_qwen35"}
NAMES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
DTYPES = {dtype: name for name, dtype in NAMES.items()}


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_every_architecture_is_read_as_mlx_lm_reads_it(packed, tmp_path):
    read = 0
    for model_type in zoo.architectures():
        if model_type in zoo.EXCLUDED or model_type == "bitnet" or (packed and model_type in UNPACKED):
            continue
        model, settings = zoo.build(model_type), {**config(model_type), "model_type": model_type}
        if packed:
            with contextlib.redirect_stdout(None):
                model, settings = quantize_model(model, settings, 32, 4)
        weights = dict(tree_flatten(model.parameters()))
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        loaded, _ = load_model(folder, lazy=True)

        reader = StockReader(settings)
        header = {name: (DTYPES[array.dtype], array.shape) for name, array in weights.items()}
        kept = reader.sanitized(header)
        if packed:
            assert reader.quantize(settings["quantization"], kept) == {}, model_type
        expected = {name: tuple(array.shape) for name, array in tree_flatten(loaded.parameters())}
        assert reader.parameters() == expected, model_type
        assert {name: tuple(array.shape) for name, array in kept.items()} == expected, model_type
        read += 1
    assert read > 100


def test_packed_tensors_say_how_they_are_packed():
    w = mx.random.normal((2, 8, 128))
    for bits, group, mode in (
        (2, 32, "affine"),
        (3, 128, "affine"),
        (4, 16, "nvfp4"),
        (4, 32, "mxfp4"),
        (8, 32, "mxfp8"),
    ):
        codes, scales, *_ = mx.quantize(w, group, bits, mode=mode)
        assert stored_spec(128, codes, scales) == (bits, group, mode)


def test_a_sanitize_that_fails_is_an_error():
    settings = {**config("mixtral"), "model_type": "mixtral"}
    with pytest.raises(RotorError, match="mixtral"):
        StockReader({**settings, "hidden_size": "wide"})
    reader = StockReader(settings)
    first = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    with pytest.raises(RotorError, match="sanitize fails with KeyError"):
        reader.sanitized({first: ("F32", (64, 64))})
