"""`common/bits.h`, compiled as C++ with the address spaces defined away, against NumPy and the codecs' packing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from metal_sim.tools import cxx
from mlx_rotor.codec import packing
from mlx_rotor.kernels import source

HARNESS = """
using uint = unsigned int;
using ushort = unsigned short;
#define thread
%s
template <uint BITS, typename Word>
static void read(const void *memory, uint stride, uint dim, uint *at, uint *field, uint *bytes) {
  const Word *planes = static_cast<const Word *>(memory);
  const uint width = 8 * sizeof(Word);
  for (uint t = 0; t < dim; ++t) at[t] = plane_field_at<BITS>(planes, stride, t);
  for (uint w = 0; w < plane_words<Word>(dim); ++w) {
    uint block[BITS];
    plane_load(planes, stride, w, block);
    for (uint i = 0; i < width; ++i) field[width * w + i] = plane_field(block, i);
    for (uint q = 0; q < 8; ++q) bytes[8 * w + q] = plane_bytes(block, q);
  }
}
template <uint BITS>
static void dispatch(uint bits, bool wide, const void *m, uint s, uint d, uint *a, uint *f, uint *b) {
  if (bits != BITS) dispatch<BITS - 1>(bits, wide, m, s, d, a, f, b);
  else if (wide) read<BITS, uint>(m, s, d, a, f, b);
  else read<BITS, ushort>(m, s, d, a, f, b);
}
template <>
void dispatch<0>(uint, bool, const void *, uint, uint, uint *, uint *, uint *) {}
extern "C" void run(uint bits, bool wide, const void *m, uint s, uint d, uint *a, uint *f, uint *b) {
  dispatch<8>(bits, wide, m, s, d, a, f, b);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = [found] if found else cxx()
    folder = tmp_path_factory.mktemp("bits")
    (folder / "bits.cpp").write_text(HARNESS % source.load("common/bits.h").text)
    flags = ["-std=c++14", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    built = subprocess.run(
        [*compiler, *flags, "bits.cpp", "-o", "bits.so"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "bits.so"))


def pack(fields: np.ndarray, bits: int, word: type) -> np.ndarray:
    """fields: uint32 [d], each below 2**bits -> planes of `word` [bits, ceil(d / width)], the last word zero-filled."""
    width = 8 * np.dtype(word).itemsize
    words = -(-fields.size // width)
    padded = np.zeros(words * width, np.uint32)
    padded[: fields.size] = fields
    planes = (padded >> np.arange(bits, dtype=np.uint32)[:, None]) & 1
    shifts = np.arange(width, dtype=np.uint32)
    return (planes.reshape(bits, words, width) << shifts).sum(-1).astype(word)


def unpack(library, planes: np.ndarray, dim: int, gap: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All readers of the header: each element alone, each of a block, and the byte groups put back in order.

    planes: uint16 or uint32 [bits, words]; `gap` words of rubbish lie between one plane and the next.
    """
    bits, words = planes.shape
    width = 8 * planes.itemsize
    memory = np.full((bits, words + gap), 0xDEAD, planes.dtype)
    memory[:, :words] = planes
    at, field, grouped = (np.zeros(n, np.uint32) for n in (dim, width * words, 8 * words))
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (memory, at, field, grouped)]
    library.run(bits, ctypes.c_bool(width == 32), pointers[0], words + gap, dim, *pointers[1:])
    byte = 8 * np.arange(4, dtype=np.uint32)[:, None]
    fields_by_byte = (grouped.reshape(words, 1, 8) >> byte) & 0xFF
    assert not fields_by_byte[:, width // 8 :].any()
    return at, field[:dim], fields_by_byte[:, : width // 8].reshape(-1)[:dim]


def test_a_vector_packed_by_hand(library):
    planes = np.array([[0b101, 0b1], [0b110, 0b0]], np.uint32)
    for read in unpack(library, planes, 33):
        assert read[:4].tolist() == [1, 2, 3, 0]
        assert read[32] == 1
        assert not read[4:32].any()


@pytest.mark.parametrize("word", [np.uint16, np.uint32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_come_back(library, bits, word):
    rng = np.random.default_rng(bits)
    for dim in (1, 15, 16, 17, 31, 32, 33, 80, 128, 256):
        fields = rng.integers(0, 2**bits, dim, dtype=np.uint32)
        for gap in (0, 3):
            for read in unpack(library, pack(fields, bits, word), dim, gap):
                np.testing.assert_array_equal(read, fields)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_the_header_reads_what_the_codecs_pack(library, bits, dim):
    fields = np.random.default_rng(dim).integers(0, 2**bits, dim, dtype=np.uint32)
    planes = np.array(packing.pack(mx.array(fields), bits))
    for read in unpack(library, planes, dim):
        np.testing.assert_array_equal(read, fields)
