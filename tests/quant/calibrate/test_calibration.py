"""Statistics of a calibration against NumPy sums over the inputs of mlx_lm's own modules; going on after an end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_rotor.bundled import MODEL, calibration_text, held_out_prose, held_out_text
from mlx_rotor.errors import RotorError
from mlx_rotor.host.skeleton import skeleton
from mlx_rotor.quant import calibrate, policy
from mlx_rotor.quant.calibrate import Calibration, LayerStatistics, Scaled
from mlx_rotor.quant.calibrate.calibration import STATE
from mlx_rotor.quant.calibrate.moments import EVEN_PRODUCTS, EVEN_SQUARES, FEWEST, Mixture, Moments
from mlx_rotor.quant.plan import make_plan, read_config
from mlx_rotor.quant.source import Checkpoint

TOKENS = (np.arange(24 * 16).reshape(24, 16) * 7919 % 191).astype(np.int32)
# An expert of the second layer is never chosen: its load-balancing bias is far below the others'.
UNSEEN = 1


def shun(tensors):
    tensors["model.layers.1.block_sparse_moe.e_score_correction_bias"][1][UNSEEN] = -1000


@pytest.fixture
def source(checkpoint):
    folder, _ = checkpoint(alter=shun)
    config = read_config(folder)
    found = Checkpoint.open(folder, config)
    return SimpleNamespace(
        config=config, weights=found, plan=make_plan(config, policy.load("uniform-4bit"), found.dtypes)
    )


@pytest.fixture
def seen(source):
    """Module path -> its inputs [n, K] in a stock forward over all tokens, and the indices of experts."""
    model = skeleton(source.config)
    by_name = {e.outputs[0].name: e for e in source.plan.entries}

    def whole(name):
        entry = by_name[name]
        parts = [source.weights.read(entry, p) for p in range(entry.parts)]
        return (mx.stack(parts) if entry.parts > 1 else parts[0]).reshape(entry.shape)

    model.load_weights([(name, whole(name)) for name, _ in tree_flatten(model.parameters())])
    found = {}
    stock = {kind: kind.__call__ for kind in (nn.Linear, SwitchGLU)}
    paths = {id(module): path for path, module in model.named_modules()}

    def watched(kind):
        def call(self, x, *args, **named):
            found.setdefault(paths[id(self)], []).append((x, *args))
            return stock[kind](self, x, *args, **named)

        return call

    try:
        for kind in stock:
            kind.__call__ = watched(kind)
        mx.eval(model(mx.array(TOKENS)))
    finally:
        for kind, call in stock.items():
            kind.__call__ = call
    joined = {path: [np.array(a).reshape(-1, a.shape[-1]) for a in calls[0]] for path, calls in found.items()}
    return SimpleNamespace(model=model, inputs=joined)


def entries(plan, layer):
    return [e for e in plan.entries if e.layer == layer]


def calibration(source, folder, **changes):
    return Calibration(source.config, source.weights, source.plan, TOKENS, folder, chunk=64, **changes)


def near(got, want):
    np.testing.assert_allclose(np.array(got), want, rtol=2e-4, atol=2e-5 * np.abs(want).max())


def test_dense_weights_and_the_head_get_the_moments_of_their_inputs(source, seen, tmp_path):
    guide = calibration(source, tmp_path / "job")
    for layer in (0, 1, None):
        group = [e for e in entries(source.plan, layer) if e.role != "embed"]
        weights, statistics = guide.layer(layer, group)
        assert weights is source.weights
        for entry in group:
            if entry.role.startswith("attn") or entry.role == "head":
                x = seen.inputs[entry.module][0]
                near(statistics.importance(entry, 0), (x * x).mean(0))
                near(statistics.hessian(entry, 0), x.T @ x / len(x))
            elif entry.role in ("norm", "router.bias"):
                assert statistics.importance(entry, 0) is statistics.hessian(entry, 0) is None


def test_experts_get_what_was_routed_to_them(source, seen, tmp_path):
    guide = calibration(source, tmp_path / "job")
    for layer in (0, 1):
        _, statistics = guide.layer(layer, entries(source.plan, layer))
        for entry in entries(source.plan, layer):
            if not entry.role.startswith("expert"):
                continue
            path = entry.module.rpartition(".")[0]
            x, indices = seen.inputs[path]
            switch = seen.model.model.layers[layer].block_sparse_moe.switch_mlp
            for expert in range(entry.parts):
                mine = x[(indices == expert).any(1)]
                assert statistics._mixtures[path].counts[expert] == len(mine)
                if entry.role == "expert.down":
                    gate, up = (np.array(switch[n].weight[expert]) for n in ("gate_proj", "up_proj"))
                    g = mine @ gate.T
                    y = g / (1 + np.exp(-g)) * (mine @ up.T)
                    check_down(statistics, entry, expert, y)
                    continue
                share = len(mine) / (len(mine) + EVEN_PRODUCTS)
                squares, products = (x * x).mean(0), x.T @ x / len(x)
                if len(mine):
                    squares = share * (mine * mine).mean(0) + (1 - share) * squares
                    products = share * mine.T @ mine / len(mine) + (1 - share) * products
                near(statistics.importance(entry, expert), squares)
                near(statistics.hessian(entry, expert), products)
    assert guide.coverage["model.layers.1.block_sparse_moe.switch_mlp"].unseen == 1
    assert guide.coverage["model.layers.0.block_sparse_moe.switch_mlp"].least > 0
    assert guide.describe()["expert_rows"]["unseen"] == 1


def check_down(statistics, entry, expert, y):
    if not len(y):
        assert statistics.importance(entry, expert) is statistics.hessian(entry, expert) is None
        return
    squares, products = (y * y).mean(0), y.T @ y / len(y)
    share = len(y) / (len(y) + EVEN_SQUARES)
    near(statistics.importance(entry, expert), share * squares + (1 - share) * squares.mean())
    found = statistics.hessian(entry, expert)
    if len(y) < FEWEST:
        assert found is None
    else:
        share = len(y) / (len(y) + EVEN_PRODUCTS)
        near(found, share * products + (1 - share) * np.diag(np.diag(products)))


def test_what_takes_the_same_inputs_is_said_to(source, tmp_path):
    _, statistics = calibration(source, tmp_path).layer(0, entries(source.plan, 0))
    roles = {statistics.inputs(e): set() for e in entries(source.plan, 0)}
    for entry in entries(source.plan, 0):
        roles[statistics.inputs(entry)].add(entry.role)
    shared = [found for found in roles.values() if len(found) > 1]
    assert shared == [{"attn.q", "attn.k", "attn.v"}, {"expert.gate", "expert.up"}]


def test_too_few_rows_give_no_hessian(source, tmp_path):
    few = Calibration(source.config, source.weights, source.plan, TOKENS[:8], tmp_path)  # 128 rows of 192 inputs
    _, statistics = few.layer(0, entries(source.plan, 0))
    gate = next(e for e in entries(source.plan, 0) if e.role == "expert.gate")
    query = next(e for e in entries(source.plan, 0) if e.role == "attn.q")
    output = next(e for e in entries(source.plan, 0) if e.role == "attn.o")
    assert statistics.hessian(gate, 0) is statistics.hessian(query, 0) is None
    assert statistics.importance(gate, 0) is not None and statistics.hessian(output, 0) is not None


def test_inputs_that_were_all_zero_give_no_hessian(source):
    query = next(e for e in entries(source.plan, 0) if e.role == "attn.q")
    for value in (0.0, 1.0):
        moments = Moments(products=True)
        moments.add(mx.full((200, 192), value))
        found = LayerStatistics({query.module: moments}, {}, {query.module}).hessian(query)
        assert (found is None) == (value == 0)


def test_hessians_are_summed_where_a_fit_makes_use_of_them(source, tmp_path):
    kept = '[[rule]]\nroles = ["attn.q", "expert.up"]\nbits = 4\nfit = "fast"\n'
    kept += '[[rule]]\nroles = ["expert.gate"]\nkeep = true\n[[rule]]\nroles = ["*"]\nbits = 4\n'
    source.plan = make_plan(source.config, policy.parse(kept, "kept"), source.weights.dtypes)
    _, statistics = calibration(source, tmp_path).layer(0, entries(source.plan, 0))
    with_one = {e.role for e in entries(source.plan, 0) if statistics.hessian(e, 0) is not None}
    assert with_one == {"attn.k", "attn.v", "attn.o", "expert.down"}
    (mixture,) = statistics._mixtures.values()
    assert mixture.all.products() is None and mixture.all.squares() is not None


def test_without_products_there_are_squares_only(source, tmp_path):
    guide = calibration(source, tmp_path, products=False)
    _, statistics = guide.layer(0, entries(source.plan, 0))
    for entry in entries(source.plan, 0):
        assert statistics.hessian(entry, 0) is None
    assert statistics.importance(next(e for e in entries(source.plan, 0) if e.role == "expert.down"), 0) is not None


def everything(guide, plan, layers):
    out = []
    for layer in layers:
        group = [e for e in entries(plan, layer) if e.role != "embed"]
        _, statistics = guide.layer(layer, group)
        for entry in group:
            for part in range(entry.parts):
                for found in (statistics.importance(entry, part), statistics.hessian(entry, part)):
                    out.append(None if found is None else np.array(found).tobytes())
    return out


def test_a_job_that_ended_anywhere_goes_on_with_the_same_bytes(source, tmp_path):
    whole = everything(calibration(source, tmp_path / "whole"), source.plan, (0, 1, None))
    start = everything(calibration(source, tmp_path / "job"), source.plan, (0,))
    assert start == whole[: len(start)]
    # Killed in the middle of layer 1: half a file under a temporary name, and what the experts took.
    calls = []

    def stop(what, done, count):
        calls.append(what)
        if what == "layer 1" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        everything(calibration(source, tmp_path / "job", progress=stop), source.plan, (1,))
    assert "embeddings" not in calls and "layer 0" not in calls
    left = sorted(p.name for p in (tmp_path / "job").iterdir())
    assert left == [STATE, "experts-0001-0.f32", "hidden-0001.npy"]
    (tmp_path / "job" / "hidden-0002.npy.tmp").write_bytes(b"as kill -9 leaves it")
    again = calibration(source, tmp_path / "job")
    assert "model.layers.0.block_sparse_moe.switch_mlp" in again.coverage
    rest = everything(again, source.plan, (1, None))
    assert start + rest == whole
    # A job that has layer 1 left, and nothing on disk.
    assert everything(calibration(source, tmp_path / "new"), source.plan, (1, None)) == rest


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_the_operating_system():
    with pytest.raises(OSError, match="No space left"):
        Mixture(Path("/dev/full"), False).add(mx.ones((4, 64)), np.zeros((4, 2), np.int32))


def test_two_generations_lie_on_disk(source, tmp_path):
    guide = calibration(source, tmp_path)
    most = guide.disk
    for layer, files in ((0, ["0000", "0001"]), (1, ["0001", "0002"])):
        guide.layer(layer, entries(source.plan, layer))
        assert sorted(p.stem[7:] for p in tmp_path.glob("hidden-*")) == files
    guide.layer(None, [e for e in entries(source.plan, None) if e.role != "embed"])
    assert [p.name for p in tmp_path.glob("*.npy")] == ["hidden-0002.npy"]
    assert sum(p.stat().st_size for p in tmp_path.glob("*.npy")) < most > guide.disk


def test_another_text_begins_anew(source, tmp_path):
    calibration(source, tmp_path).layer(0, entries(source.plan, 0))
    other = Calibration(source.config, source.weights, source.plan, TOKENS[::-1], tmp_path, chunk=64)
    assert not list(tmp_path.glob("*.npy")) and other.coverage == {}
    assert other.digest != calibration(source, tmp_path / "b").digest
    assert json.loads((tmp_path / STATE).read_text())["digest"] == other.digest


def test_the_embeddings_end_has_no_statistics(source, tmp_path):
    guide = calibration(source, tmp_path)
    assert guide.layer(None, [e for e in source.plan.entries if e.role == "embed"]) == (source.weights, None)
    assert not list(tmp_path.glob("*.npy"))


def test_tokens_of_another_vocabulary_are_refused(source, tmp_path):
    with pytest.raises(RotorError, match="token 500, the model 200 embeddings"):
        Calibration(source.config, source.weights, source.plan, np.full((1, 16), 500), tmp_path)


def test_statistics_of_divided_inputs(source, tmp_path):
    _, statistics = calibration(source, tmp_path).layer(0, entries(source.plan, 0))
    gate, down, query = (
        next(e for e in entries(source.plan, 0) if e.role == r) for r in ("expert.gate", "expert.down", "attn.q")
    )
    s = np.linspace(0.5, 2, 192, dtype=np.float32)
    each = np.linspace(1, 3, 3 * 64, dtype=np.float32).reshape(3, 64)
    scaled = Scaled(statistics, {gate.module: mx.array(s), down.module: mx.array(each)})
    near(scaled.importance(gate, 1), np.array(statistics.importance(gate, 1)) / s**2)
    near(scaled.hessian(gate, 1), np.array(statistics.hessian(gate, 1)) / np.outer(s, s))
    near(scaled.importance(down, 2), np.array(statistics.importance(down, 2)) / each[2] ** 2)
    assert np.array_equal(scaled.importance(query, 0), statistics.importance(query, 0))


# ------------------------------------------------------------ text
class Words:
    """A tokenizer of one token a word, behind an opening token."""

    bos_token_id = 1

    def encode(self, text, add_special_tokens=True, verbose=True):
        words = [2 + len(word) for word in text.split()]
        return [1, *words] if add_special_tokens else words


def test_sequences_do_not_overlap_and_begin_as_a_text_does():
    text = " ".join("x" * (i % 40) + "x" for i in range(100))
    rows = calibrate.sequences(Words(), text, 3, 21)
    assert rows.shape == (3, 21) and rows.dtype == np.int32
    stride, words = 33, Words().encode(text, add_special_tokens=False)
    assert rows.tolist() == [[1, *words[i * stride : i * stride + 20]] for i in range(3)]
    assert calibrate.sequences(Words(), text, 50, 21).shape == (5, 21)
    with pytest.raises(RotorError, match="100 tokens, too few"):
        calibrate.sequences(Words(), text, 1, 200)


def test_the_bundled_text_and_tokenizer_are_the_defaults(tmp_path):
    config = read_config(MODEL)
    rows = calibrate.prepare(MODEL, config)
    assert rows.shape == (64, 256) and 0 <= rows.min() < rows.max() < config["vocab_size"]
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 40)
    assert calibrate.prepare(MODEL, config, tmp_path / "a.txt", 2, 30).shape == (2, 30)


def test_sizes_follow_the_model():
    assert calibrate.default_size({"hidden_size": 3072, "max_position_embeddings": 196608}) == (96, 2048)
    assert calibrate.default_size({"hidden_size": 256, "max_position_embeddings": 8192}) == (64, 256)
    assert calibrate.default_size({"hidden_size": 4096, "max_position_embeddings": 512}) == (384, 512)
    assert calibrate.default_size({"text_config": {"hidden_size": 3072}}) == (96, 2048)


def test_text_files(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one two")
    lines.write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n')
    assert calibrate.read(plain) == "one two" and calibrate.read(lines) == "one\n\ntwo"
    lines.write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(RotorError, match="line 2"):
        calibrate.read(lines)
    plain.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RotorError, match="UTF-8"):
        calibrate.read(plain)


def test_the_bundled_text_is_large_enough_and_holds_nothing_held_out():
    text = " ".join(calibration_text().split())
    assert len(calibration_text()) > 300_000
    pieces = {text[i : i + 150] for i in range(len(text) - 150)}

    def shared(other):
        other = " ".join(other.split())
        return sum(other[i : i + 150] in pieces for i in range(0, len(other) - 150, 75))

    assert shared(held_out_text()) == shared(held_out_prose()) == 0
    assert shared(calibration_text()[:2000]) > 10
