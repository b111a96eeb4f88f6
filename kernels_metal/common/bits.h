// Bit fields stored as separate bit planes.
//
// A vector of `dim` elements of BITS bits is BITS planes of plane_words<Word>(dim) words each, plane 0 the least
// significant; Word is uint, or ushort where dim is no multiple of 32. With w bits a word, bit t % w of word t / w of
// a plane belongs to element t: no field straddles a word. `stride` is the distance from one plane of a vector to its
// next, in words. `Planes` is a pointer to words in device, constant or threadgroup memory: MLX passes an input of
// fewer than eight elements as constant. Integer code only: exact on every backend.

#ifndef MLX_ROTOR_COMMON_BITS_H
#define MLX_ROTOR_COMMON_BITS_H

// Words of one plane of a vector of `dim` elements.
template <typename Word>
static inline constexpr uint plane_words(uint dim) {
  return (dim + 8u * uint(sizeof(Word)) - 1u) / (8u * uint(sizeof(Word)));
}

// Reads word w of every plane: block[p] holds the bits of plane p of the elements of that word.
template <uint BITS, typename Planes>
static inline void plane_load(Planes planes, uint stride, uint w, thread uint (&block)[BITS]) {
  static_assert(BITS <= 8, "a field has 1 to 8 bits");
  for (uint p = 0; p < BITS; ++p) {
    block[p] = planes[p * stride + w];
  }
}

// The field of element i of the block.
template <uint BITS>
static inline uint plane_field(const thread uint (&block)[BITS], uint i) {
  uint field = 0;
  for (uint p = 0; p < BITS; ++p) {
    field |= ((block[p] >> i) & 1u) << p;
  }
  return field;
}

// Several fields at the price of one: byte j of the result is the field of element q + 8 j of the block, q < 8.
template <uint BITS>
static inline uint plane_bytes(const thread uint (&block)[BITS], uint q) {
  uint fields = 0;
  for (uint p = 0; p < BITS; ++p) {
    fields |= ((block[p] >> q) & 0x01010101u) << p;
  }
  return fields;
}

// The field of element t of the vector that starts at `planes`, where one element is all that is needed.
template <uint BITS, typename Planes>
static inline uint plane_field_at(Planes planes, uint stride, uint t) {
  constexpr uint width = 8u * uint(sizeof(planes[0]));
  uint block[BITS];
  plane_load(planes, stride, t / width, block);
  return plane_field(block, t % width);
}

#endif
