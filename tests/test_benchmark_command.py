"""`python -m mlx_rotor.benchmark codecs` and `cache` as a user runs them."""

import json
from functools import partial
from pathlib import Path

import pytest

import mlx_rotor
from mlx_rotor import benchmark, codec
from mlx_rotor.bench import cache_overhead, codecs, expert_overhead, fits
from mlx_rotor.cli.command import run


def test_codecs_as_a_table(capsys, monkeypatch):
    monkeypatch.setattr(codecs, "measure_biased_keys", partial(codecs.measure_biased_keys, tokens=256))
    assert run(benchmark.main, ["codecs", "--vectors", "64"]) == 0
    out = capsys.readouterr().out
    for name in codec.names():
        assert f"\n{name} " in out
    assert "4^-bits" in out and "64 Gaussian vectors of 128" in out


def test_codecs_as_json(capsys):
    assert (
        run(benchmark.main, ["codecs", "--vectors", "64", "--dim", "80", "--codecs", "turbo3,affine4", "--json"]) == 0
    )
    data = json.loads(capsys.readouterr().out)
    (row,) = data["codecs"]
    assert row["codec"] == "turbo3" and row["bits"] == 3.2 and row["bound"] == 4**-3.2
    assert row["error"] == pytest.approx(0.0335, rel=0.05)
    assert list(data["left_out"]) == ["affine4"] and "mlx" in data["machine"]


def test_cache(capsys, monkeypatch, small):
    model = mlx_rotor.load(small)
    monkeypatch.setattr(mlx_rotor.host, "load", lambda: model)
    monkeypatch.setattr(
        cache_overhead, "measure_cache_overhead", partial(cache_overhead.measure_cache_overhead, cycles=2)
    )
    arguments = ["cache", "--schemes", "exact,turbo4v2", "--tokens", "192", "--prompts", "128", "--chunk", "64"]
    assert run(benchmark.main, arguments) == 0
    out = capsys.readouterr().out
    for title in ("graph of a token", "prefix hit", "reading a prompt"):
        assert title in out
    assert out.count("\nturbo4v2 ") == 4 and "bundled model in float32, 64 tokens at a time" in out


def test_cache_as_json_without_a_model(capsys):
    assert run(benchmark.main, ["cache", "--schemes", "turbo2", "--tokens", "160", "--prompts", "0", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(r["scheme"], r["backend"]) for r in data["overhead"]] == [("turbo2", "reference"), ("turbo2", "metal")]
    assert [r["kv"] for r in data["prefix_hit"]] == ["exact", "turbo2"] and data["prefill"] == []
    assert {"ratio", "ratio_a_node", "launches"} <= set(data["overhead"][0])


def test_the_cache_parts_defaults_are_the_rows_of_the_published_table():
    page = Path(__file__).parents[1] / "docs" / "results" / "memory_and_overhead.md"
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    args = benchmark.parser().parse_args(["cache"])
    assert rows == ["exact", *args.schemes.split(",")] and list(args.prompts) == [2048, 4096] and args.tokens == 2048


def test_experts(capsys, monkeypatch):
    quick = partial(expert_overhead.measure_expert_overhead, rounds=3)
    monkeypatch.setattr(expert_overhead, "measure_expert_overhead", quick)
    assert run(benchmark.main, ["experts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["overhead"]
    assert [row["what"] for row in rows] == ["minimax's experts", "phimoe's experts", "a q8 matrix"]
    assert run(benchmark.main, ["experts"]) == 0
    assert "graph of a token" in capsys.readouterr().out


def test_weight_fits(capsys, monkeypatch):
    few = {"specs": fits.SPECS[:1]}
    monkeypatch.setattr(fits, "measure_fits", partial(fits.measure_fits, shape=(64, 256), rounds=1, **few))
    monkeypatch.setattr(fits, "measure_layers", partial(fits.measure_layers, shape=(32, 128), **few))
    assert run(benchmark.main, ["fit", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["fit"] for row in data["fits"]] == ["fast", "search", "best"] and data["layers"]
    assert run(benchmark.main, ["fit"]) == 0
    assert "fits of normal weights" in capsys.readouterr().out


def test_a_quantize_job_on_a_small_layer(tmp_path, capsys):
    arguments = ["quantize", "--dimensions", "small", "--where", str(tmp_path), "--workers", "1"]
    assert run(benchmark.main, arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("run ") and "job, fast, 1 worker" in out and "small dimensions" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", "--fits", "slow"], "--fits slow: there is fast, search, best"),
        (["codecs", "--codecs", "turbo3,huge7"], "--codecs huge7: there is"),
        (["codecs", "--codecs", "affine4", "--dim", "80"], "80"),
        (["cache", "--schemes", "turbo99"], "turbo99"),
        (["cache", "--prompts", "100", "--chunk", "64"], "must be multiples of --chunk 64"),
        (["cache", "--tokens", "132"], "--tokens 132: nothing is packed in so few; 132 stay exact"),
        (["cache", "--schemes", "exact"], "--schemes exact: exact KV is measured beside each"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert run(benchmark.main, arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and says in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cache", "--prompts", "128,many"], "argument --prompts: 'many' is no whole number from 0"),
        (["codecs", "--vectors", "0"], "argument --vectors: '0' is no whole number from 1"),
        (["cache", "--chunk", "0"], "argument --chunk: '0' is no whole number from 1"),
        (["cache", "--tokens", "0"], "argument --tokens: '0' is no whole number from 1"),
    ],
)
def test_numbers_that_are_none_name_their_flag(arguments, says, capsys):
    with pytest.raises(SystemExit):
        run(benchmark.main, arguments)
    assert says in capsys.readouterr().err
