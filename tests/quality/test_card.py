"""The model card: what huggingface_hub reads back, and every figure against the data it is rendered from."""

import dataclasses
import json
import re

import pytest
from huggingface_hub import ModelCard

from mlx_rotor.bundled import MODEL
from mlx_rotor.errors import RotorError
from mlx_rotor.quality import card, evaluation
from mlx_rotor.quality.card import pm
from mlx_rotor.quality.evaluation import CheckpointRow, Evaluation
from mlx_rotor.quality.metrics import Divergence, Estimate
from mlx_rotor.quality.sample import Size, bundled
from mlx_rotor.quality.streamed import Quality, SourceReference
from mlx_rotor.quant import Recipe, dry_run, policy, quantize


def quality(domain, kl, agreement=0.845, windows=16):
    divergence = Divergence(Estimate(kl, kl / 20), 7 * kl, 30 * kl, (kl,) * 4, Estimate(agreement, 0.00312))
    text = "made up"
    return Quality(
        *(domain, text, "0123456789abcdef", windows, 512),
        source=Estimate(4.9971, 0.0421),
        perplexity=Estimate(5.1234, 0.0512),
        change=Estimate(0.025275, 0.00123),
        divergence=divergence,
    )


MACHINE = {
    "machine": "abacus, 2 cores, Linux",
    "device": "cpu",
    "mlx": "0.32.4",
    "mlx_lm": "0.32.2",
    "mlx_rotor": "0.1.0",
    "python": "3.11.7",
    "date": "2026-01-02",
}
MADE = {
    "mlx_rotor": "0.1.0",
    "mlx": "0.32.4",
    "source": "MiniMaxAI/MiniMax-M2",
    "source_files": {"model-1.safetensors": {"bytes": 5, "header_sha256": "aa"}},
    "policy": {"name": "rotor-86", "description": "As good as it gets.", "sha256": "cafe" * 16},
    "fit": "best",
    "calibration": {"sequences": 96, "length": 2048, "expert_rows": {"least": 17}},
    "total_size": 86_199_123_456,
    "total_parameters": 228_689_764_864,
    "relative_error": {"expert.gate": 0.2214, "norm": 0.0},
    "plan": [
        {
            "role": "expert.gate",
            "layers": "0-61",
            "count": 62,
            "spec": {"group_size": 128, "bits": 3, "mode": "affine"},
            "dtype": "U32",
            "parameters": 228_000_000_000,
            "bytes": 86_000_000_000,
        },
        {
            "role": "norm",
            "layers": "",
            "count": 1,
            "spec": None,
            "dtype": "BF16",
            "parameters": 689_764_864,
            "bytes": 199_123_456,
        },
    ],
    "plan_sha256": "beef" * 16,
}
OWN = CheckpointRow(
    "rotor-86", 86_199_123_456, 228_689_764_864, "best", True, (quality("code", 0.0612), quality("prose", 0.141))
)
OTHER = CheckpointRow(
    "config-i", 92_871_000_000, 228_689_764_864, "best", True, (quality("code", 0.211), quality("prose", 0.36))
)
EVALUATION = Evaluation("MiniMax-M2", False, OWN, (OTHER,), MACHINE)
CARD = card.Card("org/name", "MiniMaxAI/MiniMax-M2", {"license": "mit"}, MADE, EVALUATION)


def tables(text):
    """Section title -> its table's rows of cells, head first."""
    found = {}
    for section in re.split(r"^##? ", text, flags=re.M)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        found[section.splitlines()[0]] = [[c.strip() for c in x.strip("|").split("|")] for x in lines if "---" not in x]
    return found


def test_the_hub_reads_its_front_matter():
    read = ModelCard(CARD.markdown())
    data = read.data.to_dict()
    assert data == {
        "license": "mit",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": "MiniMaxAI/MiniMax-M2",
        "base_model_relation": "quantized",
        "tags": ["mlx", "quantized", "mlx_rotor"],
    }
    assert read.text.lstrip().startswith("# org/name\n")


def test_sizes_are_exact_in_both_units():
    text = CARD.markdown()
    assert "86.199 GB = 80.279 GiB (86,199,123,456 bytes of tensors)" in text
    assert "| 3.0154, scales and biases included |" in text  # 86,199,123,456 × 8 / 228,689,764,864
    assert "| 228,689,764,864 |" in text


def test_every_figure_is_that_of_the_data():
    found = tables(CARD.markdown())
    head, code, prose = found["Quality against the source"]
    assert head[2] == "KL, nats a token" and code[:2] == ["code (made up)", "8,192"]
    assert code[2:] == ["0.0612 ± 0.0031", "0.428", "84.50 ± 0.31 %", "5.123 ± 0.051", "4.997 ± 0.042", "2.53 ± 0.12 %"]
    assert prose[2] == "0.1410 ± 0.0070"
    _, own, other = found["Other policies by the same tool"]
    assert own[:7] == ["**rotor-86, this one**", "best", "yes", "86.199", "80.279", "3.0154", "0.0612 ± 0.0031"]
    assert other[:7] == ["config-i", "best", "yes", "92.871", "86.493", "3.2488", "0.211 ± 0.011"]
    stored = found["What is stored how"]
    assert stored[1] == ["expert.gate", "0-61", "62", "3", "128", "affine", "86,000,000,000", "99.8%"]
    assert stored[2] == ["norm", "", "1", "bf16", "", "", "199,123,456", "0.2%"]
    text = CARD.markdown()
    for fact in ("sequences 96, length 2,048", "expert.gate 22.14%", "cafe" * 16, "beef" * 16, "abacus", "2026-01-02"):
        assert fact in text, fact
    assert "further than 512 tokens" in text and "Speed" not in text.split("## Not measured")[0]


