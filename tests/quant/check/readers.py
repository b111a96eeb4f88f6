"""A tiny checkpoint, stock mlx_lm's verdict on a folder, and a small model of mlx-swift-lm's rules."""

import contextlib
import importlib
import json
import shutil

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm import convert

from mlx_rotor.bundled import MODEL

MODES = {"affine", "mxfp4", "mxfp8", "nvfp4"}
MINIMAX = json.loads((MODEL / "config.json").read_text()) | {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 4,
    "attn_type_list": [1, 1],
    "torch_dtype": "float32",
}
MINIMAX.pop("quantization_config")


def write_source(folder, config=MINIMAX, module="minimax"):
    """A random float32 checkpoint in MLX's naming with the bundled tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    arch = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(1)
    weights = {
        k: mx.random.normal(v.shape) * 0.05
        for k, v in tree_flatten(arch.Model(arch.ModelArgs.from_dict(config)).parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def stock_reads(folder):
    """None where stock mlx_lm loads the folder and runs it on a few tokens, else what it says."""
    try:
        with contextlib.redirect_stdout(None):
            model, tokenizer = mlx_lm.load(str(folder))
        for path, module in model.named_modules():
            weight = module.get("weight")
            if not hasattr(module, "bits") and weight is not None and not mx.issubdtype(weight.dtype, mx.floating):
                return f"{path} runs on {weight.dtype}"
        if any(v.dtype != mx.float32 for _, v in tree_flatten(model.parameters())):
            # The CPU gathers no experts in 16 bits; integers stay what they are.
            model.set_dtype(mx.float32)
        logits = model(mx.array([tokenizer.encode("def f(x):")]))
        mx.eval(logits)
        return None if logits.dtype == mx.float32 else f"logits in {logits.dtype}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def swift_reads(folder, parameters):
    """None where mlx-swift-lm's loader takes the folder, else what stops it.

    parameters: name -> shape of the unquantized model, in the naming that its sanitize leaves as it is.
    """
    config = json.loads((folder / "config.json").read_text())
    if "quantization" in config:
        try:
            default, layers = _decoded(config["quantization"])
        except (KeyError, TypeError, ValueError) as e:
            return f"config.json: {e}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            return f"no {name}"
    weights = {}
    for file in folder.rglob("*.safetensors"):
        try:
            weights |= mx.load(str(file))
            mx.eval(weights)
        except RuntimeError as e:
            return str(e)
    expected = {name: tuple(shape) for name, shape in parameters.items()}
    for name, shape in parameters.items():
        path = name.removesuffix(".weight")
        if "quantization" not in config or f"{path}.scales" not in weights:
            continue
        spec = layers.get(path, default)
        if spec is None:
            continue
        bits, group, mode = spec
        expected[name] = (*shape[:-1], shape[-1] * bits // 32)
        expected[f"{path}.scales"] = (*shape[:-1], shape[-1] // group)
        if mode == "affine":
            expected[f"{path}.biases"] = expected[f"{path}.scales"]
    found = {name: tuple(array.shape) for name, array in weights.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    return f"does not fit: {wrong[:3]}" if wrong else None


def _decoded(section):
    def spec(x):
        if not isinstance(x, dict):
            raise TypeError(f"{x!r} is no object")
        if type(x["bits"]) is not int or type(x["group_size"]) is not int or x.get("mode", "affine") not in MODES:
            raise ValueError(str(x))
        return x["bits"], x["group_size"], x.get("mode", "affine")

    layers = {}
    for key, value in section.items():
        if key in ("group_size", "bits", "mode", "quant_method", "linear_class", "quantization_mode"):
            continue
        if isinstance(value, bool):
            layers |= {} if value else {key: None}
        else:
            layers[key] = spec(value)
    return spec(section), layers


def mixed(path, module):
    """A predicate with affine, MX and unquantized modules; affine of the default where it says True."""
    if path.endswith("gate"):
        return False
    if "down_proj" in path:
        return {"bits": 3, "group_size": 32, "mode": "affine"}
    if "embed" in path:
        return {"bits": 8, "group_size": 32, "mode": "mxfp8"}
    return {"bits": 4, "group_size": 32, "mode": "mxfp4"} if "o_proj" in path else True


def stock(source, out, **options):
    """`out`, as stock mlx_lm quantizes `source`."""
    with contextlib.redirect_stdout(None):
        convert(str(source), str(out), quantize=True, dtype="float32", **options)
    return out
