"""Calibration on tiny random models, against the same figures worked out another way."""

import importlib
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock

from mlx_rotor import calibration
from mlx_rotor.bundled import held_out_text
from mlx_rotor.cache import RotorCache, scheme_file
from mlx_rotor.calibration import SEARCH, Reading, maxima
from mlx_rotor.calibration.search import BLOCK, OneSide, Search
from mlx_rotor.cli.command import run
from mlx_rotor.errors import RotorError
from mlx_rotor.host import attention
from mlx_rotor.quality import greedy
from mlx_rotor.quality.model import EvaluatedModel, NamedModel
from mlx_rotor.quality.sample import QUICK, THOROUGH, draw_between, encode

evaluate = importlib.import_module("mlx_rotor.evaluate")  # the command; the package has a function of that name

READING = Reading(2, 96, 32)


@pytest.fixture(scope="module")
def subject(checkpoints):
    return EvaluatedModel(NamedModel.parse(str(checkpoints["a"])))


@pytest.fixture(scope="module")
def windows(subject):
    return READING.draw(subject)


def test_maxima_are_of_all_keys_and_values(subject, windows):
    seen = []
    found = maxima.maxima(subject, windows, 32, seen.append)
    expected = np.zeros((2, 2))
    for window in windows:
        cache = subject.new_cache("exact")
        mx.eval(subject.model(mx.array(window)[None], cache=cache))
        for i, c in enumerate(cache):
            k, v = (np.abs(np.array(x[:, :, :96])).max() for x in (c.keys, c.values))
            expected[i] = np.maximum(expected[i], (k, v))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sum(seen) == windows.size


def test_scales_hold_what_was_seen_and_a_quarter_more():
    assert scheme_file.scale(448.0) == 1.25 and scheme_file.scale(0.0) == 1.0
    assert scheme_file.scale(1.0) == pytest.approx(1.25 / 448, rel=1e-3)


def test_a_model_whose_values_are_no_numbers(subject, windows):
    class Broken:
        def new_cache(self, kv):
            return subject.new_cache(kv)

        def model(self, ids, cache):
            for c in cache:
                x = mx.full((1, 1, ids.shape[1], 128), float("nan"))
                c.update_and_fetch(x, x)
            return mx.zeros((1, ids.shape[1], 8))

    with pytest.raises(RotorError, match="layer 0: K or V is no finite number"):
        maxima.maxima(Broken(), windows, 32)


def searched(subject, windows, candidates=("turbo2", "turbo4")):
    search = Search(subject, windows, 32, candidates, lambda n: None)
    search.kl(lambda: subject.new_cache("exact"))
    return search


@pytest.mark.parametrize("side", ["k", "v"])
def test_one_side_alone_is_that_side_with_the_other_lossless(subject, windows, side):
    search = searched(subject, windows)

    def beside_lossless():
        cache = subject.new_cache("exact")
        attention.install()
        pair = ("turbo2", "raw32") if side == "k" else ("raw32", "turbo2")
        cache[1] = RotorCache(*pair, 0, 0, BLOCK)
        return cache

    alone = search.alone(1, side, "turbo2").kl
    assert alone == pytest.approx(search.kl(beside_lossless)[0], rel=1e-3) and alone > 1e-4


def test_a_lossless_side_costs_nothing(subject, windows):
    search = searched(subject, windows)
    assert search.alone(0, "k", "raw32").kl < 1e-8
    assert search.alone(0, "k", "turbo4").kl < search.alone(0, "k", "turbo2").kl


def test_one_side_hides_what_a_sliding_window_hides():
    cache = OneSide("turbo2", "turbo2", "k", True, window=16)
    x = mx.zeros((1, 1, 40, 128))
    cache.update_and_fetch(x, x)
    assert cache.offset == 40
    mask = np.array(cache.make_mask(4, return_array=True))
    assert mask.shape == (4, 44) and mask.sum(axis=1).tolist() == [16] * 4
    assert np.array(cache.make_mask(4, True, window_size=3)).sum(axis=1).tolist() == [3] * 4


