// A packed weight and the numbers around it, as all kernels read them. Compiled with
// -DWEIGHT_BITS=2 to 8.
//
// A weight [outputs, inputs] is kept in panels of sixteen outputs, `words[panel][word][16]`: lane n
// of a panel is row `16 * panel + n` of the checkpoint, whose quantized values lie densely one
// after another, lowest bits first. 32 values take exactly BITS words, so that a chunk of 32 inputs
// is BITS vectors, read once and in order, and each value of a chunk is one shift away from all
// sixteen lanes.
//
// weight = (value - zero point) * scale, with one scale and zero point for each output and group of
// inputs: `scales[panel][group][16]`, likewise zeros. A group is whole chunks, or half of one; the
// last one may be shorter. With two-level scales `zeros` are bytes of groups instead, and scales
// are of rows, `scales[panel][16]` (quant_kernels/levels.py).
#pragma once
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "arena.hpp"
#include "matmul.hpp"
#include "product.hpp"

namespace {

constexpr int BITS = WEIGHT_BITS;
static_assert(BITS >= 2 && BITS <= 8);
constexpr int MIDPOINT = 1 << (BITS - 1), MASK = (1 << BITS) - 1;

// Numbers of a byte; GCC 12 would convert them one after another.
inline Vec load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
#else
  Vec v;
  for (int lane = 0; lane < WIDTH; lane++) v[lane] = p[lane];
  return v;
#endif
}

inline Vec load_as(const void* p, int64_t at, int32_t format) {
  switch (format) {
    case FLOAT32: return load((const float*)p + at);
    case BFLOAT16: return load((const BFloat16*)p + at);
    case FLOAT16: return load((const Float16*)p + at);
    default: return load_bytes((const uint8_t*)p + at);
  }
}

inline float value_at(const void* p, int64_t at, int32_t format) {
  switch (format) {
    case FLOAT32: return ((const float*)p)[at];
    case BFLOAT16: return to_float(((const BFloat16*)p)[at]);
    case FLOAT16: return to_float(((const Float16*)p)[at]);
    default: return ((const uint8_t*)p)[at];
  }
}

inline void store_as(void* p, int64_t at, float value, int32_t format) {
  switch (format) {
    case FLOAT32: ((float*)p)[at] = value; break;
    case BFLOAT16: convert(value, ((BFloat16*)p)[at]); break;
    default: convert(value, ((Float16*)p)[at]);
  }
}

// WIDTH values at once, which only differ from single ones in their speed.
inline void store_as(void* p, int64_t at, Vec values, int32_t format) {
  if (format == FLOAT32) return store((float*)p + at, values);
  if (format == BFLOAT16) {  // round to nearest even
    const UintVec bits = (UintVec)values, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const HalfVec halves =
        __builtin_convertvector(values == values ? rounded : 0x7fc0u - UintVec{}, HalfVec);
    std::memcpy((BFloat16*)p + at, &halves, sizeof halves);
    return;
  }
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)((Float16*)p + at), _mm512_cvtps_ph(values, 0));
#else
  for (int lane = 0; lane < WIDTH; lane++) convert(values[lane], ((Float16*)p)[at + lane]);
#endif
}

// Quantized values as floats, less the midpoint: sums of such products are smaller, and symmetric
// weights need no zero point.
struct QuantizedValues {
  Vec table[2];

  QuantizedValues() {
    for (int i = 0; i < 2 * WIDTH; i++) table[i / WIDTH][i % WIDTH] = (i & MASK) - MIDPOINT;
  }

  // Value i of a chunk, of WIDTH lanes; `p` is the chunk's first word of the first lane.
  Vec at(const uint32_t* p, int i) const {
    const int word = i * BITS / 32, offset = i * BITS % 32;
    UintVec bits = words(p, word) >> offset;
    if (offset + BITS > 32) bits |= words(p, word + 1) << (32 - offset);
    // A lookup takes the index's low bits only, so that nothing needs masking.
#if defined(__AVX512F__)
    if constexpr (BITS <= 4) return _mm512_permutexvar_ps((__m512i)bits, table[0]);
    if constexpr (BITS == 5) return _mm512_permutex2var_ps(table[0], (__m512i)bits, table[1]);
#elif defined(__AVX2__)
    if constexpr (BITS <= 3) return _mm256_permutevar8x32_ps(table[0], (__m256i)bits);
#endif
    // As the low bits of 2^23: an exact difference, without a conversion.
    return (Vec)((bits & MASK) | 0x4b000000u) - (float)(0x800000 + MIDPOINT);
  }

