"""Jobs with a guide: what it is asked, what reaches the fit, and what it means for resuming."""

import json
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from quantizing import quantize

from mlx_rotor.errors import RotorError
from mlx_rotor.quant.calibrate import Calibration
from mlx_rotor.quant.folding.search import ScaleFolding
from mlx_rotor.quant.job import manifest, stream
from mlx_rotor.quant.job.workplace import WORK
from mlx_rotor.quant.plan import read_config
from mlx_rotor.quant.policy import load

POLICY = load("uniform-3bit")
OPTIONS = {"shard_bytes": 100_000, "workers": 2}


class Known:
    """Statistics by hand: some inputs count far more than others; a Hessian for attention only."""

    def __init__(self):
        self.asked = []

    def importance(self, entry, part):
        if entry.role in ("embed", "head"):
            return None
        return mx.where(mx.arange(entry.shape[-1]) % 8 == part % 8, 100.0, 0.01)

    def hessian(self, entry, part):
        self.asked.append((self.inputs(entry), part))
        if not entry.role.startswith("attn."):
            return None
        return mx.diag(mx.where(mx.arange(entry.shape[-1]) % 8 == 0, 100.0, 0.01))

    def inputs(self, entry):
        path, _, name = entry.module.rpartition(".")
        return path if name in ("q_proj", "k_proj", "v_proj") else entry.module


class Guide:
    digest, disk = "hand", 0

    def __init__(self, weights):
        self.weights, self.layers, self.known = weights, [], Known()

    def layer(self, number, entries):
        self.layers.append((number, [entry.module for entry in entries]))
        return self.weights, self.known

    def describe(self):
        return {"tokens": 7}

    def files(self):
        return {"seen.json": "{}"}


def build(made):
    def factory(checkpoint, plan, work):
        assert work.name == WORK and work.is_dir()
        made.append(Guide(checkpoint))
        return made[-1]

    return factory


def stored(out):
    return {name: values for file in sorted(out.glob("*.safetensors")) for name, values in mx.load(str(file)).items()}


def weighted_error(found, checkpoint_weights, importance, module):
    packed, scales, biases = (found[f"{module}.{what}"] for what in ("weight", "scales", "biases"))
    decoded = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), 64, 3)
    return float((importance * (np.array(decoded) - checkpoint_weights) ** 2).sum())


def test_statistics_reach_the_fit_part_by_part(checkpoint, truth, tmp_path):
    folder, tensors = checkpoint()
    made = []
    result = quantize(folder, tmp_path / "guided", POLICY, guide=build(made), **OPTIONS)
    quantize(folder, tmp_path / "plain", POLICY, **OPTIONS)
    guide = made[0]
    assert [number for number, _ in guide.layers] == [None, 0, 1, None]
    assert [m for _, modules in guide.layers for m in modules] == [entry.module for entry in result.plan.entries]
    quantized = [entry for entry in result.plan.entries if entry.spec]
    inputs = {(guide.known.inputs(e), p) for e in quantized for p in range(e.parts)}
    assert sorted(guide.known.asked) == sorted(inputs)  # once each, q, k and v together
    guided, plain = stored(tmp_path / "guided"), stored(tmp_path / "plain")
    module = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
    for part in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{part}.w3.weight"
        weights = truth(tensors, name)
        importance = np.where(np.arange(weights.shape[-1]) % 8 == part % 8, 100.0, 0.01)
        one, other = (
            weighted_error({k: v[part] for k, v in found.items() if k.startswith(module)}, weights, importance, module)
            for found in (guided, plain)
        )
        assert one < 0.5 * other
    attention = "model.layers.0.self_attn.o_proj"
    assert not mx.array_equal(guided[f"{attention}.weight"], plain[f"{attention}.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.scales"):
        assert mx.array_equal(guided[name], plain[name])
    facts = json.loads((tmp_path / "guided" / manifest.PROVENANCE).read_text())
    assert facts["calibration"] == {"tokens": 7}


def test_fast_asks_for_no_statistics(checkpoint, tmp_path):
    made = []
    quantize(checkpoint()[0], tmp_path / "out", POLICY, guide=build(made), fit="fast", **OPTIONS)
    assert made[0].known.asked == []


def test_a_resumed_job_asks_for_layers_with_something_left_and_for_the_same_guide(checkpoint, tmp_path):
    folder, _ = checkpoint()
    made, out = [], tmp_path / "out"
    quantize(folder, tmp_path / "whole", POLICY, guide=build(made), **OPTIONS)

    def stop(event):
        if event.kind == "layer" and event.layer == 1:
            raise OSError(5, "stopped")

    with pytest.raises(RotorError, match="stopped; what is finished is kept"):
        quantize(folder, out, POLICY, guide=build(made), progress=stop, **OPTIONS)
    with pytest.raises(RotorError, match="the calibration has changed"):
        quantize(folder, out, POLICY, resume=True, **OPTIONS)
    quantize(folder, out, POLICY, guide=build(made), resume=True, **OPTIONS)
    assert [number for number, _ in made[-1].layers] == [1, None]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_statistics_are_asked_by_one_thread_at_a_time_and_so_is_the_progress(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "GUIDED_PIECE", 1 << 12)
    busy, overlaps, threads = threading.Lock(), [], set()

    def alone(*args):
        threads.add(threading.get_ident())
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.0005)
        busy.release()

    made = []
    folder, _ = checkpoint()
    quantize(folder, tmp_path / "a", POLICY, guide=build(made), progress=alone, shard_bytes=10**9, workers=4)
    assert len(overlaps) > 100 and len(threads) > 1 and not any(overlaps)
    overlaps.clear()
    monkeypatch.setattr(Known, "importance", lambda self, entry, part: alone())
    quantize(folder, tmp_path / "b", POLICY, guide=build(made), shard_bytes=10**9, workers=4)
    assert len(overlaps) > 15 and not any(overlaps)


def test_calibrated_and_folded_files_are_the_same_for_any_number_of_workers(checkpoint, tmp_path):
    folder, _ = checkpoint()
    config = read_config(folder)
    tokens = (np.arange(16 * 16).reshape(16, 16) * 7919 % 191).astype(np.int32)

    def guided(source, plan, work):
        return ScaleFolding(Calibration(config, source, plan, tokens, work), plan, "minimax_m2", "search", work)

    for workers in (1, 3):
        quantize(folder, tmp_path / str(workers), POLICY, guide=guided, workers=workers, shard_bytes=10**6)
    files = sorted((tmp_path / "1").iterdir())
    assert len(files) > 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


def test_a_disk_without_room_for_a_guides_files_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Guide, "disk", 10**16)
    with pytest.raises(RotorError, match="not enough disk"):
        quantize(checkpoint()[0], tmp_path / "out", POLICY, guide=build([]), **OPTIONS)
    assert not (tmp_path / "out").exists()
