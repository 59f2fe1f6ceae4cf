// Quantized vectors with parameters of their own: the arithmetic of attn_kernels/kv_quant.py, to
// the bit. A word has the parameters of a vector: Int8 a float32 scale, Int4 scale and offset in
// bfloat16, the scale in the low half.
#pragma once
#include <algorithm>
#include <type_traits>

#include "simd.hpp"

constexpr float LEAST_SCALE = 0x1p-100f;  // of a vector of zeros

// The size of the Hadamard matrix that a head is cut into blocks for.
inline int hadamard_block(int size) { return size & -size; }

// Sums and differences of neighbours, of elements 2 apart, and so on, within a register.
template <int STEP = 1>
inline Vec butterflies(Vec v) {
  if constexpr (STEP < WIDTH) {
    Vec sign;
    for (int lane = 0; lane < WIDTH; lane++) sign[lane] = lane & STEP ? -1 : 1;
    return butterflies<2 * STEP>(v * sign + exchange<STEP>(v));  // the product is exact
  }
  return v;
}

// Multiplies a vector by a block-diagonal Hadamard matrix of 1 and -1: twice, and divided by
// hadamard_block(size), gives it back. What is quantized to 4 bits are such vectors.
template <class T>
inline void rotate(float* x, int size) {
  if constexpr (!std::is_same_v<T, Int4>) return;
  for (int i = 0; i < size; i += WIDTH) store(x + i, butterflies(load(x + i)));
  for (int step = WIDTH; step < hadamard_block(size); step *= 2)
    for (int i = 0; i < size; i += 2 * step)
      for (int j = i; j < i + step; j += WIDTH) {
        const Vec a = load(x + j), b = load(x + j + step);
        store(x + j, a + b);
        store(x + j + step, a - b);
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

// Quantizes a vector of float32, which is rotated in place, to a byte an element. Returns the word
// of its parameters, NaN if an element is.
template <class T>
inline uint32_t quantize(float* x, int size, int8_t* quantized) {
  rotate<T>(x, size);
  Vec lows = -load(x), highs = load(x), zeros = {};  // lows: negated
  for (int d = 0; d < size; d += WIDTH) {
    lows = max(lows, -load(x + d));
    highs = max(highs, load(x + d));
    zeros += load(x + d) * 0.f;
  }
  const float low = -horizontal_max(lows), high = horizontal_max(highs);
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
  for (int d = 0; d < size; d += WIDTH) {
    const Vec steps = max((load(x + d) - offset) / scale, broadcast(least));
    store_bytes(quantized + d, (IntVec)(-max(-steps, broadcast(-most)) + ROUNDER));
  }
  return horizontal_sum(zeros) == 0 ? word : ~0u;
}

// Puts a quantized vector into a column of a key panel (cache.hpp).
inline void put_column(Int8* panel, int column, const int8_t* quantized, int size) {
  for (int d = 0; d < size; d++) panel[d * PANEL + column].value = quantized[d];
}
inline void put_column(Int4* panel, int column, const int8_t* quantized, int size) {
  for (int d = 0; d < size; d += 2)
    panel[d / 2 * PANEL + column].values = (quantized[d] & 15) | quantized[d + 1] << 4;
}

// Puts PANEL elements of a quantized vector into a row of a value panel.
inline void put_row(Int8* panel, int row, const int8_t* quantized) {
  std::memcpy(panel + row * PANEL, quantized, PANEL);
}
inline void put_row(Int4* panel, int row, const int8_t* quantized) {
  Int4* pair = panel + row / 2 * PANEL;
  const int shift = row % 2 * 4, other = 0xf0 >> shift;
  for (int j = 0; j < PANEL; j++)
    pair[j].values = (pair[j].values & other) | (quantized[j] & 15) << shift;
}

// What quantized values of WIDTH tokens, or of one token, stand for.
template <class T>
struct Decoder {
  Vec scale, offset;

  explicit Decoder(const uint32_t* words) {
    UintVec w;
    std::memcpy(&w, words, sizeof w);
    decode(w);
  }
  explicit Decoder(uint32_t word) { decode(word - UintVec{}); }

  Vec operator()(Vec values) const {
    return std::is_same_v<T, Int4> ? values * scale + offset : values * scale;
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
