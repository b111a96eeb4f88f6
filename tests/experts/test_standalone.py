"""The file that a checkpoint carries for mlx_lm alone, run where mlx_rotor can't be imported, and where it can."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from encoded_models import CONFIGS, MIXED, distance, without, write

from mlx_rotor.errors import RotorError
from mlx_rotor.experts import formats, standalone

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [[5, 3, 200, 17, 90, 1], list(range(3, 9))]  # fewer chosen experts in a row than there are, and more
RUN = """
import sys
from pathlib import Path
if {blocked}: sys.modules["mlx_rotor"] = None
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import utils
for path in {paths!r}:
    model, config = utils.load_model(Path(path), trust_remote_code=True)
    logits = {{"all": model(mx.array({tokens})), "one": model(mx.array([[7]]))}}
    mx.save_safetensors(path + "/logits.safetensors", logits)
    print(type(model.model.embed_tokens).__module__)
{more}
"""
GENERATE = """
sys.argv = ["mlx_lm.generate", "--model", {path!r}, "--trust-remote-code", "--prompt", "def f(", "--max-tokens", "4"]
from mlx_lm.generate import main
main()
assert not any(name.startswith("mlx_rotor") and module for name, module in sys.modules.items())
"""


def checkpoint(folder, *arguments, **named):
    """As `write`, with the file."""
    reference = write(folder, *arguments, fields=standalone.FIELDS, **named)
    (folder / standalone.NAME).write_text(standalone.text(json.loads((folder / "config.json").read_text())))
    return reference


def run(paths, *, blocked, more=""):
    text = RUN.format(blocked=blocked, paths=[str(p) for p in paths], tokens=TOKENS, more=more)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)


def same_logits(folder, reference):
    found = mx.load(str(folder / "logits.safetensors"))
    assert distance(found["all"], reference(mx.array(TOKENS))) < 1e-4
    assert distance(found["one"], reference(mx.array([[7]]))) < 1e-4


def test_mlx_lm_alone_has_the_logits_of_the_expanded_weights(tmp_path):
    references = {tmp_path / name: checkpoint(tmp_path / name, name) for name in CONFIGS}
    whole = tmp_path / "whole"
    references[whole] = checkpoint(whole, tokenizer=True, vocab_size=2048)
    done = run(references, blocked=True, more=GENERATE.format(path=str(whole)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[: len(references)] == ["custom_model"] * len(references)
    assert "==========" in done.stdout and "Generation: 4 tokens" in done.stdout
    # Once for each time that mlx_lm loads a model.
    assert done.stderr.count("for fast ones: pip install mlx_rotor") == len(references) + 1
    for folder, reference in references.items():
        same_logits(folder, reference)


def test_with_mlx_rotor_the_file_uses_its_layers(tmp_path):
    reference = checkpoint(tmp_path)
    done = run([tmp_path], blocked=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mlx_rotor.experts.layers"]
    assert "pip install" not in done.stderr
    same_logits(tmp_path, reference)


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path):
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "mlx_rotor").mkdir()
    path = [str(tmp_path), *(p for p in sys.path if Path(p).resolve() != ROOT and p)]
    text = f"import sys; sys.path[:] = {path!r}\n" + RUN
    text = text.format(blocked=False, paths=[str(tmp_path / "model")], tokens=TOKENS, more="")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stdout.split() == ["custom_model"], done.stderr


def loosely(path):
    return f"""
model, _ = utils.load_model(Path({str(path)!r}), strict=False, trust_remote_code=True)
model(mx.array([[1]]))
"""


def test_mlx_lm_alone_does_not_compute_with_a_missing_tensor(tmp_path):
    checkpoint(tmp_path, num_hidden_layers=1)
    path = "model.layers.0.self_attn.q_proj"
    without(tmp_path, f"{path}.codebooks")
    done = run([], blocked=True, more=loosely(tmp_path))
    assert f"ValueError: {path}: a tensor of its lloyd weights is in none" in done.stderr


def test_the_file_is_short_and_formatted(tmp_path):
    forms = [formats.get(mode, *(known[0] for known in formats.known(mode))) for mode in formats.ours()]
    specs = {f.mode: {"bits": f.bits, "group_size": f.group_size, "mode": f.mode} for f in forms}
    text = standalone.text({"quantization": specs})
    assert len(text.splitlines()) < 180 and "{{" not in text
    (tmp_path / standalone.NAME).write_text(text)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, str(tmp_path / standalone.NAME)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_file_has_the_decoders_of_its_checkpoints_formats_and_no_others():
    assert set(formats.ours()) == {spec[0] for spec in MIXED.values()} - {"affine"}
    for mode in formats.ours():
        bits, groups = formats.known(mode)
        spec = {"mode": mode, "bits": bits[0], "group_size": groups[0]}
        text = standalone.text({"quantization": {"a": spec}})
        assert [other for other in formats.ours() if f"decode_{other}" in text] == [mode]


@pytest.mark.parametrize("config", [{}, {"quantization": {"bits": 4, "group_size": 64, "lm_head": False}}])
def test_a_checkpoint_that_mlx_lm_reads_gets_no_file(config):
    assert standalone.modes(config) == set()
    with pytest.raises(RotorError, match="mlx_lm loads it without"):
        standalone.text(config)
