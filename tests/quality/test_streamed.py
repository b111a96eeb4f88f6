"""Quality layer by layer: equal to what `compare` finds with whole models in memory."""

import gc
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert

import mlx_rotor
from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import parameters, skeleton
from mlx_rotor.quality.compare import compare
from mlx_rotor.quality.sample import Domain, Size, bundled
from mlx_rotor.quality.streamed import SourceReference

SIZE = Size(3, 32, needles=0, lengths=(), depths=(), chats=0, chunk=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The bundled model in float32 and MLX's naming, so that both ways of running it start from the same numbers."""
    folder = tmp_path_factory.mktemp("streamed") / "source"
    folder.mkdir()
    model, _ = mlx_rotor.load()
    config = json.loads((MODEL / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def mixed(path, module):
    if path.endswith("gate"):
        return False
    kinds = {"o_proj": ("mxfp4", 4, 32), "up_proj": ("nvfp4", 4, 16), "gate_proj": ("affine", 3, 64)}
    found = kinds.get(path.rsplit(".", 1)[-1])
    return {"mode": found[0], "bits": found[1], "group_size": found[2]} if found else True


@pytest.fixture(scope="module")
def quantized(source):
    out = source.parent / "out"
    convert(str(source), str(out), quantize=True, q_bits=2, q_group_size=32, quant_predicate=mixed, dtype="float32")
    return out


@pytest.fixture(scope="module")
def found(source, quantized):
    said = []
    with SourceReference(source, bundled(), SIZE, batch=70, progress=lambda *step: said.append(step)) as reference:
        return reference.compare(quantized), reference.compare(source), said


def same(here, there, rtol=2e-4):
    """Two qualities, or a quality and a row of a comparison."""
    for a, b in (
        (here.perplexity, there.perplexity),
        (here.change, there.change),
        (here.divergence.mean, there.divergence.mean),
    ):
        np.testing.assert_allclose((a.value, a.se), (b.value, b.se), rtol=rtol)
    assert here.divergence.agreement == there.divergence.agreement
    np.testing.assert_allclose(here.divergence.p99, there.divergence.p99, rtol=rtol)


def test_it_is_what_compare_finds(found, source, quantized):
    text, quality = bundled()[1], found[0][1]
    report = compare([f"q={quantized}"], ["exact"], against=str(source), text=text.text, size=SIZE)
    assert (quality.domain, quality.windows, quality.window, quality.tokens) == (text.name, 3, 32, 96)
    same(quality, report.rows[0])
    assert quality.divergence.mean.value > 0.05  # two bits do cost something


def test_whole_models_give_the_same(found, source, quantized):
    with SourceReference(source, bundled(), SIZE, whole=True) as reference:
        for here, there in zip(found[0], reference.compare(quantized), strict=True):
            same(here, there)
            assert (here.domain, here.text_digest) == (there.domain, there.text_digest)


def test_memory_is_that_of_a_layers_dense_part_and_an_expert(tmp_path):
    config = json.loads((MODEL / "config.json").read_text()) | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_local_experts": 24,
        "attn_type_list": [1, 1, 1],
        "torch_dtype": "float32",
    }
    del config["quantization_config"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, source)
    weights = {name: 0.05 * mx.random.normal(shape) for name, shape in parameters(skeleton(config)).items()}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    size = sum(w.nbytes for w in weights.values())
    del weights
    convert(str(source), str(tmp_path / "out"), quantize=True, q_bits=8, q_group_size=64, dtype="float32")
    mx.clear_cache()
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with SourceReference(source, bundled()[:1], Size(1, 16, 0, (), (), 0)) as reference:
        reference.compare(tmp_path / "out")
    assert size > 120e6 and mx.get_peak_memory() - before < 0.1 * size


def test_a_model_against_itself_loses_nothing(found):
    for quality in found[1]:
        assert quality.divergence.mean.value < 1e-9 and quality.divergence.agreement.value == 1
        assert quality.change.value == 0 and quality.perplexity == quality.source


def test_progress_says_what_runs(found, quantized):
    assert ("source", 0, 8) in found[2] and (quantized.name, 8, 8) in found[2]


def test_the_fp8_source_is_read_too():
    with SourceReference(MODEL, bundled()[:1], Size(1, 64, 0, (), (), 0)) as reference:
        found = reference.compare(MODEL)
    assert found[0].divergence.mean.value == 0 and 2 < found[0].source.value < 40


def test_mistakes_are_named(source, quantized, tmp_path):
    lost = tmp_path / "lost"
    shutil.copytree(quantized, lost)
    weights = mx.load(str(lost / "model.safetensors"))
    mx.eval(weights)
    del weights["model.norm.weight"]
    mx.save_safetensors(str(lost / "model.safetensors"), weights)
    with (
        SourceReference(source, bundled()[:1], Size(1, 16, 0, (), (), 0)) as reference,
        pytest.raises(RotorError, match=r"model.norm.weight is not there; .*--check"),
    ):
        reference.compare(lost)
    with pytest.raises(RotorError, match="no text"):
        SourceReference(source, [])
    with pytest.raises(RotorError, match="has 2 tokens"):
        SourceReference(source, [Domain("short", "a b", "nothing")], SIZE)
    other = tmp_path / "other"
    shutil.copytree(quantized, other)
    table = json.loads((other / "tokenizer.json").read_text())
    table["model"]["merges"] = table["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(table))
    with (
        SourceReference(source, bundled()[:1], Size(1, 16, 0, (), (), 0)) as reference,
        pytest.raises(RotorError, match="tokenizer is not that of"),
    ):
        reference.compare(other)