def test_the_scheme_found_is_the_best_of_all(subject, windows, tmp_path):
    """Two layers, two codecs: every scheme that keeps the rules is added up here."""
    found = Search(subject, windows, 32, ["turbo2", "turbo4"], lambda n: None).solve(3.2, "calibrated-3.2", {})
    bits = {"turbo2": 2 + 16 / 128, "turbo4": 4 + 16 / 128}
    pairs = [(k, v) for k in bits for v in bits if bits[k] >= bits[v]]
    fits = {}
    for one in pairs:
        for two in pairs:
            # A mean of K, 16 bits an element of it, is shared by 256 tokens.
            mean = np.mean([bits[k] + 16 / 256 if s == 0 else bits[k] for p in (one, two) for s, k in enumerate(p)])
            if mean <= 3.2:
                fits[one, two] = sum(
                    found.alone[i, s, c] for i, p in enumerate((one, two)) for s, c in zip("kv", p, strict=True)
                )
    assert found.scheme.layers == min(fits, key=fits.get)
    assert found.predicted == pytest.approx(min(fits.values())) and found.bits <= 3.2
    assert 0 < found.measured < 5 * found.predicted
    scheme_file.write(tmp_path / "s.json", found.scheme)
    assert [c.codecs for c in subject.new_cache(str(tmp_path / "s.json"))] == list(found.scheme.layers)


def test_what_cannot_be_searched(subject, windows):
    def search(candidates=("turbo2",), chunk=32):
        return Search(subject, windows, chunk, candidates, lambda n: None)

    with pytest.raises(RotorError, match="unknown codec 'turbo9'"):
        search(["turbo9"])
    with pytest.raises(RotorError, match="name at least one codec"):
        search([])
    with pytest.raises(RotorError, match="windows of 96 tokens in chunks of 96 read nothing packed"):
        search(chunk=96).solve(3, "x", {})
    with pytest.raises(RotorError, match=r"--target-bits 2: the narrowest candidates take 2\.156 bits"):
        search().solve(2, "x", {})
    with pytest.raises(RotorError, match="--window 16: nothing of so few tokens is packed"):
        Search(subject, windows[:, :16], 8, ["turbo2"], pytest.fail).solve(3, "x", {})
    assert Search(subject, windows, 32, ["turbo4", "turbo2"], pytest.fail).narrowest() == pytest.approx(2.15625)


def test_a_bar_ends_full(subject, windows):
    seen = []
    search = Search(subject, windows, 32, ["turbo2"], seen.append)
    search.solve(4, "x", {})
    assert sum(seen) == search.runs * windows.size


def test_default_windows_lie_between_those_of_a_comparison(bundled):
    tokens = encode(bundled[1], held_out_text())
    seen = set()
    for size in (QUICK, THOROUGH):
        for count, length in ((size.windows, size.window + 1), (size.greedy, greedy.PROMPT)):
            stride = (len(tokens) - (length > greedy.PROMPT)) // count
            seen |= {i * stride + j for i in range(count) for j in range(length)}
    mine = draw_between(range(len(tokens)), [], SEARCH.windows, SEARCH.window)
    assert mine.shape == (4, 256) and not seen & set(mine.reshape(-1).tolist())
    with pytest.raises(RotorError, match="too few for 3 windows of 64"):
        draw_between(range(100), [], 3, 64)


FP8 = ("--kv", "fp8")