 private:
  static UintVec words(const uint32_t* p, int word) {
    UintVec v;
    std::memcpy(&v, p + word * PANEL, sizeof v);
    return v;
  }
};

// A step of the zero points of two-level scales, which have sixteen of them.
constexpr float ZERO_STEP = MASK / 15.0;

// What WIDTH outputs have for a group of inputs, from lane `part * WIDTH` of a panel on; zero
// points are less the midpoint.
struct Group {
  Vec scale, zero;

  Group(const ProductCall& c, int64_t panel, int64_t group, int part = 0) {
    const int64_t at = (panel * c.groups() + group) * PANEL + part * WIDTH;
    if (c.zero_format == LEVELS) {
      const UintVec bits = __builtin_convertvector(load_as(c.zeros, at, UINT8), UintVec);
      const Vec row = load_as(c.scales, panel * PANEL + part * WIDTH, c.scale_format);
      scale = __builtin_convertvector((bits & 15) + 1, Vec) * (1 / 16.0f) * row;
      zero = __builtin_convertvector(bits >> 4, Vec) * ZERO_STEP - (float)MIDPOINT;
      return;
    }
    scale = load_as(c.scales, at, c.scale_format);
    zero = c.zero_format == NONE ? Vec{} : load_as(c.zeros, at, c.zero_format) - (float)MIDPOINT;
  }
};

// Results [rows, stride] of the outputs from `panel` on, at most `count` of them.
inline void store_results(const ProductCall& c, int64_t first, int64_t rows, int64_t panel,
                          int64_t count, const float* from, int64_t stride) {
  const int64_t columns = std::min(count, c.outputs - panel * PANEL);
  for (int64_t r = 0; r < rows; r++, from += stride) {
    const int64_t at = (first + r) * c.outputs + panel * PANEL;
    int64_t n = 0;
    for (; n + WIDTH <= columns; n += WIDTH) store_as(c.out, at + n, load(from + n), c.format);
    for (; n < columns; n++) store_as(c.out, at + n, from[n], c.format);
  }
}

// The sums of each group of a row of padded() elements.
template <class T>
void sum_groups(const ProductCall& c, const T* x, float* sums) {
  for (int64_t g = 0; g < c.groups(); g++) {
    const int64_t end = std::min((g + 1) * c.group_size, c.padded());
    Vec sum = {};
    for (int64_t k = g * c.group_size; k < end; k += WIDTH) sum += load(x + k);
    sums[g] = horizontal_sum(sum);
  }
}

// A row of x as floats, zeros behind its end, in padded() elements.
inline void widen(const ProductCall& c, int64_t row, float* to) {
  const int64_t start = row * c.x_stride;
  int64_t k = 0;
  for (; k + WIDTH <= c.inputs; k += WIDTH) store(to + k, load_as(c.x, start + k, c.format));
  for (; k < c.inputs; k++) to[k] = value_at(c.x, start + k, c.format);
  std::fill(to + k, to + c.padded(), 0.f);
}

constexpr int BLOCK = 240;  // rows that are multiplied while a panel is at hand

// Words from what is read to what is fetched meanwhile. The processor's own prefetcher stops at
// every page, so where panels are short the next ones are fetched while these are multiplied; where
// they are long, the words that follow.
inline int64_t words_ahead(const ProductCall& c, int panels) {
  constexpr int64_t AHEAD = 512, NEXT_PANELS = 32768;
  const int64_t length = panels * c.chunks() * BITS * PANEL;
  return length <= NEXT_PANELS ? length : AHEAD;
}

}  // namespace
