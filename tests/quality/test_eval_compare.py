"""Whole comparisons of tiny random models, against the same figures worked out from their logits."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_rotor
from grids import thinned
from mlx_rotor.bundled import held_out_text
from mlx_rotor.errors import RotorError
from mlx_rotor.quality import compare as module
from mlx_rotor.quality import score
from mlx_rotor.quality import score as score_module
from mlx_rotor.quality.compare import compare
from mlx_rotor.quality.footprint import MeasuredCaches
from mlx_rotor.quality.model import EvaluatedModel, NamedModel
from mlx_rotor.quality.sample import Size, draw, draw_windows, encode
from mlx_rotor.quality.score import FLOAT32_LIMIT

SIZE = Size(windows=4, window=224, needles=2, lengths=(224,), depths=(0.1, 0.9), chats=0, greedy=2)
UNPROTECTED = {"sinks": 0, "ring": 32, "protect_layers": 0}


@pytest.fixture(scope="module")
def report(checkpoints):
    models = [str(checkpoints["a"]), f"other={checkpoints['b']}"]
    return compare(models, ("turbo2", "exact"), size=SIZE, protection=UNPROTECTED)


def logp64(folder):
    """Every window's log-probabilities in one pass without a cache, in float64: [windows, window, vocab], targets."""
    model, tokenizer = mlx_rotor.load(folder)
    windows = draw_windows(encode(tokenizer, held_out_text()), [], SIZE)
    logits = np.array(model(mx.array(windows[:, :-1])).astype(mx.float32)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)), windows[:, 1:], mx.array(logits)


def test_rows_are_models_by_schemes_in_the_order_given(report):
    assert [(r.label, r.kv) for r in report.rows] == [
        ("a", "turbo2"),
        ("a", "exact"),
        ("other", "turbo2"),
        ("other", "exact"),
    ]
    assert [r.is_reference for r in report.rows] == [False, True, False, False]
    assert (report.conditions.reference, report.conditions.reference_weights) == ("a", "float32")
    assert report.conditions.spool_bytes == 4 * 224 * 2048 * 4


def test_perplexity_is_exp_of_the_cross_entropy(report, checkpoints):
    for row, name in ((report.rows[1], "a"), (report.rows[3], "b")):
        _, targets, logits = logp64(checkpoints[name])
        loss = nn.losses.cross_entropy(logits, mx.array(targets), reduction="mean").item()
        assert row.perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)


def test_divergence_is_the_sum_over_the_vocabulary(report, checkpoints):
    p, _, _ = logp64(checkpoints["a"])
    q, _, _ = logp64(checkpoints["b"])
    kl = (np.exp(p) * (p - q)).sum(-1)
    found = report.rows[3].divergence
    assert found.mean.value == pytest.approx(kl.mean(), rel=1e-4)
    assert found.mean.se == pytest.approx(kl.mean(1).std(ddof=1) / 2, rel=1e-3)
    assert found.p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.max == pytest.approx(kl.max(), rel=1e-3)
    assert found.agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.005)
    a, other = report.rows[1], report.rows[3]
    assert other.change.value == pytest.approx(other.perplexity.value / a.perplexity.value - 1)


def test_a_compressed_row_differs_from_the_reference_and_less_than_another_model(report):
    squeezed, reference, _, other = report.rows
    assert reference.divergence is None and reference.change is None
    assert 0 < squeezed.divergence.mean.value < other.divergence.mean.value
    # The first 32 tokens of a window see exact keys only, the last quarter mostly packed ones.
    assert squeezed.divergence.quarters[3] > squeezed.divergence.quarters[0]


def test_memory_is_what_the_caches_hold(report):
    squeezed, reference = report.rows[:2]
    per_layer = 2 * 128  # K and V of one head
    assert reference.footprint.further == 2 * per_layer * 4
    assert reference.footprint.fp16 == reference.footprint.tokens * 2 * per_layer * 2
    means = 128 * 2 / 256  # of K, float16, one for 256 tokens
    assert squeezed.footprint.further == 2 * (2 * (2 * 128 + 16) / 8 + means)
    assert squeezed.footprint.bits == 2 + 16 / 128 + 8 * means / 256
    assert squeezed.footprint.codecs == ("turbo2/turbo2", "turbo2/turbo2") and reference.footprint.codecs == ()
    assert squeezed.footprint.layers_compressed == 2 and squeezed.footprint.fused_calls > 0
    assert squeezed.footprint.fallback_calls == 0


@pytest.mark.parametrize("limit", thinned([FLOAT32_LIMIT, 0], [0]))
def test_a_configuration_has_no_divergence_from_itself(checkpoints, monkeypatch, limit):
    monkeypatch.setattr(score_module, "FLOAT32_LIMIT", limit)
    evaluated = EvaluatedModel(NamedModel.parse(str(checkpoints["a"])))
    sample = draw(evaluated.tokenizer, held_out_text(), SIZE, evaluated.context)
    caches = MeasuredCaches(evaluated, "exact", {})
    with score_module.LogProbFile() as log_probs:
        reference = score.read_reference(evaluated.model, caches, sample, 64, log_probs, lambda n: None)
        nll, found = score.compare_windows(evaluated.model, caches, sample, 64, reference, lambda n: None)
    np.testing.assert_array_equal(nll, reference.nll)
    assert found.agreement.value == 1
    assert found.max == 0 if limit else 0 < found.max < 1e-5


