"""Whole jobs on synthetic checkpoints: what is written, in how much memory, and what a failure leaves."""

import json
import shutil
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from quantizing import quantize

from mlx_rotor.errors import RotorError
from mlx_rotor.fit import rows
from mlx_rotor.quant import Recipe, dry_run
from mlx_rotor.quant.job import manifest, stream
from mlx_rotor.quant.job.workplace import WORK
from mlx_rotor.quant.policy import load, parse

EIGHT = load("uniform-8bit")
MIXED = parse(
    """
    [[rule]]
    roles = ["router", "router.bias", "norm", "attn.v"]
    keep = true
    [[rule]]
    roles = ["expert.down"]
    layers = ["last 1"]
    bits = 6
    group_size = 32
    [[rule]]
    roles = ["embed", "head", "attn.*", "expert.*"]
    bits = 8
    """,
    "mixed",
)
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


def expected(tensors, truth, module):
    """The weight of an output module, from the source's tensors."""
    if ".switch_mlp." not in module:
        return truth(tensors, module if module in tensors else f"{module}.weight")
    layer, name = module.split(".block_sparse_moe.")[0], EXPERT[module.rsplit(".", 1)[1].removesuffix("_proj")]
    parts = sum(f"{layer}.block_sparse_moe.experts." in n and n.endswith(f".{name}.weight") for n in tensors)
    stack = [truth(tensors, f"{layer}.block_sparse_moe.experts.{e}.{name}.weight") for e in range(parts)]
    return np.stack(stack)


def stored(out):
    return {name: values for file in sorted(out.glob("*.safetensors")) for name, values in mx.load(str(file)).items()}


@pytest.mark.parametrize("piece", [1 << 22, 1])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("method", ["search", "fast"])
def test_every_weight_ends_up_in_its_place(checkpoint, truth, tmp_path, monkeypatch, method, fp8, piece):
    monkeypatch.setattr(stream, "PIECE", piece)
    folder, tensors = checkpoint(fp8=fp8)
    result = quantize(folder, tmp_path / "out", MIXED, fit=method)
    found = stored(tmp_path / "out")
    assert found.keys() == {o.name for e in result.plan.entries for o in e.outputs}
    for entry in result.plan.entries:
        weight = expected(tensors, truth, entry.module)
        if entry.spec is None:
            kept = found[entry.outputs[0].name]
            assert kept.dtype == (mx.float32 if entry.role == "router.bias" else mx.bfloat16)
            np.testing.assert_array_equal(
                np.array(kept.astype(mx.float32)), np.array(mx.array(weight).astype(kept.dtype).astype(mx.float32))
            )
            continue
        packed, scales, biases = (found[o.name] for o in entry.outputs)
        assert (packed.dtype, scales.dtype, biases.dtype) == (mx.uint32, mx.bfloat16, mx.bfloat16)
        decoded = mx.dequantize(
            packed, scales.astype(mx.float32), biases.astype(mx.float32), entry.spec.group_size, entry.spec.bits
        )
        error = np.linalg.norm(np.array(decoded) - weight) / np.linalg.norm(weight)
        assert error < (0.02 if entry.spec.bits == 8 else 0.05), entry.module


def test_errors_by_role_are_those_of_what_was_stored(checkpoint, truth, tmp_path):
    folder, tensors = checkpoint()
    result = quantize(folder, tmp_path / "out", load("config-i"))
    found = stored(tmp_path / "out")
    sums = {}
    for entry in result.plan.entries:
        if entry.spec:
            weight = expected(tensors, truth, entry.module)
            packed, scales, biases = (found[o.name] for o in entry.outputs)
            decoded = np.array(
                mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), 64, entry.spec.bits)
            )
            one = np.array([((decoded - weight) ** 2).sum(), (weight**2).sum()])
            sums[entry.role] = sums.get(entry.role, 0) + one
    for role, (error, norm) in sums.items():
        assert result.errors[role] == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert result.errors["router"] == result.errors["router.bias"] == 0


