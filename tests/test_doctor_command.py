"""`python -m mlx_rotor.doctor` as a user runs it, and with kernels of the simulator as a Mac would."""

import functools
import json
import subprocess
import sys

import mlx.core as mx
import pytest

import metal_sim
from mlx_rotor import RotorError, bundled, codec, doctor
from mlx_rotor.cli.command import run
from mlx_rotor.diagnose import attention_check, attention_speed, expert_check, expert_speed
from mlx_rotor.diagnose.attention_check import AttentionCheck
from mlx_rotor.diagnose.expert_check import ExpertCheck
from mlx_rotor.diagnose.expert_speed import ExpertTiming
from mlx_rotor.experts import formats as weights
from mlx_rotor.host import versions
from mlx_rotor.kernels import check_results, metal

CHECKS = [
    AttentionCheck("encode", "turbo4", "turbo4", 64, mx.float16),
    AttentionCheck("rotate", "turbo4", "turbo4", 64, mx.float16),
]
EXPERTS = [ExpertCheck("route, mixtral", None, mx.float16), ExpertCheck("down, 1 row", ("lloyd", 3, 64), mx.bfloat16)]
KEY = "affine4:64+affine4:64+affine4:64 2048x768"
simulated = pytest.mark.skipif(not metal_sim.SUPPORTED, reason=metal_sim.UNSUPPORTED)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty current folder and folder of check results."""
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("MLX_ROTOR_BACKEND", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_results.forget()
    yield tmp_path / "here"
    check_results.forget()


@pytest.fixture
def metal_backend(monkeypatch):
    """Few and small checks and timings, with kernels of the simulator; returns what sets another maker."""
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
    monkeypatch.setattr(attention_check, "quick", lambda: CHECKS)
    monkeypatch.setattr(attention_check, "Size", functools.partial(attention_check.Size, encoded=40))
    # The simulator is a million times slower than what this times; its own test measures.
    monkeypatch.setattr(attention_speed, "cells", lambda: [("turbo4v2", 32, 1024), ("turbo4v2", 32, 2048)])
    monkeypatch.setattr(attention_speed, "measure_attention", timing)
    monkeypatch.setattr(expert_check, "quick", lambda: EXPERTS)
    monkeypatch.setattr(expert_check, "Size", functools.partial(expert_check.Size, rows=32, columns=128))
    monkeypatch.setattr(expert_speed, "cells", lambda: [(expert_speed.MODELS[1], ())])
    monkeypatch.setattr(expert_speed, "measure_experts", expert_timings)
    metal.use_maker(metal_sim.Kernel)
    yield metal.use_maker
    metal.use_maker(None)


def timing(scheme, heads, tokens):
    if tokens > 1024:
        return attention_speed.AttentionTiming(scheme, heads, tokens, skipped="needs 9 GB, 1 GB free")
    return attention_speed.AttentionTiming(scheme, heads, tokens, 3.0, 2.0)


def expert_timings(model, triple):
    return [
        ExpertTiming(model.name, KEY, 1, 3.0, 1.5),
        ExpertTiming(model.name, KEY, 4, 1.0, 1.25),
        ExpertTiming(model.name, KEY, 8, skipped="needs 9 GB, 1 GB free"),
    ]


def test_the_default_says_what_runs_where_and_why(capsys, place):
    assert run(doctor.main, []) == 0
    out = capsys.readouterr().out
    assert "mlx 0." in out and "mlx_lm 0." in out and "GiB of memory" in out
    operations = ("encode", "attend, decode", "attend, prefill", "rotate", "dequantize")
    experts = ("experts, route", "experts, gate and up", "experts, down", "experts, many rows", "packed weights")
    for operation in operations + experts:
        assert f"| {operation} " in out
    assert out.count("| reference |") == 10 and "WRONG" not in out
    assert "ok    mlx_lm " in out and "ok    bundled model " in out
    assert list(place.iterdir()) == []


def test_json_holds_the_same(capsys, place):
    assert run(doctor.main, ["--json", "--output", "mine.json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((place / "mine.json").read_text())
    assert facts["ok"] is True and facts["memory"] > 1 << 30 and facts["versions"]["mlx_rotor"]
    assert {o["backend"] for o in facts["operations"]} == {"reference"}
    assert [p.name for p in place.iterdir()] == ["mine.json"]


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is here")
def test_without_metal_kernels_says_what_cannot_be_checked(capsys, place):
    assert run(doctor.main, ["--kernels"]) == 0
    out = capsys.readouterr().out
    assert "No kernel is checked: this machine has no Metal." in out
    assert list(place.iterdir()) == []
    assert run(doctor.main, ["--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == {"why_not": "this machine has no Metal"}


def test_the_chosen_backend_is_named_as_the_reason(capsys, monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    assert run(doctor.main, []) == 0
    assert "reference | MLX_ROTOR_BACKEND=reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda m: m.setenv("MLX_ROTOR_BACKEND", "vulkan"), "backend          MLX_ROTOR_BACKEND=vulkan: there is"),
        (lambda m: m.setattr(versions, "MLX_LM", (9, 9)), "mlx-lm>=9.9.2,<9.10"),
        (
            lambda m: m.setattr(bundled, "MODEL", bundled.MODEL / "gone"),
            "no config.json, tokenizer.json, *.safetensors",
        ),
    ],
)
def test_what_is_wrong_is_said_and_sets_the_status(break_it, says, capsys, monkeypatch):
    break_it(monkeypatch)
    versions.check.cache_clear()
    assert run(doctor.main, []) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("WRONG") and says in line] and out.count("WRONG") == 1
    versions.check.cache_clear()


@simulated
def test_kernels_that_pass(metal_backend, capsys, place):
    assert run(doctor.main, ["--kernels"]) == 0
    captured = capsys.readouterr()
    every = len(attention_check.every()) + len(expert_check.every())
    assert f"4 of {every} kernels checked (--thorough: all)" in captured.out
    assert (
        "| encode         | 1/1 " in captured.out
        and "| down, 1 row    | 1/1 " in captured.out
        and "FAILED" not in captured.out
    )
    assert "| turbo4v2 | 32          | 1,024  | 3.000    | 2.000 " in captured.out and "needs 9 GB" in captured.out
    assert CHECKS[0].name in captured.err, "a progress bar names the kernel"
    assert "| metal   | MLX_ROTOR_BACKEND=metal; attention/encode.h" in captured.out
    kernels = json.loads((place / "doctor.json").read_text())["kernels"]
    assert [c["check"] for c in kernels["checks"]] == [c.name for c in CHECKS + EXPERTS]
    assert (kernels["checked"], kernels["failed"], kernels["of"]) == (4, 0, every)
    assert [t["ratio"] for t in kernels["timings"]] == [1.5, None]
    assert [t["ratio"] for t in kernels["expert_timings"]] == [2.0, 0.8, None]
    assert f"| Qwen3-30B-A3B | {KEY} | 1      | 3.000    | 1.500 " in captured.out
    assert check_results.failures() == () and "WRONG" not in captured.out
    assert [check_results.prefers_stock(KEY, rows) is None for rows in (1, 2, 3, 4, 8)] == [
        True,
        True,
        False,
        False,
        True,
    ]


@simulated
def test_a_kernel_that_fails_is_reported_and_refused_until_it_passes(metal_backend, capsys, place):
    def broken(name, **text):
        kernel = metal_sim.Kernel(name=name, **text)
        return lambda **launch: (
            [kernel(**launch)[0] + 1, *kernel(**launch)[1:]] if "encode" in name else kernel(**launch)
        )

    metal_backend(broken)
    assert run(doctor.main, ["--kernels", "--no-timing"]) == 1
    out = capsys.readouterr().out
    assert "FAILED encode: turbo4, 64 x float16, error " in out and "not bit-identical" in out
    assert "WRONG checked kernels  1 refused, as they failed: encode: turbo4, 64 x float16" in out
    facts = json.loads((place / "doctor.json").read_text())
    assert facts["ok"] is False and facts["kernels"]["failed"] == 1 and facts["kernels"]["timings"] == []
    with pytest.raises(RotorError, match="encode: turbo4, 64 x float16"):
        check_results.refuse("encode", mx.float16, codec.get("turbo4", 64))
    assert run(doctor.main, []) == 1, "as long as it is refused"
    metal_backend(metal_sim.Kernel)
    assert run(doctor.main, ["--kernels", "--no-timing", "--json"]) == 0
    check_results.refuse("encode", mx.float16, codec.get("turbo4", 64))


@simulated
@pytest.mark.parametrize(
    ("kernel", "refused", "formats"),
    [("route", ("route", mx.float16), ()), ("down", ("down", mx.bfloat16), ("lloyd3:64",))],
)
def test_expert_kernels_that_fail_are_left_alone(kernel, refused, formats, metal_backend, capsys):
    def broken(name, **text):
        made = metal_sim.Kernel(name=name, **text)
        return lambda **launch: [out + 1 for out in made(**launch)] if kernel in name else made(**launch)

    metal_backend(broken)
    assert run(doctor.main, ["--kernels", "--no-timing"]) == 1
    assert f"FAILED {kernel}, " in capsys.readouterr().out
    (failure,) = check_results.failures()
    assert (failure.operation, failure.codecs) == (kernel, formats)
    operation, dtype = refused
    with pytest.raises(RotorError, match=failure.check):
        check_results.refuse_weights(operation, dtype, *[weights.get("lloyd", 3, 64) for _ in formats])
    assert failure.check in check_results.prefers_stock("lloyd3:64+lloyd3:64+lloyd3:64 512x128", 1)
    other = check_results.prefers_stock("affine4:64+affine4:64+affine4:64 512x128", 1)
    assert (other is None) == (kernel == "down"), "routing is part of all"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kernels", "--output", "/nowhere/doctor.json"], "--output /nowhere/doctor.json: can't write a file there"),
        (["--output", "."], "--output .: can't write a file there"),
        (["--thorough"], "--thorough and --no-timing are about --kernels"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert run(doctor.main, arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {says}") and captured.err.count("\n") == 1


def test_kernels_and_a_chosen_reference_exclude_each_other(capsys, monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
    monkeypatch.setattr("mlx_rotor.kernels.launch.reason", lambda: "")
    assert run(doctor.main, ["--kernels"]) == 1
    assert "MLX_ROTOR_BACKEND=reference leaves no kernel to check; unset it" in capsys.readouterr().err


def test_a_spoilt_file_of_check_results_is_known_before_the_checks(capsys, metal_backend):
    check_results.path().parent.mkdir()
    check_results.path().write_text("spoilt")
    assert run(doctor.main, ["--kernels"]) == 1
    assert "kernels.json is not a file of check results" in capsys.readouterr().err


def test_help_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "mlx_rotor.doctor", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--thorough" in done.stdout
