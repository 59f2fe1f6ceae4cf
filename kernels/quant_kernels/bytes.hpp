// Products of bytes by VNNI, for weights whose values lie within bytes: 2, 4 and 8 bits.
//
// Inputs are rounded, but not to 8 bits: a block of them has one scale and is written in digits of
// a byte each. Three digits are as precise as float32 is beside the largest input of a block, and
// cost few rows nothing, since they wait for memory. Many rows of 16 bits get two, which are 2^-16
// of that largest input: less than bfloat16 drops itself, but for inputs below 1/128 of it. Integer
// sums are exact; weights are read and unpacked once for all digits.
#pragma once
#include "packed.hpp"

namespace {

constexpr bool IN_BYTES = WIDTH == 16 && 8 % BITS == 0;

#if defined(__AVX512F__)
constexpr int FIELDS = 8 % BITS ? 1 : 8 / BITS;  // values of a byte
constexpr int DIGIT_BLOCK = 64;                  // inputs of a block, or a group if that is less

inline bool has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has;
}

// Inputs of `ROWS` rows in the order in which weights meet them. A quad is four inputs, whose
// weights are one field of the four bytes of a word: word w has inputs 4 * FIELDS * w + FIELDS *
// byte + field. Digits come from the highest to the lowest.
struct Digits {
  int32_t* quads;  // [quads][ROWS][DIGITS]
  float* scales;   // [blocks][ROWS]
  float* sums;     // [blocks][ROWS][DIGITS]
};

inline int64_t block_of(const ProductCall& c) {
  return c.group_size % DIGIT_BLOCK ? std::min<int64_t>(c.group_size, CHUNK) : DIGIT_BLOCK;
}
inline int64_t blocks_of(const ProductCall& c) {
  return (c.padded() + block_of(c) - 1) / block_of(c);
}

// Write a row of padded() floats as row `r` of `rows`. A block with NaN or infinity is NaN.
template <int DIGITS>
void write_digits(const ProductCall& c, const float* x, int64_t r, int64_t rows, const Digits& to) {
  alignas(16) uint8_t order[16];
  for (int i = 0; i < 16; i++) {
    const int word = i / (4 * FIELDS), field = i / 4 % FIELDS, byte = i % 4;
    order[i] = 4 * FIELDS * word + FIELDS * byte + field;
  }
  const __m128i in_order = _mm_load_si128((const __m128i*)order);
  constexpr float LARGEST = 127 << 8 * (DIGITS - 1);  // half a digit below what would not fit
  const int64_t block = block_of(c), padded = c.padded();
  for (int64_t begin = 0, b = 0; begin < padded; begin += block, b++) {
    const int64_t end = std::min(begin + block, padded);
    Vec top = broadcast(0x1p-100f), poison = {};
    for (int64_t k = begin; k < end; k += WIDTH) {
      const Vec values = load(x + k);
      top = max(absolute(values), top);
      poison += values * 0.f;
    }
    const float most = horizontal_max(top), inverse = LARGEST / most;
    IntVec sums[DIGITS] = {};
    for (int64_t k = begin; k < end; k += WIDTH) {
      IntVec rest = (IntVec)_mm512_cvtps_epi32(load(x + k) * inverse);
#pragma GCC unroll 3
      for (int digit = DIGITS - 1; digit >= 0; digit--) {
        const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)rest), in_order);
        const IntVec value = rest << 24 >> 24;
        sums[digit] += value;
        rest = (rest - value) >> 8;
        int32_t quads[4];
        _mm_storeu_si128((__m128i*)quads, bytes);
        for (int i = 0; i < 4; i++) to.quads[((k / 4 + i) * rows + r) * DIGITS + digit] = quads[i];
      }
    }
    to.scales[b * rows + r] = most / LARGEST + horizontal_sum(poison);
    for (int digit = 0; digit < DIGITS; digit++)
      to.sums[(b * rows + r) * DIGITS + digit] = _mm512_reduce_add_epi32((__m512i)sums[digit]);
  }
}

