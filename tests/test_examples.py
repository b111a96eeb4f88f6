"""Every script a user may copy runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINER = {"train_demo.py", "export_demo.py"}
ARGUMENTS = {"attach.py": [], "quantize_demo.py": ["{tmp}/out"], "compare_schemes.py": ["exact", "turbo4v2"]}


def test_every_script_is_run_here():
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(ARGUMENTS) | TRAINER


@pytest.mark.parametrize("name", ARGUMENTS)
def test_script(name, tmp_path):
    argv = [sys.executable, str(EXAMPLES / name), *(a.format(tmp=tmp_path) for a in ARGUMENTS[name])]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "%" in done.stdout or "KL" in done.stdout
    if name == "quantize_demo.py":
        assert (tmp_path / "out" / "config.json").exists() and "config-i: 8.214 MB" in done.stdout
        assert re.search(r"^rotor-70: 3\.\d+ MB is too small", done.stdout, re.M), "solved for, not a silent start"
        assert re.search(r"^mine: \d\.\d{3} MB = .* bits a weight, in \d", done.stdout, re.M)


def test_the_trainers_fp8_is_what_the_quantizer_reads(monkeypatch):
    torch = pytest.importorskip("torch", reason="the [train] extra is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import export_demo
    from mlx_rotor.quant.source import checkpoint

    w = torch.randn(200, 300) * 0.04
    codes, scale = export_demo.fp8_blocks(w)
    assert scale.shape == (2, 3)
    bits = mx.array(codes.view(torch.uint8).numpy())
    ours = checkpoint.dequantize(bits, mx.array(scale.numpy()), (128, 128), "w")
    assert mx.array_equal(ours, mx.array(export_demo.fp8_round_trip(w).numpy()))
    assert (mx.abs(ours - mx.array(w.numpy())).max() / mx.abs(mx.array(w.numpy())).max()).item() < 0.04
