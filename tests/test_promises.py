"""What a newcomer adds in one place, added to a copy of the product: it is found without another line changed."""

import json

import mlx.core as mx
import pytest
from mlx_lm.models import lfm2_moe

from mlx_rotor.host.versions import digest
from scratch import ROOT, run_in, scratch

# LFM2-MoE, which mlx_lm runs and this package doesn't know: names, roles and router.
FAMILY = '''
"""LFM2's mixtures of experts: short convolutions in most layers, routed experts by sigmoid scores with a bias."""

from .architecture import Architecture, Tensor
from .router import Block, Choice, Routing, gate
from .tree import ATTENTION, ENDS, HEADS, LAYER, NORMS, UNUSED, experts

CONV, MLP = LAYER + "conv.", LAYER + "feed_forward."

ARCHITECTURE = Architecture(
    model_types=("lfm2_moe",),
    tensors=(
        *ENDS, *NORMS, *HEADS,
        Tensor("norm", "model.embedding_norm.weight"),
        Tensor("attn.o", ATTENTION + "out_proj.weight"),
        Tensor("linear.in", CONV + "in_proj.weight"),
        Tensor("linear.out", CONV + "out_proj.weight"),
        Tensor("linear.state", CONV + "conv.weight"),
        Tensor("mlp.gate", MLP + "gate_proj.weight", (MLP + "w1.weight",)),
        Tensor("mlp.up", MLP + "up_proj.weight", (MLP + "w3.weight",)),
        Tensor("mlp.down", MLP + "down_proj.weight", (MLP + "w2.weight",)),
        Tensor("router", MLP + "gate.weight"),
        Tensor("router.bias", MLP + "expert_bias", dtype="F32"),
        *experts(MLP + "switch_mlp", MLP + "experts.{expert}", ("w1", "w3", "w2")),
    ),
    drop=UNUSED,
)


def _choice(block):
    how = Routing(
        "sigmoid", block.norm_topk_prob, scaling=block.routed_scaling_factor, epsilon=1e-6, ascending=True
    )
    return Choice(how, block.top_k, block.expert_bias)


ROUTERS = (Block("lfm2_moe.Lfm2MoeSparseMoeBlock", "DIGEST", _choice, gate, dtype="x"),)
'''
CONFIG = {
    "model_type": "lfm2_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "use_expert_bias": True,
    "num_dense_layers": 1,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "rope_theta": 1e4,
    "full_attn_idxs": [1, 2],
}
KNOWN = "from mlx_rotor import models; print('lfm2_moe' in models.supported(), len(models.routers()))"
PLANNED = """
import runpy, sys
sys.argv[1:] = ARGV
runpy.run_module("mlx_rotor", run_name="__main__")
"""
ATTACHED = """
import sys
sys.path.insert(0, TESTS_HOST)
import mlx.core as mx, zoo
from expert_models import apart, logits, pack
from mlx_rotor.host.experts import attach_experts
mx.disable_compile()
model = pack(zoo.build("lfm2_moe"))
want = logits(model)
report = attach_experts(model, "fused")
print(report.describe())
assert apart(logits(model), want) < 1e-5
assert all(layer.counts.routed for layer in report.layers)
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny LFM2-MoE as its publisher stores it."""
    hidden, inner, experts = 64, 64, 4
    shapes = {"model.embed_tokens": (64, hidden), "model.embedding_norm": (hidden,)}
    for layer in range(3):
        at = f"model.layers.{layer}."
        shapes |= {at + "operator_norm": (hidden,), at + "ffn_norm": (hidden,)}
        if layer:
            sizes = {"q_proj": (64, hidden), "k_proj": (32, hidden), "v_proj": (32, hidden), "out_proj": (hidden, 64)}
            shapes |= {f"{at}self_attn.{name}": shape for name, shape in sizes.items()}
            shapes |= {f"{at}self_attn.{x}_layernorm": (16,) for x in "qk"}
            shapes[at + "feed_forward.gate"] = (experts, hidden)
        else:
            shapes |= {at + "conv.in_proj": (192, hidden), at + "conv.out_proj": (hidden, hidden)}
            shapes[at + "conv.conv"] = (hidden, 1, 3)
        for where in [f"experts.{i}." for i in range(experts)] if layer else [""]:
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                shapes[f"{at}feed_forward.{where}{name}"] = shape
    tensors = {f"{name}.weight": mx.zeros(shape, mx.bfloat16) for name, shape in shapes.items()}
    tensors |= {f"model.layers.{layer}.feed_forward.expert_bias": mx.zeros(experts) for layer in (1, 2)}
    folder = tmp_path / "lfm2"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_model_is_one_file(tmp_path, checkpoint):
    folder = scratch(tmp_path)
    supported, known = run_in(folder, KNOWN).split()
    assert supported == "False"
    code = digest(lfm2_moe.Lfm2MoeSparseMoeBlock, ())
    (folder / "mlx_rotor" / "models" / "lfm2_moe.py").write_text(FAMILY.replace("DIGEST", code))
    assert run_in(folder, KNOWN).split() == ["True", str(int(known) + 1)]

    argv = ["quantize", "--model", str(checkpoint), "--out", "o", "--policy", "uniform-4bit", "--dry-run", "--json"]
    planned = json.loads(run_in(folder, PLANNED.replace("ARGV", repr(argv))))
    assert {"attn.o", "linear.in", "linear.state", "mlp.up", "router", "expert.down"} <= {
        row["role"] for row in planned["rows"]
    }

    host = repr(str(ROOT / "tests" / "host"))
    report = run_in(folder, ATTACHED.replace("TESTS_HOST", host), MLX_ROTOR_BACKEND="reference")
    assert report.startswith("2 layers fused (2-bit/4-bit/3-bit affine") and "router" not in report


COMMAND = '''
"""`python -m mlx_rotor.greet`: print a greeting."""

from .cli.arguments import Parser


def main(argv=None):
    parser = Parser(prog="mlx_rotor greet")
    parser.add_argument("--loudly", action="store_true")
    print("HELLO" if parser.parse_args(argv).loudly else "hello")
'''


def test_a_command_is_one_file(tmp_path):
    folder = scratch(tmp_path)
    (folder / "mlx_rotor" / "greet.py").write_text(COMMAND)
    run = "import mlx_rotor.__main__ as m\nfor argv in {}:\n  try: m.main(argv)\n  except SystemExit: pass"
    printed = run_in(folder, run.format([["help"], ["greet", "--loudly"], ["help", "greet"]]))
    assert "\n  greet         print a greeting\n" in printed and "\nHELLO\n" in printed
    assert "usage: mlx_rotor greet [-h] [--loudly]" in printed
