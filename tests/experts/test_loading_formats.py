"""Checkpoints in formats MLX does not have, through mlx_lm's own loaders."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from encoded_models import AFFINE, CONFIGS, MIXED, distance, without, write
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models import switch_layers

import mlx_rotor
from mlx_rotor.errors import RotorError
from mlx_rotor.experts import formats, layers, standalone
from mlx_rotor.experts.layers import PackedLayer
from mlx_rotor.host import formats as wrapping

TOKENS = mx.array([[5, 3, 200, 17, 90, 1]])
MANY = mx.random.randint(0, 512, (1, 40), key=mx.random.key(0))  # enough for mlx_lm to sort rows by expert
GATE = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"


@pytest.fixture(autouse=True)
def in_place():
    yield
    wrapping.install()


def same_logits(model, reference, tolerance=1e-4):
    for tokens in (TOKENS, MANY):
        assert distance(model(tokens), reference(tokens)) < tolerance


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def packed_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLayer)}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_model_of_mixed_formats_has_the_logits_of_its_expanded_weights(tmp_path, model_type):
    reference = write(tmp_path, model_type)
    model, config = utils.load_model(tmp_path)
    made = {path: (m.mode, m.bits, m.group_size) for path, m in packed_layers(model).items()}
    named = {p: (s["mode"], s["bits"], s["group_size"]) for p, s in config["quantization"].items() if type(s) is dict}
    assert made == {path: spec for path, spec in named.items() if spec[0] != "affine"}
    assert {spec[0] for spec in made.values()} == set(formats.ours())
    same_logits(model, reference)


@pytest.mark.parametrize(
    "spec",
    [
        (mode, bits, group)
        for mode in formats.ours()
        for bits in formats.known(mode)[0]
        for group in formats.known(mode)[1]
    ],
    ids=str,
)
def test_every_format_loads_in_every_kind_of_layer(tmp_path, spec):
    reference = write(tmp_path, "minimax", dict.fromkeys(MIXED, spec), num_hidden_layers=1, vocab_size=64)
    model, _ = utils.load_model(tmp_path)
    kinds = {type(layer) for layer in packed_layers(model).values()}
    assert kinds == {layers.RotorLinear, layers.RotorEmbedding, layers.RotorSwitchLinear}
    assert distance(model(TOKENS % 64), reference(TOKENS % 64)) < 1e-4


def test_mlx_lms_load_and_ours_give_the_same_model(tmp_path):
    reference = write(tmp_path, tokenizer=True, vocab_size=2048)
    for load in (mlx_lm.load, mlx_rotor.load):
        model, tokenizer = load(str(tmp_path))
        same_logits(model, reference)
    text = mlx_lm.generate(model, tokenizer, "def f(", max_tokens=4)
    assert text == mlx_lm.generate(reference, tokenizer, "def f(", max_tokens=4)


def test_bfloat16_models_stay_bfloat16(tmp_path):
    write(tmp_path, dtype=mx.bfloat16)
    model, _ = utils.load_model(tmp_path)
    layer = model.layers[0]
    hidden = model.model.embed_tokens(TOKENS)
    assert hidden.dtype == mx.bfloat16
    attended = layer.self_attn(layer.input_layernorm(hidden))
    assert attended.dtype == mx.bfloat16
    assert layer.block_sparse_moe.switch_mlp(hidden, mx.zeros((1, 6, 2), mx.uint32)).dtype == mx.bfloat16
    assert model.lm_head(hidden).dtype == mx.bfloat16


def test_a_models_default_mode_may_be_ours():
    model = nn.Sequential(nn.Linear(256, 8), nn.RMSNorm(8), nn.Linear(8, 8))
    nn.quantize(model, 256, 3, mode="lloyd", class_predicate=lambda path, m: path == "layers.0")
    assert [type(layer) for layer in model.layers] == [layers.RotorLinear, nn.RMSNorm, nn.Linear]
    model = nn.Sequential(nn.Linear(256, 8))
    nn.quantize(model, 32, 8, mode="q8")
    assert type(model.layers[0]) is layers.RotorLinear


def test_other_modes_are_left_to_mlx():
    def model():
        mx.random.seed(3)
        linear, experts = nn.Linear(64, 8), switch_layers.SwitchLinear(64, 8, 2)
        return nn.Sequential(linear, nn.Embedding(8, 64), experts, nn.RMSNorm(8))

    def predicate(path, module):
        return {"layers.0": {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "layers.1": True}.get(path, False)

    for arguments in ({"group_size": 64, "bits": 3}, {"group_size": 32, "bits": 8, "class_predicate": predicate}):
        ours, stock = model(), model()
        nn.quantize(ours, **arguments)
        wrapping.stock_quantize(stock, **arguments)
        assert [type(a) for a in ours.layers] == [type(a) for a in stock.layers]
        flat = dict(tree_flatten(stock.parameters()))
        assert all(mx.array_equal(value, flat.pop(name)) for name, value in tree_flatten(ours.parameters()))
        assert not flat


def test_a_missing_tensor_is_an_error_however_the_model_is_loaded(tmp_path):
    write(tmp_path)
    without(tmp_path, f"{GATE}.codebooks")
    with pytest.raises(ValueError, match=f"Missing 1 parameters: \n{GATE}.codebooks"):
        utils.load_model(tmp_path)
    # Every file is there, so that nothing can be missing on purpose.
    with pytest.raises(ValueError, match=f"Missing 1 parameters: \n{GATE}.codebooks"):
        utils.load_model(tmp_path, lazy=True, strict=False)
    with pytest.raises(RotorError, match=rf"can't load .*: Missing 1 parameters: {GATE}.codebooks"):
        mlx_rotor.load(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.biases", "lm_head.weight"])
def test_a_missing_tensor_of_mlxs_own_is_an_error_in_a_loose_load_too(tmp_path, name):
    write(tmp_path)
    without(tmp_path, name)
    with pytest.raises(ValueError, match=name):
        utils.load_model(tmp_path, strict=False)


def test_a_machine_with_a_part_of_the_files_loads_it_and_cannot_use_the_rest(tmp_path):
    write(tmp_path)
    weights = {f"{GATE}.codebooks": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    without(tmp_path, f"{GATE}.codebooks")
    model, _ = utils.load_model(tmp_path, lazy=True, strict=False)
    with pytest.raises(RotorError, match=f"^{GATE}: the checkpoint has no codebooks"):
        model(TOKENS)
    with pytest.raises(RotorError, match=f"lacks {GATE}.codebooks;"):
        layers.check(model)


def test_loose_loads_of_other_checkpoints_stay_loose(tmp_path):
    write(tmp_path, "mixtral", {"k_proj": AFFINE}, num_hidden_layers=1)
    without(tmp_path, "model.norm.weight")
    utils.load_model(tmp_path, strict=False)


def quantization(folder, path, **changes):
    section = json.loads((folder / "config.json").read_text())["quantization"]
    spec = {**section[path], **changes} if path in section else changes
    edit(folder, quantization={**section, path: {k: v for k, v in spec.items() if v is not None}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "lloyd9"}, "Invalid quantization mode 'lloyd9'"),
        ({"bits": 5}, f"^{GATE}: lloyd: bits = 5 is not supported; bits can be 2, 3, 4"),
        ({"group_size": 100}, f"^{GATE}: lloyd: group_size = 100 is not supported"),
        ({"group_size": None}, f"^{GATE}: config.json says no group_size for its lloyd weights"),
        ({"bits": None, "group_size": None}, f"^{GATE}: config.json says no bits and no group_size"),
        ({"group_size": 128}, f"(?s)Expected shape .* for parameter {GATE}.codebooks"),
        ({"bits": 3}, f"(?s)Expected shape .* for parameter {GATE}"),
        ({"mode": "q8", "bits": 8, "group_size": 32}, f"(?s)not in model: \n{GATE}.codebooks"),
    ],
    ids=str,
)
def test_a_wrong_config_is_an_error(tmp_path, changes, said):
    write(tmp_path)
    quantization(tmp_path, GATE, **changes)
    with pytest.raises((RotorError, ValueError), match=said):
        utils.load_model(tmp_path)


def test_modules_that_cannot_be_packed_are_named(tmp_path):
    write(tmp_path, num_hidden_layers=1)
    quantization(tmp_path, "model.norm", mode="q8", bits=8, group_size=32)
    with pytest.raises(RotorError, match=r"^model\.norm: RMSNorm has no form with q8 weights"):
        utils.load_model(tmp_path)


def test_a_checkpoint_with_our_model_file_needs_no_trust(tmp_path):
    reference = write(tmp_path, fields=standalone.FIELDS)  # the file itself isn't even there
    model, config = utils.load_model(tmp_path)
    assert {name: config[name] for name in standalone.FIELDS} == standalone.FIELDS  # for who saves it again
    assert "model_file" not in utils.load_config(tmp_path)
    same_logits(model, reference)
    assert packed_layers(model)


@pytest.mark.parametrize(
    "fields", [{"model_file": "other.py", standalone.VERSION_KEY: 1}, {"model_file": standalone.NAME}]
)
def test_anothers_model_file_still_needs_trust(tmp_path, fields):
    write(tmp_path, fields=fields)
    with pytest.raises(ValueError, match="Pass trust_remote_code=True"):
        utils.load_model(tmp_path)


def test_a_model_that_is_saved_again_needs_no_mlx_rotor_either(tmp_path):
    reference = write(tmp_path / "first", tokenizer=True, vocab_size=2048, fields=standalone.FIELDS)
    (tmp_path / "first" / standalone.NAME).write_text("text")
    model, tokenizer, config = mlx_lm.load(str(tmp_path / "first"), return_config=True)
    utils.save(tmp_path / "second", str(tmp_path / "first"), model, tokenizer, config, donate_model=False)
    same_logits(utils.load_model(tmp_path / "second")[0], reference)
    kept = json.loads((tmp_path / "second" / "config.json").read_text())
    assert {name: kept[name] for name in standalone.FIELDS} == standalone.FIELDS
    assert (tmp_path / "second" / standalone.NAME).read_text() == "text"


def test_a_later_version_of_the_formats_is_refused(tmp_path):
    write(tmp_path, fields={**standalone.FIELDS, standalone.VERSION_KEY: 2})
    with pytest.raises(RotorError, match="mlx_rotor_format is 2, this mlx_rotor reads 1; run: pip install -U"):
        utils.load_model(tmp_path)


def test_uninstalling_gives_everything_back(tmp_path):
    reference = write(tmp_path, fields=standalone.FIELDS)
    model, _ = utils.load_model(tmp_path)
    wrapping.uninstall()
    assert not wrapping.installed() and wrapping.FINDER not in sys.meta_path
    assert nn.quantize is wrapping.stock_quantize
    assert not any(hasattr(getattr(utils, name), "_rotor_stock") for name in wrapping.WRAPPERS)
    with pytest.raises(ValueError, match="trust_remote_code"):
        utils.load_model(tmp_path)
    edit(tmp_path, model_file=None)
    with pytest.raises(ValueError, match="Invalid quantization mode"):
        utils.load_model(tmp_path)
    same_logits(model, reference)
    wrapping.install()
    wrapping.install()
    same_logits(utils.load_model(tmp_path)[0], reference)
    wrapping.uninstall()
    assert not hasattr(utils.load_model, "_rotor_stock")


CHECK = """
import sys, time
{imports}
assert ("mlx_lm" in sys.modules) == {loaded}
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import load
model, tokenizer = load({path!r})
print(type(model.lm_head).__name__, model.lm_head.name)
assert "def load_model" in sys.modules["mlx_lm.utils"].__spec__.loader.get_source("mlx_lm.utils")
"""


@pytest.mark.parametrize(
    ("imports", "loaded"),
    [("import mlx_rotor", False), ("import mlx_lm.utils, mlx_lm; import mlx_rotor", True)],
    ids=["rotor first", "mlx_lm first"],
)
def test_the_order_of_imports_does_not_matter(tmp_path, imports, loaded):
    write(tmp_path, tokenizer=True, vocab_size=2048, fields=standalone.FIELDS, num_hidden_layers=1)
    text = CHECK.format(imports=imports, loaded=loaded, path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["RotorLinear", "lm_head"], done.stderr


IMPORT = """
import sys, time
start = time.process_time()
import mlx_rotor
spent = time.process_time() - start
print(spent < 0.2, sorted({"mlx_lm", "transformers", "mlx_rotor.experts", "mlx_rotor.kernels"} & set(sys.modules)))
"""


def test_the_package_imports_fast_and_without_mlx_lm():
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True) for _ in range(3)]
    assert "True []" in {run.stdout.strip() for run in runs}, runs