def test_search_has_less_error_than_fast(checkpoint, tmp_path):
    folder, _ = checkpoint()
    search, fast = (quantize(folder, tmp_path / f, load("uniform-2bit"), fit=f).errors for f in ("search", "fast"))
    for role, error in fast.items():
        assert search[role] < 0.9 * error or error == 0


def test_fast_gives_the_codes_of_stock_conversion(checkpoint, tmp_path):
    from mlx_lm.utils import load_model

    folder, _ = checkpoint()
    quantize(folder, tmp_path / "out", load("uniform-4bit"), fit="fast")
    found = stored(tmp_path / "out")
    model, _ = load_model(folder, lazy=True)
    modules = dict(model.named_modules())
    names = [name.removesuffix(".scales") for name in found if name.endswith(".scales")]
    assert len(names) == 2 + 2 * 7
    for name in names:
        theirs = mx.quantize(modules[name].weight.astype(mx.bfloat16), 64, 4)
        for part, values in zip(("weight", "scales", "biases"), theirs, strict=True):
            assert mx.array_equal(found[f"{name}.{part}"], values), name


def test_config_names_every_module_that_deviates_and_nothing_else(checkpoint, tmp_path):
    folder, _ = checkpoint()
    result = quantize(folder, tmp_path / "out", MIXED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config["quantization"]
    assert config["quantization_config"] == section
    assert {k: section[k] for k in ("group_size", "bits", "mode")} == {"group_size": 64, "bits": 8, "mode": "affine"}
    down = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    assert {k: v for k, v in section.items() if isinstance(v, dict)} == {
        down: {"group_size": 32, "bits": 6, "mode": "affine"}
    }
    assert len(section) == 4
    source = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in config.items() if "quantization" not in k} == {
        k: v for k, v in source.items() if k != "quantization_config"
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": result.plan.nbytes, "total_parameters": result.plan.parameters}
    provenance = json.loads((tmp_path / "out" / "mlx_rotor.json").read_text())
    assert provenance["policy"] == {"name": "mixed", "description": "", "sha256": MIXED.digest}
    assert provenance["source"] == "source" and provenance["fit"] == "search"


def test_router_keeps_its_own_dtype(checkpoint, tmp_path):
    folder, tensors = checkpoint(router="F32")
    quantize(folder, tmp_path / "out", EIGHT)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    router = stored(tmp_path / "out")[name]
    assert router.dtype == mx.float32
    np.testing.assert_array_equal(np.array(router), tensors[name][1])


def test_shards_hold_at_most_their_size_and_the_index_names_them(checkpoint, tmp_path):
    folder, _ = checkpoint()
    whole = quantize(folder, tmp_path / "whole", EIGHT)
    cut = quantize(folder, tmp_path / "cut", EIGHT, shard_bytes=60_000)
    assert whole.files == ("model.safetensors",)
    assert len(cut.files) > 4 and cut.files[-1] == f"model-{len(cut.files):05d}-of-{len(cut.files):05d}.safetensors"
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["weight_map"]
    largest = max(entry.nbytes for entry in cut.plan.entries)
    for file in cut.files:
        tensors = mx.load(str(tmp_path / "cut" / file))
        assert sum(v.nbytes for v in tensors.values()) <= max(60_000, largest)
        assert {name for name, where in index.items() if where == file} == set(tensors)
    one, many = stored(tmp_path / "whole"), stored(tmp_path / "cut")
    assert one.keys() == many.keys() and all(mx.array_equal(one[k], many[k]) for k in one)


def test_equal_inputs_give_equal_files(checkpoint, tmp_path):
    folder, _ = checkpoint()
    for name in ("a", "b"):
        quantize(folder, tmp_path / name, MIXED)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir()) and "generation_config.json" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_memory_is_bounded_by_a_piece_not_by_the_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 1 << 14)
    monkeypatch.setattr(rows, "CPU_WEIGHTS", 1 << 12)
    peaks = []
    for name, layers, experts in (("small", 2, 3), ("large", 4, 12)):
        folder, _ = checkpoint(name=name, num_hidden_layers=layers, num_local_experts=experts, hidden_size=256)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        tracemalloc.start()
        result = quantize(folder, tmp_path / f"{name}-out", EIGHT, workers=1)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        peaks.append((mx.get_peak_memory() - before, python, result.plan.parameters * 4))
    (small, _, size), (large, python, whole) = peaks
    assert whole > 4 * size
    # A peak is lower by up to 6 % where a chunk's arrays happened to be freed early; either run may be the lucky one.
    assert large < 1.1 * small and large < whole / 10
    stack = 12 * 64 * 256 * 4
    assert large < 1.5 * stack and python < 2 * stack


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), RotorError)],
)
def test_a_job_that_stops_before_it_has_finished_anything_leaves_nothing(
    checkpoint, tmp_path, failure, raised, existing
):
    folder, _ = checkpoint()
    out = tmp_path / "deep" / "out"
    if existing:
        out.mkdir(parents=True)
    seen = []

    def stop(event):
        if event.kind == "unit":
            seen.extend(p.name for p in out.iterdir())
            raise failure

    with pytest.raises(raised, match="No space left on device; nothing was left" if raised is RotorError else None):
        quantize(folder, out, EIGHT, shard_bytes=60_000, progress=stop)
    assert any(name.endswith(".tmp") for name in seen) and "config.json" not in seen
    assert (list(out.iterdir()) == []) if existing else not (tmp_path / "deep").exists()


