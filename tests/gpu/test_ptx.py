"""PTX of our headers and of MLX's kernels: ptxas takes it; the headers' algorithms give the simulator's values; and
where there is a GPU, so does the GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_sim import SUPPORTED, UNSUPPORTED, CompileError, Kernel, Options, ToolsMissing, bits, build, mlx_source
from metal_sim.test_mlx_kernels import QUANTIZED
from mlx_rotor import codec
from mlx_rotor.kernels import AttentionArgs, PackedSegment, PackedSide, metal
from mlx_rotor.kernels.attention import attend_metal
from mlx_rotor.kernels.packing import dequantize_metal, encode_metal

from . import cuda, parity, ptx, timing, toolkit
from .launch import PtxKernel, Recorder
from .samples import samples

pytestmark = [pytest.mark.gpu, pytest.mark.nightly, pytest.mark.skipif(not SUPPORTED, reason=UNSUPPORTED)]
ARCHES = ["sm_80", "sm_90"]
SAMPLES = {sample.name: sample for sample in samples()} if SUPPORTED else {}
SDPA = ("sdpa_vector.h", "sdpa_vector", "", (1024, 1, 1))
QMV = ("quantized.h", "affine_qmv_fast", QUANTIZED, (32, 2, 1))
QMM = ("quantized.h", "affine_qmm_t", QUANTIZED, (32, 2, 2))
MLX_KERNELS = [
    *((SDPA, [dtype, "128", "128"]) for dtype in ("float", "half", "bfloat")),
    *((QMV, [dtype, "64", "4", "false"]) for dtype in ("float", "half", "bfloat")),
    (QMM, ["half", "64", "4", "true", "false"]),
]


def objections(text: str, arch: str, folder: Path) -> str:
    """What ptxas says against `text`, optimising little: it then takes a second; skips where there is no ptxas."""
    if not (assembler := toolkit.ptxas()):
        pytest.skip(f"no ptxas: {toolkit.INSTALL}")
    (folder / "kernel.ptx").write_text(text)
    command = [assembler, f"-arch={arch}", "-O0", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr or ("" if done.returncode == 0 else f"status {done.returncode}")


def needs_libdevice():
    if not toolkit.libdevice():
        pytest.skip(f"no libdevice: {toolkit.INSTALL}")


def compiled(name: str, arch: str) -> str:
    recorder = Recorder(arch, simulate=False)
    SAMPLES[name].run(recorder)
    return recorder.launches[0].ptx


def simulated(name: str) -> list[np.ndarray]:
    return [bits(a) for a in SAMPLES[name].run(lambda **fields: Kernel(**fields), options=Options(mode="fast"))]


def apart(name: str, got: list[np.ndarray], wanted: list[np.ndarray]) -> dict[str, float]:
    """Output -> difference, of those that are too far apart."""
    dtypes = [str(dtype).removeprefix("mlx.core.") for _, dtype in SAMPLES[name].outputs.values()]
    outputs = zip(SAMPLES[name].outputs, got, wanted, dtypes, strict=True)
    return {o: parity.difference(a, b, dtype) for o, a, b, dtype in outputs if not parity.agrees(a, b, dtype)}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", SAMPLES)
def test_ptxas_takes_every_operation(name, arch, tmp_path):
    if name == "maths":
        needs_libdevice()
    text = compiled(name, arch)
    assert objections(text, arch, tmp_path) == ""
    assert re.findall(r"^\.visible \.(?:entry|func) (\w+)", text, re.MULTILINE) == [ptx.ENTRY]
    assert ".const" not in text


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("kernel", "arguments"), MLX_KERNELS, ids=lambda v: "-".join(v) if isinstance(v, list) else v[1]
)
def test_ptxas_takes_mlx_kernels(kernel, arguments, arch, tmp_path):
    needs_libdevice()
    file, name, before, threadgroup = kernel
    text = ptx.ptx(mlx_source(file), name, arguments, arch, threadgroup=threadgroup, before=before, lenient=True)
    assert objections(text, arch, tmp_path) == ""


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("pair", [*timing.PAIRS[2:], ("iso3", "rotor3"), ("planar4", "iso2")], ids="-".join)
def test_ptxas_takes_our_kernels(pair, arch, tmp_path):
    """A decode step of 48 query heads over 8, a prefill of 40 queries, both codecs' encoding and decoding."""
    needs_libdevice()
    recorder = Recorder(arch, simulate=False)
    metal.use_maker(recorder)
    try:
        sides = []
        for made in (codec.get(name, timing.DIM) for name in pair):
            packed = encode_metal(made, mx.zeros((1, 2, 40, timing.DIM), mx.float16))
            sides.append(PackedSide(made, *packed))
            dequantize_metal(sides[-1], 0, 40, mx.float16)
        queries = mx.zeros((1, 12, 40, timing.DIM), mx.float16)
        attend_metal(queries, None, [PackedSegment(40, *sides)], None, AttentionArgs(scale=1.0, mask="causal"))
    finally:
        metal.use_maker(None)
    launches = recorder.launches + timing.launches(pair, timing.ENCODED, arch)
    kinds = {launch.name.split("_")[2] for launch in launches}
    assert kinds == {"encode", "dequantize", "rotate", "prefill", "decode", "merge"}
    texts = {launch.ptx for launch in launches}
    assert [objections(text, arch, tmp_path) for text in texts] == [""] * len(texts)