def test_against_a_model_that_is_no_row(checkpoints):
    size = SIZE.with_(greedy=0)
    found = compare([f"x={checkpoints['a']}"], ["exact"], against=f"y={checkpoints['b']}", size=size)
    assert [(r.label, r.is_reference) for r in found.rows] == [("x", False)]
    assert found.conditions.reference == "y" and found.rows[0].divergence.mean.value > 0.01
    assert "Reference: y, float32" in found.markdown() and "greedily" not in found.markdown()


def test_every_model_is_loaded_once_and_the_reference_run_once(checkpoints, monkeypatch):
    loaded, ran = [], []

    class Counted(module.EvaluatedModel):
        def __init__(self, target):
            loaded.append(target.label)
            super().__init__(target)

    predictions = module.score.predictions

    def counted(model, caches, sample, chunk):
        ran.append(caches._kv)
        return predictions(model, caches, sample, chunk)

    monkeypatch.setattr(module, "EvaluatedModel", Counted)
    monkeypatch.setattr(module.score, "predictions", counted)
    size = SIZE.with_(windows=1, needles=0, greedy=0)
    compare([str(checkpoints["b"])], ["turbo4"], against=str(checkpoints["a"]), size=size)
    assert (loaded, ran) == (["a", "b"], ["exact", "turbo4"])
    loaded.clear(), ran.clear()
    compare([str(checkpoints["a"])], ["turbo4", "exact"], size=size)
    assert (loaded, ran) == (["a"], ["exact", "turbo4"])


def test_tables_and_json_hold_the_same_figures(report):
    text = report.markdown()
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1, "one width of table"
    assert f"{report.rows[1].perplexity.value:.2f} ±" in lines[3]
    assert lines[3].count("reference") == 6
    assert "2 prompts of 256 tokens continued" in text and "Same greedily: of 256 tokens" in text
    assert "4 windows × 224 tokens" in text and "2 needles" in text and "seed 0" in text and "ring 32" in text
    assert "Reference: a, float32, exact KV." in text
    assert "224 @ 10 %" in text
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    row = data["rows"][3]
    assert row["perplexity"]["value"] == report.rows[3].perplexity.value
    assert row["divergence"]["mean"]["se"] == report.rows[3].divergence.mean.se
    assert [(c["length"], c["depth"], c["of"]) for c in row["needles"]] == [(224, 0.1, 1), (224, 0.9, 1)]
    same = report.rows[0].greedy
    assert data["rows"][0]["greedy"]["same"] == list(same.same) and same.limit == 256
    cell = f"| {same.mean.value:.0f}"
    assert cell in lines[2] and f", {same.median:.0f}, {same.never} " in lines[2]
    assert data["rows"][1]["divergence"] is None and data["rows"][1]["is_reference"]
    assert {"machine", "mlx", "mlx_lm", "date"} <= set(data["machine"])


def test_what_cannot_be_compared(checkpoints, tmp_path):
    a = str(checkpoints["a"])
    size = SIZE.with_(windows=1, needles=0, greedy=0)
    with pytest.raises(RotorError, match="turbo99"):
        compare([a], ["exact", "turbo99"], size=size)
    with pytest.raises(RotorError, match=r"no config\.json there"):
        compare([a, str(tmp_path / "missing")], ["exact"], size=size)
    with pytest.raises(RotorError, match="2047 probabilities a token and the reference 2048"):
        compare([a, str(checkpoints["small"])], ["exact"], size=size)
    with pytest.raises(RotorError, match="600 tokens are more than the model's context of 512"):
        compare([a], ["exact"], size=SIZE.with_(window=600))
    with pytest.raises(RotorError, match="give at least one model"):
        compare([a], [], size=size)


def test_another_tokenizer_is_refused(checkpoints, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(checkpoints["b"], other)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:-200]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(RotorError, match="tokenize the text differently"):
        compare([str(checkpoints["a"]), str(other)], ["exact"], size=SIZE.with_(windows=1, needles=0, greedy=0))


def test_targets(checkpoints, tmp_path):
    a = str(checkpoints["a"])
    (tmp_path / "link").symlink_to(a)
    assert NamedModel.parse(str(tmp_path / "link")).path == a, "a link is the same model"
    assert NamedModel.parse(a) == NamedModel("a", a)
    assert NamedModel.parse(f"my model={a}") == NamedModel("my model", a)
    assert NamedModel.parse("FP8=bundled").label == "FP8"
    assert NamedModel.parse(None).where == "bundled" and NamedModel.parse(a).where == a
    assert NamedModel.parse(None) == NamedModel.parse("bundled")
    assert NamedModel.parse("someone/model-4bit") == NamedModel("someone/model-4bit", "someone/model-4bit")
    alike = [NamedModel("m", "/x/m"), NamedModel("m", "/y/m"), NamedModel("m", "/x/m"), NamedModel("n", "/n")]
    assert module.unique(alike) == [NamedModel("/x/m", "/x/m"), NamedModel("/y/m", "/y/m"), NamedModel("n", "/n")]