def test_config_comes_last(checkpoint, tmp_path, monkeypatch):
    folder, _ = checkpoint()
    seen = []
    config = manifest.config_of

    def spy(*args):
        seen.extend(p.name for p in (tmp_path / "out").iterdir())
        return config(*args)

    monkeypatch.setattr(manifest, "config_of", spy)
    quantize(folder, tmp_path / "out", EIGHT)
    assert sorted([*seen, "config.json"]) == sorted([*(p.name for p in (tmp_path / "out").iterdir()), WORK])


def test_values_that_are_not_finite_stop_the_job(checkpoint, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def alter(tensors):
        tensors[name][1][100, 3] = 0x7F

    folder, _ = checkpoint(alter=alter)
    with pytest.raises(RotorError, match=f"{name}: holds NaN.*with --resume to go on"):
        quantize(folder, tmp_path / "out", EIGHT)
    assert not (tmp_path / "out" / "config.json").exists()


def test_weights_too_large_to_fit_stop_the_job(checkpoint, tmp_path):
    name = "lm_head.weight"

    def alter(tensors):
        tensors[name][1][3, 3] = 0x7F00  # 1.7e38

    folder, _ = checkpoint(alter=alter)
    with pytest.raises(RotorError, match=rf"{name}: weights of up to 1\.701e\+38 are too large"):
        quantize(folder, tmp_path / "out", EIGHT)
    assert not (tmp_path / "out" / "config.json").exists()


def test_room_is_checked_before_anything_is_made(checkpoint, tmp_path, monkeypatch):
    folder, _ = checkpoint()
    plan, _ = dry_run(folder, Recipe(EIGHT))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes + 10))
    with pytest.raises(RotorError, match=r"not enough disk for --out .*: needs 0\.\d{3} MB, 0\.\d{3} MB are free"):
        quantize(folder, tmp_path / "out", EIGHT)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_only_the_config_and_checks_weights_that_are_there(checkpoint, tmp_path):
    folder, tensors = checkpoint()
    plan, size = dry_run(folder, Recipe(EIGHT))
    assert size == sum(values.nbytes for _, values in tensors.values())
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    assert dry_run(bare, Recipe(EIGHT)) == (plan, None)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RotorError, match="missing shard"):
        dry_run(folder, Recipe(EIGHT))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fit": "rtn"}, "unknown fit"), ({"shard_bytes": 0}, "shard of 0"), ({"workers": 0}, "0 workers")],
)
def test_bad_options_are_errors(checkpoint, tmp_path, options, message):
    folder, _ = checkpoint()
    with pytest.raises(RotorError, match=message):
        quantize(folder, tmp_path / "out", EIGHT, **options)
