"""Check results of kernels: what is kept, for which machine, and what a call meets then."""

import json

import mlx.core as mx
import pytest

from mlx_rotor import RotorError, codec, kernels
from mlx_rotor.experts import formats
from mlx_rotor.kernels import AttentionArgs, ExactSegment, PackedSegment, PackedSide, check_results, experts, metal
from mlx_rotor.kernels.check_results import Failure, Slower
from mlx_rotor.kernels.spec import PackedWeight

TURBO4, TURBO2, ISO3 = (codec.get(name, 64) for name in ("turbo4", "turbo2", "iso3"))
ENCODE = Failure("encode: turbo4, 64 x float16", "encode", ("turbo4@64",), "float16")
PAIR = Failure("prefill: turbo4/turbo2, 64 x float16", "attend", ("turbo4@64", "turbo2@64"), "float16")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path / "kept"))
    check_results.forget()
    yield tmp_path / "kept"
    check_results.forget()


def refused(operation, *codecs, dtype=mx.float16):
    try:
        check_results.refuse(operation, dtype, *codecs)
    except RotorError as e:
        return str(e)
    return ""


def test_nothing_is_refused_without_a_file(folder):
    assert check_results.failures() == () and not folder.exists()
    assert not refused("encode", TURBO4)


def test_what_failed_is_refused_by_name_and_nothing_else():
    check_results.record([ENCODE.check, PAIR.check, "dequantize: iso3, 64 x float16"], [ENCODE, PAIR])
    said = refused("encode", TURBO4)
    assert ENCODE.check in said and "MLX_ROTOR_BACKEND=reference" in said and "doctor.json" in said
    assert PAIR.check in refused("attend", TURBO4, TURBO2)
    assert not refused("encode", TURBO4, dtype=mx.float32)
    assert not refused("encode", TURBO2)
    assert not refused("encode", codec.get("turbo4", 128))
    assert not refused("attend", TURBO4, ISO3)
    assert not refused("attend", TURBO4, TURBO4)
    assert not refused("dequantize", TURBO4)


def test_a_codec_that_failed_with_itself_is_refused_in_every_pair():
    check_results.record(["x"], [Failure("x", "attend", ("iso3@64",), "float16")])
    assert refused("attend", TURBO4, ISO3) and refused("attend", ISO3, ISO3)
    assert not refused("attend", TURBO4, TURBO2)


def test_a_check_that_passes_later_is_forgotten_and_others_stay(folder):
    check_results.record([ENCODE.check, PAIR.check], [ENCODE, PAIR])
    assert refused("encode", TURBO4)
    check_results.record([ENCODE.check], [])
    assert not refused("encode", TURBO4) and refused("attend", TURBO4, TURBO2)
    check_results.record([PAIR.check], [])
    assert json.loads((folder / "kernels.json").read_text()) == {}
    assert [file.name for file in folder.iterdir()] == ["kernels.json"]


def test_check_results_hold_for_one_device_mlx_and_kernels(monkeypatch):
    check_results.record([ENCODE.check], [ENCODE])
    here = check_results.key()
    with monkeypatch.context() as patch:
        patch.setattr(check_results, "key", lambda: f"another {here}")
        check_results.forget()
        assert check_results.failures() == () and not refused("encode", TURBO4)
        check_results.record([PAIR.check], [PAIR])
        assert check_results.failures() == (PAIR,)
    check_results.forget()
    assert check_results.failures() == (ENCODE,)
    assert all(part in here for part in ("mlx ", "kernels ", check_results.kernels_digest()))


def test_the_digest_is_of_the_sources(monkeypatch, tmp_path):
    before = check_results.kernels_digest()
    (tmp_path / "one.h").write_text("int one;\n")
    check_results.kernels_digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(check_results.metal, "root", lambda: tmp_path)
        other = check_results.kernels_digest()
        (tmp_path / "one.h").write_text("int two;\n")
        check_results.kernels_digest.cache_clear()
        assert len({before, other, check_results.kernels_digest()}) == 3
    check_results.kernels_digest.cache_clear()
    assert check_results.kernels_digest() == before


def test_nothing_is_written_where_nothing_failed(folder):
    check_results.record([ENCODE.check], [])
    assert not folder.exists()


def test_a_check_may_run_what_is_refused():
    check_results.record([ENCODE.check], [ENCODE])
    with check_results.ignored():
        assert not refused("encode", TURBO4)
    assert refused("encode", TURBO4)


def test_the_file_is_read_once(folder):
    assert not refused("encode", TURBO4)
    folder.mkdir()
    (folder / "kernels.json").write_text("nonsense")
    assert not refused("encode", TURBO4)


@pytest.mark.parametrize("text", ["", "[]", "[1]", '{"a": 3}', '{"a": [{"check": "x"}]}'])
def test_a_spoilt_file_is_an_error_that_names_it(folder, text):
    folder.mkdir()
    (folder / "kernels.json").write_text(text)
    for use in (
        check_results.failures,
        lambda: check_results.record(["x"], []),
        lambda: check_results.refuse("encode", mx.float16),
    ):
        with pytest.raises(RotorError, match=r"kernels\.json is not a file of check results"):
            use()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_ROTOR_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(RotorError, match="set MLX_ROTOR_CACHE"):
        check_results.record([ENCODE.check], [ENCODE])