def test_fp8_from_the_command_line(checkpoints, tmp_path, capsys):
    file = tmp_path / "fp8.json"
    arguments = ["--calibrate-kv", str(file), "--kv", "fp8", "--model", str(checkpoints["a"])]
    arguments += ["--windows", "1", "--window", "64"]
    assert run(evaluate.main, arguments) == 0
    out = capsys.readouterr().out
    scheme = scheme_file.read(file)
    assert len(scheme.layers) == 2 and all(c.startswith("fp8:0.") for pair in scheme.layers for c in pair)
    assert f"layer 1: K {scheme.layers[1][0]}" in out and f"--kv {file}" in out
    assert scheme.made["windows"] == 1 and scheme.made["text"] == "bundled held-out text"
    measured = [
        "--model",
        str(checkpoints["a"]),
        "--windows",
        "1",
        "--window",
        "224",
        "--needles",
        "0",
        "--greedy",
        "0",
    ]
    assert run(evaluate.main, [*measured, "--chats", "0", "--kv", "exact", "--kv", str(file), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][1]
    assert row["kv_memory"]["bits"] == 8 and row["divergence"]["mean"]["value"] < 0.01
    assert row["kv_memory"]["codecs"] == ["/".join(pair) for pair in scheme.layers]


def test_bits_from_the_command_line(checkpoints, tmp_path, capsys):
    file, text = tmp_path / "cal.json", tmp_path / "mine.txt"
    text.write_text(held_out_text()[:4000])
    arguments = ["--calibrate-kv", str(file), "--model", str(checkpoints["a"]), "--windows", "1", "--window", "64"]
    arguments += [
        "--chunk",
        "32",
        "--candidates",
        "turbo2,turbo3",
        "--target-bits",
        "2.7",
        "--text",
        str(text),
        "--json",
    ]
    assert run(evaluate.main, arguments) == 0
    data = json.loads(capsys.readouterr().out)
    scheme = scheme_file.read(file)
    assert scheme.name == "calibrated-2.7" and data["layers"] == [list(pair) for pair in scheme.layers]
    assert data["bits"] == scheme.made["bits"] <= 2.7 and len(data["alone"]) == 2 * 2 * 2
    assert scheme.made["text"] == "mine.txt" and "machine" in scheme.made


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--calibrate-kv", "x.txt", *FP8], "--calibrate-kv x.txt: a scheme's file must end in .json"),
        (["--calibrate-kv", "/nowhere/x.json", *FP8], "--calibrate-kv /nowhere/x.json: can't write a file there"),
        (["--calibrate-kv", "x.json"], "takes either --kv fp8 (a scale for each layer's K and V) or --target-bits X"),
        (["--calibrate-kv", "x.json", *FP8, "--target-bits", "3"], "takes either --kv fp8"),
        (["--calibrate-kv", "x.json", "--kv", "turbo2"], "not --kv turbo2"),
        (["--calibrate-kv", "x.json", "--candidates", "turbo2"], "--candidates is for --target-bits X"),
        (["--calibrate-kv", "x.json", *FP8, "--thorough"], "--thorough: not of use in calibrating"),
        (["--calibrate-kv", "x.json", "--needles", "0", "--kv-ring", "0"], "--needles, --kv-ring: not of use in"),
        (["--calibrate-kv", "x.json", *FP8, "--model", "a", "--model", "b"], "calibrated for one --model"),
        (["--candidates", "turbo2"], "are for --calibrate-kv"),
        (["--calibrate-kv", "x.json", *FP8, "--windows", "0"], "--windows 0: must be at least 1"),
        (["--calibrate-kv", "x.json", *FP8, "--window", "9000"], "more than the model's context of 8192"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(evaluate.main, arguments) == 1
    assert says in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_layers_of_several_caches_are_refused():
    with pytest.raises(RotorError, match="several caches each"):
        maxima.compressed([stock.CacheList(RotorCache("turbo4", "turbo4"), stock.KVCache())])


def test_presets():
    assert SEARCH.windows * SEARCH.window == 1024 and calibration.MAXIMA.window == 512


def test_the_former_flag_names_its_successor(capsys):
    with pytest.raises(SystemExit):
        evaluate.parser().parse_args(["--kv-calibrate", "x.json"])
    assert "--kv-calibrate is now --calibrate-kv FILE.json --target-bits X" in capsys.readouterr().err