def test_it_says_what_was_not_measured():
    text = dataclasses.replace(CARD, evaluation=None).markdown()
    assert text.count("Not measured.") == 2 and "±" not in text
    whole = dataclasses.replace(CARD, evaluation=dataclasses.replace(EVALUATION, whole=True)).markdown()
    assert "ran in mlx_lm" in whole and "layer by layer" in CARD.markdown() and "layer by layer" not in whole
    alone = dataclasses.replace(CARD, evaluation=dataclasses.replace(EVALUATION, others=()))
    assert alone.markdown().count("Not measured.") == 1


def test_the_same_data_give_the_same_card_also_through_json():
    again = Evaluation.from_dict(json.loads(json.dumps(EVALUATION.to_dict())))
    assert again == EVALUATION
    assert dataclasses.replace(CARD, evaluation=again).markdown() == CARD.markdown()
    with pytest.raises(RotorError, match="damaged"):
        Evaluation.from_dict({"source": "x", "whole": False, "row": {}, "others": [], "machine": {}})


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [(0.0612, 0.00306, "0.0612 ± 0.0031"), (5.0, 0.5, "5.00 ± 0.50"), (1234.5, 22.0, "1234 ± 22"), (0.5, None, "0.5")],
)
def test_errors_have_two_digits(value, se, text):
    assert pm(Estimate(value, se)) == text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bundled model quantized, measured on a little text, compared with another policy, and its card written."""
    root = tmp_path_factory.mktemp("card")
    out, said = root / "out", []
    made = quantize(MODEL, out, Recipe(policy.load("uniform-4bit"), fit="fast"))
    with SourceReference(MODEL, bundled(), Size(2, 16, 0, (), (), 0)) as reference:
        plan, _ = dry_run(MODEL, Recipe(policy.load("uniform-2bit")))
        others = evaluation.compare_policies(reference, [plan], fit="fast", folder=root, progress=said.append)
        found = evaluation.evaluate_checkpoint(reference, out, made.plan, fit="fast", calibrated=False, others=others)
    card.write(out, card.card_of(out, found, source=MODEL))
    return out, found, said


def test_comparison_rows_are_made_and_deleted(checkpoint):
    out, found, said = checkpoint
    assert [row.name for row in (found.row, *found.others)] == ["uniform-4bit", "uniform-2bit"]
    assert found.row.nbytes > found.others[0].nbytes
    for own, other in zip(found.row.quality, found.others[0].quality, strict=True):
        assert own.divergence.mean.value < other.divergence.mean.value
    assert said == ["uniform-2bit: quantizing", "uniform-2bit: measuring"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_folder_holds_its_card_and_the_data_it_is_made_from(checkpoint):
    out, found, _ = checkpoint
    made = json.loads((out / "mlx_rotor.json").read_text())
    assert Evaluation.from_dict(made["evaluation"]) == found and made["policy"]["name"] == "uniform-4bit"
    text = (out / "README.md").read_text()
    read = ModelCard(text)
    assert read.data.license == "apache-2.0" and read.data.base_model is None
    assert f"{made['total_size'] / 1e9:.6f} GB" in text
    assert card.card_of(out, source=MODEL).markdown() == text
    assert pm(found.row.quality[0].divergence.mean) in text


def test_too_little_disk_is_said_before_anything_is_made(monkeypatch, tmp_path):
    class Full:
        free = 1000

    with SourceReference(MODEL, bundled()[:1], Size(1, 8, 0, (), (), 0)) as reference:
        monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda place: Full)
        with pytest.raises(RotorError, match=r"uniform-8bit needs .* MB for a while"):
            plans = [dry_run(MODEL, Recipe(policy.load(f"uniform-{n}bit")))[0] for n in (2, 8, 3)]
            evaluation.compare_policies(reference, plans, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_its_data_is_an_error(tmp_path):
    with pytest.raises(RotorError, match="a card needs"):
        card.card_of(tmp_path)
    (tmp_path / "mlx_rotor.json").write_text('{"source": "x"}')
    with pytest.raises(RotorError, match="has no source_files"):
        card.card_of(tmp_path)


def test_a_card_says_who_reads_formats_of_our_own():
    plain = CARD.markdown()
    assert "stock `mlx_lm` reads them" in plain and "--trust-remote-code" not in plain
    row = {**MADE["plan"][0], "spec": {"group_size": 256, "bits": 3, "mode": "lloyd"}}
    text = dataclasses.replace(CARD, made={**MADE, "plan": [row, *MADE["plan"][1:]]}).markdown()
    assert "codebooks are lengthened" in text and "codebooks are lengthened" not in plain
    assert "stock `mlx_lm`" not in text and "(lloyd)" in text and "mlx-swift-lm does not" in text
    assert "mlx_lm.generate --model" in text and " --trust-remote-code --prompt" in text
