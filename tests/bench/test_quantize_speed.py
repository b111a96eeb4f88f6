import json

import mlx.core as mx
import pytest

from mlx_rotor import benchmark
from mlx_rotor.bench import jobs
from mlx_rotor.bench.synthetic_layer import DIMENSIONS, make_checkpoint
from mlx_rotor.cli.command import run
from mlx_rotor.errors import RotorError
from mlx_rotor.quant.source import Checkpoint


def test_the_synthetic_checkpoint_has_the_true_dimensions_and_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        total = make_checkpoint(tmp_path / name, "small")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    found = Checkpoint.open(tmp_path / "a", config)
    assert found.nbytes == total
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    weights = found.rows("model.layers.0.block_sparse_moe.experts.3.w2.weight")
    assert 0.005 < mx.std(weights).item() < 0.03 and abs(mx.mean(weights).item()) < 1e-3
    layer = DIMENSIONS["minimax"]
    experts = 3 * layer["num_local_experts"] * layer["hidden_size"] * layer["intermediate_size"]
    assert experts == 3 * 256 * 3072 * 1536


def test_a_job_and_the_loop_are_measured_on_the_same_checkpoint(tmp_path):
    speed = jobs.measure_job(tmp_path, "small", ("fast",), workers=2)
    facts = jobs.facts(speed)
    assert [row["what"] for row in facts["jobs"]] == ["job, fast, 1 worker", "job, fast, 2 workers"]
    for row in [facts["bare"], *facts["jobs"]]:
        assert row["mb_per_second"] == pytest.approx(facts["source_bytes"] / row["seconds"] / 1e6)
        assert 20e6 < row["peak_bytes"] < 2e9
    assert facts["jobs"][0]["of_bare"] == pytest.approx(facts["bare"]["seconds"] / facts["jobs"][0]["seconds"])
    assert facts["jobs"][0]["of_bare_cpu"] == pytest.approx(
        facts["bare"]["cpu_seconds"] / facts["jobs"][0]["cpu_seconds"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("experts", "chosen"), [(4, 4), pytest.param(12, 8, marks=pytest.mark.nightly)])
def test_a_calibrated_job_is_measured_on_any_number_of_experts(tmp_path, experts, chosen):
    rows = jobs.measure_calibrated(tmp_path, "small", (experts,), tokens=256, length=128)
    assert [(row.experts, row.chosen, row.tokens) for row in rows] == [(experts, chosen, 256)]
    for row in rows:
        assert 50e6 < row.text_peak_bytes <= row.peak_bytes < 2e9
        # Two generations of hidden states and what the experts take, beside a file of a few lines.
        assert 0 < row.work_bytes - 3 * 4 * 256 * 256 < 4096
    assert list(tmp_path.iterdir()) == []


def test_unknown_dimensions_and_a_run_that_fails_are_errors(tmp_path):
    with pytest.raises(RotorError, match=r"unknown dimensions 'large'; there are minimax, small"):
        make_checkpoint(tmp_path / "x", "large")
    make_checkpoint(tmp_path / "source", "small")
    (tmp_path / "source" / "config.json").write_text("{}")
    with pytest.raises(RotorError, match="the run of job failed"):
        jobs._process(tmp_path, "job", "fast", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experts", "4"], "--experts is for --calibrated"),
        (["--calibrated", "--fits", "fast"], "--calibrated takes one of --fits: search or best"),
        (["--calibrated", "--fits", "search,best"], "--calibrated takes one of --fits"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(capsys, arguments, says):
    assert run(benchmark.main, ["quantize", *arguments]) == 1
    assert says in capsys.readouterr().err