def test_ptxas_objects_to_what_is_no_ptx(tmp_path):
    broken = compiled("tree", "sm_80").replace("ld.shared", "ld.sharde", 1)
    assert "Unknown modifier '.sharde'" in objections(broken, "sm_80", tmp_path)


def emulated(partial: bool) -> Path:
    """The GPU's headers, the simulator behind their instructions; `partial`: they ask which lanes there are."""
    instead = (Path(__file__).parent / "emulated" / "msl_simd.h").read_text()
    define = "#define MSL_PARTIAL\n" if partial else ""

    def make(folder: Path) -> None:
        shutil.copytree(ptx.headers(), folder)
        (folder / "msl_gpu.h").write_text(define + (folder / "msl_simd.h").read_text())
        (folder / "msl_simd.h").write_text(instead)
        (folder / "prelude.h").write_text(build.PRELUDE)

    return build.kept(f"emulated {ptx.headers()} {define} {instead}", "", make)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_headers_give_the_simulators_values(name, partial, monkeypatch):
    """The headers, with the simulator's runtime for the GPU's instructions."""
    if not partial and name in ("lanes_partial", "lanes_short"):
        pytest.skip("its simdgroups are not whole")
    wanted = simulated(name)
    folder = emulated(partial)
    monkeypatch.setattr(build, "headers", lambda: folder)
    build.front_end.cache_clear()
    try:
        assert apart(name, simulated(name), wanted) == {}
    finally:
        build.front_end.cache_clear()


def test_what_it_takes_from_the_launch():
    whole, partial, cut = (compiled(name, "sm_80") for name in ("lanes_uint", "lanes_partial", "places"))
    assert ".maxntid 64, 1, 1\n" in whole
    assert "shfl.sync.bfly.b32" in whole and "shfl.sync.bfly.b32" in partial
    assert all(line.rstrip().endswith(", -1;") for line in whole.splitlines() if "shfl.sync" in line)
    assert not any(line.rstrip().endswith(", -1;") for line in partial.splitlines() if "shfl.sync" in line)
    assert ".maxntid 4, 3, 2\n" in cut


def kernel_of(source: str, **fields) -> PtxKernel:
    return PtxKernel("k", ["a"], ["o"], source, arch="sm_80", **fields)


def call(size: int, grid: cuda.Size, threadgroup: cuda.Size) -> dict:
    return {
        "inputs": [mx.zeros(size)],
        "output_shapes": [(size,)],
        "output_dtypes": [mx.float32],
        "grid": grid,
        "threadgroup": threadgroup,
    }


