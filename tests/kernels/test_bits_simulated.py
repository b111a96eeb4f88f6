"""`common/bits.h` as Metal, in the simulator: it reads what the codecs pack, and a mistake in it does not go unseen."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metal_sim import SUPPORTED, UNSUPPORTED, CompileError, Kernel, Options
from mlx_rotor.codec import packing
from mlx_rotor.kernels import source

pytestmark = pytest.mark.skipif(not SUPPORTED, reason=UNSUPPORTED)

HEADER = source.load("common/bits.h").text
DIMS = (80, 96, 128, 256)
WORDS = [mx.uint16, mx.uint32]
SCHEDULES = [Options(), Options(order="reverse"), Options(order="random", seed=11)]
# A thread unpacks one word of every plane of a vector, in each of the three ways the header has.
BODY = """
  constexpr uint width = 8 * sizeof(Word);
  uint words = plane_words<Word>(dim);
  uint vector = thread_position_in_grid.x / words, w = thread_position_in_grid.x % words;
  auto mine = planes + vector * BITS * words;
  uint block[BITS];
  plane_load<BITS>(mine, words, w, block);
  for (uint i = 0; i < width && w * width + i < dim; ++i) {
    uint t = w * width + i;
    of_block[vector * dim + t] = uchar(plane_field<BITS>(block, i));
    alone[vector * dim + t] = uchar(plane_field_at<BITS>(mine, words, t));
    grouped[vector * dim + t] = uchar(plane_bytes<BITS>(block, i % 8) >> (8 * (i / 8)));
  }
"""


def packed(vectors: int, dim: int, bits: int, word: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Fields [vectors, dim] and their planes [vectors, bits, words] of `word`, whichever width the codecs take."""
    fields = np.random.default_rng(dim + bits).integers(0, 2**bits, (vectors, dim), dtype=np.uint32)
    padded = np.zeros((vectors, -(-dim // 32) * 32), np.uint32)
    padded[:, :dim] = fields
    native = packing.pack(mx.array(fields), bits)
    if native.dtype == mx.uint32 and word == mx.uint16:
        native = mx.view(native, mx.uint16)  # the same bytes
    elif native.dtype != word:
        native = packing.pack(mx.array(padded), bits)
    assert native.dtype == word
    assert mx.array_equal(packing.unpack(native)[:, :dim], mx.array(fields))
    return mx.array(fields), native


def objections(planes: mx.array, dim: int, fields: mx.array, options: Options, header=HEADER, body=BODY) -> list[str]:
    """What the simulator finds, and which of the ways to read gives other fields."""
    vectors, bits, words = planes.shape
    outputs = ["of_block", "alone", "grouped"]
    result = Kernel("bits", ["planes", "dim"], outputs, body, header).run(
        [planes, mx.array(dim, mx.uint32)],
        [(vectors, dim)] * 3,
        [mx.uint8] * 3,
        (vectors * words, 1, 1),
        (32, 1, 1),
        [("BITS", bits), ("Word", planes.dtype)],
        options=options,
    )
    read = zip(outputs, result.outputs, strict=True)
    wrong = [f"wrong value: {name}" for name, got in read if not mx.array_equal(got, fields)]
    return [*result.report.findings(), *wrong]


@pytest.mark.parametrize("word", WORDS, ids=["ushort", "uint"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_reads_what_the_codecs_pack(bits, word):
    for dim in DIMS:
        fields, planes = packed(3, dim, bits, word)
        for options in SCHEDULES:
            assert objections(planes, dim, fields, options) == [], (dim, options)


@pytest.mark.parametrize(("bits", "dim"), [(1, 96), (2, 96), (1, 128)])
def test_planes_in_constant_memory(bits, dim):
    fields, planes = packed(1, dim, bits, mx.uint32)
    assert planes.size < 8
    assert objections(planes, dim, fields, Options()) == []


def mutated(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{text.count(old)} times: {old}"
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "objection"),
    [
        ("p < BITS; ++p) {\n    block[p]", "p <= BITS; ++p) {\n    block[p]", "array index out of range"),
        ("planes[p * stride + w]", "planes[p * stride + w + 1]", "out of bounds: load"),
        ("planes[p * stride + w]", "planes[(p + 1) * stride + w]", "out of bounds: load"),
        ("planes[p * stride + w]", "planes[p + stride * w]", "wrong value: of_block"),
        ("- 1u) / (8u", "+ 15u) / (8u", "out of bounds: load"),
        ("- 1u) / (8u", "- 31u) / (8u", "unwritten bytes of"),
        ("((block[p] >> i) & 1u) << p", "((block[p] >> i) & 1u) << (p + 1)", "wrong value: of_block"),
        ("((block[p] >> i) & 1u) << p", "((block[p] >> (i + 1)) & 1u) << p", "wrong value: alone"),
        ("((block[p] >> i) & 1u) << p", "(block[p] >> i) << p", "wrong value: of_block"),
        ("& 0x01010101u) << p", "& 0x01010101u) >> p", "wrong value: grouped"),
        ("0x01010101u", "0x01010001u", "wrong value: grouped"),
        ("t / width, block", "t / width + 1, block", "out of bounds: load"),
        ("plane_field(block, t % width)", "plane_field(block, t % (width - 1))", "wrong value: alone"),
        ("constexpr uint width = 8u", "constexpr uint width = 4u", "out of bounds: load"),
    ],
)
def test_a_mistake_in_the_header_is_seen(old, new, objection):
    fields, planes = packed(3, 80, 3, mx.uint16)
    said = objections(planes, 80, fields, Options(), header=mutated(HEADER, old, new))
    assert any(objection in line for line in said), said


ANY_SPACE = "<uint BITS, typename Planes>\nstatic inline void plane_load(Planes planes"
ONE_SPACE = "<uint BITS>\nstatic inline void plane_load(const constant ushort *planes"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uint w, thread uint (&block)", "uint w, uint (&block)"),
        ("plane_field(const thread uint (&block)", "plane_field(const uint (&block)"),
        ("plane_bytes(const thread uint (&block)", "plane_bytes(const device uint (&block)"),
        (ANY_SPACE, ONE_SPACE),
    ],
    ids=["missing-in-plane_load", "missing-in-plane_field", "wrong-in-plane_bytes", "fixed-in-plane_load"],
)
def test_a_mistake_in_an_address_space_is_seen(old, new):
    fields, planes = packed(3, 80, 3, mx.uint16)
    with pytest.raises(CompileError, match=r"without an address space|no matching function"):
        objections(planes, 80, fields, Options(), header=mutated(HEADER, old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [("i < width && w * width + i < dim", "i < width"), ("w * width + i < dim", "w * width + i <= dim")],
)
def test_a_loose_bound_around_it_is_seen(old, new):
    """80 elements in words of 32 bits: the last word of a vector is half full."""
    fields, planes = packed(3, 80, 3, mx.uint32)
    said = objections(planes, 80, fields, Options(), body=mutated(BODY, old, new))
    assert any("out of bounds: store" in line or "race on device memory" in line for line in said), said
