// Vectors of codes with parameters of their own: the arithmetic of attn_kernels/kv_quant.py, to the
// bit. A word has the parameters of a vector: Int8 a float32 scale, Int4 scale and offset in
// bfloat16, the scale in the low half.
#pragma once
#include <algorithm>
#include <type_traits>

#include "simd.hpp"

constexpr float LEAST_SCALE = 0x1p-100f;  // of a vector of zeros

// The size of the Hadamard matrix that a head is cut into blocks for.
inline int hadamard_block(int size) { return size & -size; }

// Multiplies a vector by a block-diagonal Hadamard matrix of 1 and -1: twice, and divided by
// hadamard_block(size), gives it back. Codes of 4 bits are those of such vectors.
template <class T>
inline void rotate(float* x, int size) {
  if constexpr (std::is_same_v<T, Int4>)
    for (int step = 1; step < hadamard_block(size); step *= 2)
      for (int i = 0; i < size; i += 2 * step)
        for (int j = i; j < i + step; j++) {
          const float a = x[j], b = x[j + step];
          x[j] = a + b;
          x[j + step] = a - b;
        }
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Sets one code of a panel.
inline void put(Int8* codes, int at, int code) { codes[at].code = code; }
inline void put(Int4* codes, int at, int code) {
  const int shift = at % 2 * 4;
  int8_t& both = codes[at / 2].codes;
  both = (both & 0xf0 >> shift) | (code & 15) << shift;
}

// Quantizes a vector of float32, which is rotated in place, and calls f(d, code) for each element.
// Returns the word of its parameters, NaN if an element is.
template <class T, class F>
inline uint32_t quantize(float* x, int size, F&& f) {
  rotate<T>(x, size);
  float low = x[0], high = x[0], sum = 0;
  for (int d = 0; d < size; d++) {
    low = std::min(low, x[d]);
    high = std::max(high, x[d]);
    sum += x[d] * 0;
  }
  float scale, offset = 0, least = -127, most = 127;
  uint32_t word;
  if constexpr (std::is_same_v<T, Int8>) {
    scale = std::max(LEAST_SCALE, std::max(high, -low) / 127);
    word = bits_of(scale);
  } else {
    least = -8, most = 7;
    offset = float_of((bits_of(low + 8 * ((high - low) / 15)) + 0x8000) & 0xffff0000);
    const float wanted = std::max((high - offset) / 7, (offset - low) / 8);
    scale = std::max(LEAST_SCALE, float_of((bits_of(wanted) + 0xffff) & 0xffff0000));
    word = bits_of(offset) | bits_of(scale) >> 16;
  }
  for (int d = 0; d < size; d++)
    f(d, (int)std::min(most, std::max(least, nearest((x[d] - offset) / scale))));
  return sum == 0 ? word : ~0u;
}

// What the codes of WIDTH tokens, or of one token, stand for.
template <class T>
struct Decoder {
  Vec scale, offset;

  explicit Decoder(const uint32_t* words) {
    UintVec w;
    std::memcpy(&w, words, sizeof w);
    decode(w);
  }
  explicit Decoder(uint32_t word) { decode(word - UintVec{}); }

  Vec operator()(Vec codes) const {
    return std::is_same_v<T, Int4> ? codes * scale + offset : codes * scale;
  }

 private:
  void decode(UintVec w) {
    if constexpr (std::is_same_v<T, Int4>) {
      scale = (Vec)(w << 16);
      offset = (Vec)(w & 0xffff0000u);
    } else {
      scale = (Vec)w;
      offset = Vec{};
    }
  }
};
