"""`--experts` of the commands: what they say before and after a run, and what a server says of itself."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_rotor
from expert_models import expert_layers, pack
from mlx_rotor import generate
from mlx_rotor.bundled import MODEL
from mlx_rotor.cli import command
from mlx_rotor.host.expert_layers import FusedSwitchGLU
from mlx_rotor.server import running
from mlx_rotor.server.running import stock_parser

PROMPT = ("--prompt", "The sea", "--max-tokens", "4", "--temp", "0")


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model with packed experts, as a checkpoint; one layer is of other bits."""
    target = tmp_path_factory.mktemp("packed")
    for file in MODEL.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, target)
    model = pack(mlx_rotor.load()[0], (2, 2, 3), 64)
    last = expert_layers(model)[-1][1]
    for name in ("gate_proj", "up_proj", "down_proj"):
        plain = getattr(mlx_rotor.load()[0].model.layers[-1].block_sparse_moe.switch_mlp, name)
        setattr(last, name, plain.to_quantized(64, 8))
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 2}
    (target / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return target


def run(*argv):
    return command.run(generate.main, [str(a) for a in argv])


def test_fused(folder, capsys):
    assert run("--model", folder, *PROMPT, "--experts", "fused") == 0
    lines = capsys.readouterr().out.splitlines()
    groups = ["7 layers fused (2-bit/2-bit/3-bit affine, reference kernels)"]
    groups += ["1 layer fused (8-bit affine, reference kernels)"]
    assert f"Experts: {'; '.join(groups)}" in lines
    (after,) = (line for line in lines if line.startswith("Experts: ") and "calls" in line)
    fused, stock = (int(word) for word in after.split() if word.isdigit())
    # A step a token, one more that mlx_lm begins ahead, and the prompt's last token; the rest of the prompt before it.
    assert fused in (8 * 4, 8 * 5) and stock == 8
    assert not any("Warning: experts" in line for line in lines)


def test_json_and_the_same_text(folder, capsys):
    said = {}
    for mode in ("fused", "stock", "auto"):
        assert run("--model", folder, *PROMPT, "--json", "--experts", mode) == 0
        said[mode] = json.loads(capsys.readouterr().out)
    assert len({s["text"] for s in said.values()}) == 1
    experts = {mode: s["experts"] for mode, s in said.items()}
    assert [group["layers"] for group in experts["fused"]["fused"]] == [list(range(7)), [7]]
    assert experts["fused"]["left"] == experts["fused"]["own_router"] == experts["fused"]["never_fused"] == []
    assert experts["stock"]["left"] == [{"layers": list(range(8)), "why": "--experts stock"}]
    assert experts["auto"]["fused"] == [] and "no kernels run here" in experts["auto"]["left"][0]["why"]
    assert experts["fused"]["fused_calls"] > 0 == experts["auto"]["fused_calls"]


def test_fused_is_refused_where_it_cannot_be(capsys):
    """The bundled model's own experts are not packed."""
    assert run(*PROMPT, "--experts", "fused") != 0
    assert (
        "--experts fused can't be done: 8 layers left to mlx_lm (gate_proj is not quantized)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("mode", ["fused", "auto"])
def test_a_server_says_what_became_of_experts(folder, mode):
    args = stock_parser().parse_args(["--model", str(folder)])
    provider = running.provider_class(None, mode)(args)
    provider.load_default()
    layers = [layer for _, layer in expert_layers(provider.model)]
    assert {type(layer) is FusedSwitchGLU for layer in layers} == {mode == "fused"}
    assert f"; experts: {provider.expert_report.describe()}" in provider.line
    assert ("7 layers fused" if mode == "fused" else "8 layers left to mlx_lm (no kernels") in provider.line
    provider.reset()
    assert provider.expert_report is None