def test_without_libdevice_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(toolkit, "libdevice", lambda: None)
    arguments = call(8, (8, 1, 1), (8, 1, 1))
    kernel_of("uint i = thread_position_in_grid.x; o[i] = exp2(a[i]) + sqrt(a[i]);").launch(**arguments)
    with pytest.raises(ToolsMissing, match=r"__nv_expf, __nv_tanhf: NVIDIA's libdevice.10.bc has them; install a CUDA"):
        kernel_of("uint i = thread_position_in_grid.x; o[i] = exp(a[i]) + tanh(a[i]);").launch(**arguments)


def test_what_metal_refuses():
    arguments = call(64, (64, 1, 1), (64, 1, 1))
    with pytest.raises(CompileError, match="33024 bytes of threadgroup memory: Metal has 32768"):
        kernel_of("threadgroup float s[8256]; s[0] = a[0]; o[0] = s[1];").launch(**arguments)
    with pytest.raises(CompileError, match="member reference base type"):
        kernel_of("o[0] = a[0].nothing;").launch(**arguments)
    with pytest.raises(ValueError, match="more than 1024 threads"):
        kernel_of("o[0] = a[0];").launch(**call(64, (64, 64, 1), (64, 64, 1)))
    with pytest.raises(ValueError, match="cuts threadgroups"):
        kernel_of("o[0] = a[0];").launch(**call(64, (40, 4, 1), (32, 4, 1)))
    with pytest.raises(ValueError, match=r"compute capability 7\.5: bfloat needs 8.0"):
        ptx.architecture(7, 5)
    assert [ptx.architecture(*capability) for capability in ((8, 6), (9, 0), (12, 0))] == ["sm_86", "sm_90", "sm_90"]


def test_a_launch_comes_back_from_its_file(tmp_path):
    recorder = Recorder("sm_90")
    for name in ("strided", "matrix_bfloat", "atomics", "fma_1"):
        SAMPLES[name].run(recorder)
    for launch in recorder.launches:
        launch.save(tmp_path / "launch.npz")
        back = cuda.Launch.load(tmp_path / "launch.npz")
        assert (back.name, back.ptx, back.groups, back.threadgroup) == (
            launch.name,
            launch.ptx,
            launch.groups,
            launch.threadgroup,
        )
        for a, b in zip(back.arguments, launch.arguments, strict=True):
            assert (a.name, a.dtype, a.written, a.array.dtype) == (b.name, b.dtype, b.written, b.array.dtype)
            assert a.array.shape == b.array.shape and a.array.tobytes() == b.array.tobytes()
    large = cuda.Launch(
        "l", "", (cuda.Argument("a", np.arange(200_000, dtype=np.uint32), "uint32"),), (1, 1, 1), (1, 1, 1)
    )
    large.save(tmp_path / "launch.npz")
    (again,) = cuda.Launch.load(tmp_path / "launch.npz").arguments
    np.testing.assert_array_equal(again.array, np.arange(200_000) % cuda.LARGEST_SAVED)


def test_a_difference_is_seen():
    one = np.ones(4, np.float32)
    assert parity.agrees(one, one * np.float32(1 + 1e-6), "float32")
    assert not parity.agrees(one, one * np.float32(1.001), "float32")
    assert not parity.agrees(cuda.unwritten((4,), one.dtype), one, "float32")
    assert not parity.agrees(one[:3], one, "float32")
    assert parity.difference(np.arange(4), np.array([0, 1, 2, 4]), "int64") == 0.25
    assert not parity.agrees(np.array([0x3F80], np.uint16), np.array([0x3F88], np.uint16), "bfloat16")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_gpu_gives_the_simulators_values(name):
    if reason := cuda.unavailable():
        pytest.skip(reason)
    got = [bits(a) for a in SAMPLES[name].run(PtxKernel)]
    assert apart(name, got, simulated(name)) == {}