// P panels from `panel` on times R rows; panels behind `last` are `last` again.
template <int R, int P, int DIGITS>
__attribute__((target("avx512vnni"))) void multiply_digits(const ProductCall& c, int64_t panel,
                                                           int64_t last, const Digits& x,
                                                           float* out) {
  const int64_t words = c.chunks() * BITS, block = block_of(c), ahead = words_ahead(c, P);
  const int64_t block_words = block * BITS / 32, blocks = blocks_of(c),
                per_group = c.group_size / block, last_group = c.groups() - 1;
  int64_t panels[P];
  const uint32_t* from[P];
  for (int j = 0; j < P; j++) {
    panels[j] = std::min(panel + j, last);
    from[j] = c.words + panels[j] * words * PANEL;
  }
  const int32_t* quads = x.quads;
  Vec total[R][P] = {};
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t end = std::min((b + 1) * block_words, words);
    __m512i sum[R][P][DIGITS] = {};
    for (int64_t w = b * block_words; w < end; w++) {
      UintVec word[P];
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) {
        std::memcpy(&word[j], from[j] + w * PANEL, sizeof word[j]);
        __builtin_prefetch(from[j] + w * PANEL + ahead, 0, 2);
      }
#pragma GCC unroll 4
      for (int field = 0; field < FIELDS; field++, quads += R * DIGITS) {
        __m512i values[P];
#pragma GCC unroll 4
        for (int j = 0; j < P; j++)
          values[j] =
              (__m512i)(FIELDS == 1 ? word[j] : word[j] >> field * BITS & MASK * 0x01010101u);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
          for (int digit = 0; digit < DIGITS; digit++) {
            const __m512i quad = _mm512_set1_epi32(quads[r * DIGITS + digit]);
#pragma GCC unroll 4
            for (int j = 0; j < P; j++)
              sum[r][j][digit] = _mm512_dpbusd_epi32(sum[r][j][digit], values[j], quad);
          }
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < P; j++) {
      const Group group(c, panels[j], std::min(b / per_group, last_group));
      const Vec zero = group.zero + (float)MIDPOINT;
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        // Taking zero points from each digit is exact: a large input may have the weight 0.
        Vec products = {};
#pragma GCC unroll 3
        for (int digit = 0; digit < DIGITS; digit++) {
          const Vec values = _mm512_cvtepi32_ps(sum[r][j][digit]);
          products = products * 256.f + (values - zero * x.sums[(b * R + r) * DIGITS + digit]);
        }
        total[r][j] += group.scale * x.scales[b * R + r] * products;
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < P; j++) store(out + (r * P + j) * PANEL, total[r][j]);
}

// Strips of R rows, P panels at a time.
template <int R, int P, int DIGITS>
void multiply_strips(const ProductCall& c) {
  static thread_local Arena memory;
  const int64_t block = std::min<int64_t>(BLOCK, c.rows), strips = (block + R - 1) / R;
  const int64_t padded = c.padded(), quads = padded / 4 * R * DIGITS, blocks = blocks_of(c) * R;
  const int64_t own = padded + strips * R * P * PANEL;  // of each thread: a row of x, results
  Digits all;
  float* others;
  memory.allocate(Array{all.quads, (size_t)(strips * quads)},
                  Array{all.scales, (size_t)(strips * blocks)},
                  Array{all.sums, (size_t)(strips * blocks * DIGITS)},
                  Array{others, (size_t)(c.threads * own)});
  const auto strip = [&](int64_t s) {
    return Digits{all.quads + s * quads, all.scales + s * blocks, all.sums + s * blocks * DIGITS};
  };
  for (int64_t first = 0; first < c.rows; first += block) {
    const int64_t rows = std::min(block, c.rows - first);
#pragma omp parallel num_threads(c.threads)
    {
      const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
      float *const row = others + id * own, *const out = row + padded;
      const int64_t begin = c.panels() * id / threads, end = c.panels() * (id + 1) / threads;
#pragma omp for schedule(static)
      for (int64_t s = 0; s < strips; s++)
        for (int64_t r = 0; r < R; r++) {
          if (s * R + r < rows)
            widen(c, first + s * R + r, row);
          else
            std::fill_n(row, padded, 0.f);
          write_digits<DIGITS>(c, row, r, R, strip(s));
        }
      for (int64_t panel = begin; panel < end; panel += P) {
        for (int64_t s = 0; s * R < rows; s++)
          multiply_digits<R, P, DIGITS>(c, panel, end - 1, strip(s), out + s * R * P * PANEL);
        const int64_t count = std::min<int64_t>(P, end - panel) * PANEL;
        store_results(c, first, rows, panel, count, out, P * PANEL);
      }
    }
  }
}

template <int DIGITS>
void multiply_bytes(const ProductCall& c) {
  if (c.rows == 1) return multiply_strips<1, 4, DIGITS>(c);
  if (c.rows == 2) return multiply_strips<2, 4, DIGITS>(c);
  multiply_strips<4, 2, DIGITS>(c);
}
#else
inline bool has_vnni() { return false; }
template <int DIGITS>
void multiply_bytes(const ProductCall&) {}
#endif

}  // namespace