def test_operations_refuse_what_failed_and_only_on_the_metal_backend(monkeypatch):
    x = mx.random.normal((1, 1, 40, 64)).astype(mx.float16)
    side = PackedSide(TURBO4, *kernels.encode(TURBO4, x))
    segments = [PackedSegment(40, side, side), ExactSegment(x, x)]
    uses = {
        "encode": lambda: kernels.encode(TURBO4, x),
        "attend": lambda: kernels.attend(x[:, :, :1], segments, AttentionArgs(scale=1.0)),
        "dequantize": lambda: kernels.dequantize(side, 0, 40, mx.float16),
    }
    ids = ("turbo4@64",)
    check_results.record(uses, [Failure(f"check of {name}", name, ids, "float16") for name in uses])
    metal.use_maker(lambda **text: pytest.fail("a refused kernel is made"))
    for name, use in uses.items():
        monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
        with pytest.raises(RotorError, match=f"check of {name}"):
            use()
        monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
        mx.eval(use())
    metal.use_maker(None)


def test_a_codecs_parameter_makes_no_other_kernel():
    ids = {check_results.codec_id(codec.get(name, 64)) for name in ("fp8", "fp8:0.5", "fp8:0.25")}
    assert ids == {"fp8@64"}


KEY = "affine2:64+affine2:64+affine3:64 3072x1536"


def matrix(mode="affine", bits=2, group=64, rows=8, columns=128):
    """A stack of two matrices of zeros."""
    form = formats.get(mode, bits, group)
    return PackedWeight(form, tuple(mx.zeros(t.shape, t.dtype) for t in form.tensors((2, rows), columns)), columns)


def test_a_key_names_formats_and_dimensions():
    made = (matrix(rows=1536, columns=3072), matrix(rows=1536, columns=3072), matrix(bits=3, rows=3072, columns=1536))
    assert check_results.experts_key(*made) == KEY
    assert check_results.format_id(formats.get("lloyd", 3, 256)) == "lloyd3:256"


def test_timings_and_failures_stand_beside_each_other(folder):
    check_results.record([ENCODE.check], [ENCODE])
    slow = Slower(KEY, 2, 3.0, 2.0)
    check_results.record_timings([(KEY, 1), (KEY, 2)], [slow])
    assert check_results.failures() == (ENCODE,) and check_results.slower() == (slow,)
    assert [check_results.prefers_stock(KEY, n) is None for n in (1, 2, 3, 8, 9)] == [True, False, True, True, True]
    assert check_results.prefers_stock(KEY.replace("3072", "2048"), 2) is None
    check_results.record([ENCODE.check], [])
    assert check_results.slower() == (slow,) and check_results.failures() == ()
    check_results.record_timings([(KEY, 1)], [])
    assert check_results.slower() == (slow,)
    check_results.record_timings([(KEY, 2)], [])
    assert check_results.slower() == () and json.loads((folder / "kernels.json").read_text()) == {}


def test_a_file_without_timings_is_read(folder):
    folder.mkdir()
    entry = {"check": ENCODE.check, "operation": "encode", "codecs": ["turbo4@64"], "dtype": "float16"}
    (folder / "kernels.json").write_text(json.dumps({check_results.key(): [entry], "another machine": [entry]}))
    assert check_results.failures() == (ENCODE,) and check_results.slower() == ()
    check_results.record_timings([(KEY, 1)], [Slower(KEY, 1, 2.0, 1.0)])
    assert check_results.failures() == (ENCODE,) and "another machine" in json.loads(
        (folder / "kernels.json").read_text()
    )


@pytest.mark.parametrize("entry", [{"fused_ms": 1}, {"key": "x", "rows": "many", "fused_ms": 1, "stock_ms": 2}])
def test_a_spoilt_timing_is_an_error_that_names_the_file(folder, entry):
    folder.mkdir()
    (folder / "kernels.json").write_text(json.dumps({"a": [entry]}))
    for use in (check_results.failures, check_results.slower, lambda: check_results.prefers_stock(KEY, 1)):
        with pytest.raises(RotorError, match=r"kernels\.json is not a file of check results"):
            use()


def test_a_format_that_failed_is_left_to_stock():
    failure = Failure("down, 1 row: affine3:64, bfloat16", "down", ("affine3:64",), "bfloat16")
    check_results.record([failure.check], [failure])
    assert failure.check in check_results.prefers_stock(KEY, 1)
    assert check_results.prefers_stock(KEY.replace("affine3", "affine4"), 1) is None
    with check_results.ignored():
        assert check_results.prefers_stock(KEY, 1) is None
    matmul = Failure("matmul: affine3:64, bfloat16", "matmul", ("affine3:64",), "bfloat16")
    check_results.record([failure.check, matmul.check], [matmul])
    assert check_results.prefers_stock(KEY, 1) is None, "experts are made of other kernels"


def test_expert_operations_refuse_what_failed_and_only_on_the_metal_backend(monkeypatch):
    x, w, which = mx.zeros((1, 128), mx.float16), matrix(), mx.zeros((1, 1), mx.uint32)
    one = PackedWeight(w.format, tuple(part[0] for part in w.parts), w.columns)
    uses = {
        "matmul": lambda: experts.matmul(x, one),
        "gather": lambda: experts.gather(x, w, which[0]),
        "gate_up": lambda: experts.gate_up(x, w, w, which, "swiglu"),
        "down": lambda: experts.down(x[:, None], w, which),
    }
    check_results.record(uses, [Failure(f"check of {name}", name, ("affine2:64",), "float16") for name in uses])
    metal.use_maker(lambda **text: pytest.fail("a refused kernel is made"))
    for name, use in uses.items():
        monkeypatch.setenv("MLX_ROTOR_BACKEND", "metal")
        with pytest.raises(RotorError, match=f"check of {name}"):
            use()
        monkeypatch.setenv("MLX_ROTOR_BACKEND", "reference")
        mx.eval(use())
    metal.use_maker(None)
