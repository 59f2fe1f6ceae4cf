// Products with weights of a few bits that stay packed in memory. Compiled with -DWEIGHT_BITS=2
// to 8. Plain C arguments; no exception leaves.
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
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "amx.hpp"
#include "arena.hpp"

namespace {

constexpr int BITS = WEIGHT_BITS;
static_assert(BITS >= 2 && BITS <= 8);
constexpr int MIDPOINT = 1 << (BITS - 1), MASK = (1 << BITS) - 1;

constexpr int CHUNK = 32;             // values that take BITS words
constexpr int PARTS = PANEL / WIDTH;  // vectors of a panel

enum Format : int32_t { FLOAT32, BFLOAT16, FLOAT16, UINT8, NONE, LEVELS };

struct ProductCall {
  const uint32_t* words;
  const void *scales, *zeros;
  const void* x;  // [rows, inputs], rows x_stride elements apart
  void* out;      // [rows, outputs]
  int64_t outputs, inputs, group_size, x_stride, rows;
  int32_t scale_format, zero_format, format, threads;

  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
  int64_t chunks() const { return (inputs + CHUNK - 1) / CHUNK; }
  int64_t padded() const { return chunks() * CHUNK; }
  int64_t groups() const { return (inputs + group_size - 1) / group_size; }
};

inline Vec load_as(const void* p, int64_t at, int32_t format) {
  switch (format) {
    case FLOAT32: return load((const float*)p + at);
    case BFLOAT16: return load((const BFloat16*)p + at);
    case FLOAT16: return load((const Float16*)p + at);
    default: {
      typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
      Bytes bytes;
      std::memcpy(&bytes, (const uint8_t*)p + at, sizeof bytes);
      return __builtin_convertvector(bytes, Vec);
    }
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
void store_results(const ProductCall& c, int64_t first, int64_t rows, int64_t panel, int64_t count,
                   const float* from, int64_t stride) {
  const int64_t columns = std::min(count, c.outputs - panel * PANEL);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t n = 0; n < columns; n++)
      store_as(c.out, (first + r) * c.outputs + panel * PANEL + n, from[r * stride + n], c.format);
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
void widen(const ProductCall& c, int64_t row, float* to) {
  const int64_t start = row * c.x_stride;
  int64_t k = 0;
  for (; k + WIDTH <= c.inputs; k += WIDTH) store(to + k, load_as(c.x, start + k, c.format));
  for (; k < c.inputs; k++) to[k] = value_at(c.x, start + k, c.format);
  std::fill(to + k, to + c.padded(), 0.f);
}

// ---- Few rows: values go from memory into registers and meet every row there.

constexpr int FEW = 4;

// Words from what is read to what is fetched meanwhile. The processor's own prefetcher stops at
// every page, so where panels are short the next ones are fetched while these are multiplied; where
// they are long, the words that follow.
constexpr int64_t AHEAD = 512, NEXT_PANELS = 32768;

// P panels from `panel` on times R rows; panels behind `last` are `last` again. UNIT inputs of a
// chunk are of one group: all, or half of them. `x`: R rows of
// padded() floats; `sums`: of each row and group of x.
template <int R, int P, int UNIT>
void multiply_few(const ProductCall& c, int64_t panel, int64_t last, const float* x,
                  const float* sums, float* out) {
  constexpr int N = P * PARTS;
  // A product waits for the one before it: so many sums run side by side.
  constexpr int CHAINS = R * N >= 4 ? 1 : R * N >= 2 ? 2 : 4;
  const QuantizedValues quantized;
  const int64_t chunks = c.chunks(), groups = c.groups(), padded = c.padded();
  const int64_t chunks_per_group = c.group_size / CHUNK, length = chunks * BITS * PANEL;
  const int64_t ahead = P * length <= NEXT_PANELS ? P * length : AHEAD;
  int64_t panels[P];
  const uint32_t* words[P];
  for (int j = 0; j < P; j++) {
    panels[j] = std::min(panel + j, last);
    words[j] = c.words + panels[j] * length;
  }
  Vec total[R][N] = {};
  // Group g, inputs FIRST to FIRST + UNIT of chunks `begin` to `end`.
  const auto add_group = [&](int64_t g, int64_t begin, int64_t end, auto first) {
    constexpr int FIRST = decltype(first)::value;
    Vec sum[CHAINS][R][N] = {};
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t here = chunk * BITS * PANEL;
      const float* xs = x + chunk * CHUNK;
#pragma GCC unroll 4
      for (int j = 0; j < P; j++)
#pragma GCC unroll 8
        for (int w = 0; w < BITS; w++)
          __builtin_prefetch(words[j] + here + w * PANEL + ahead, 0, 2);
#pragma GCC unroll 32
      for (int i = FIRST; i < FIRST + UNIT; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
          const Vec value = quantized.at(words[j / PARTS] + here + j % PARTS * WIDTH, i);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) sum[i % CHAINS][r][j] += xs[r * padded + i] * value;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      const Group group(c, panels[j / PARTS], g, j % PARTS);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        Vec products = sum[0][r][j];
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; chain++) products += sum[chain][r][j];
        total[r][j] += group.scale * (products - group.zero * sums[r * groups + g]);
      }
    }
  };
  if constexpr (UNIT == CHUNK) {
    for (int64_t g = 0; g < groups; g++)
      add_group(g, g * chunks_per_group, std::min((g + 1) * chunks_per_group, chunks),
                std::integral_constant<int, 0>{});
  } else {
    for (int64_t g = 0; g < groups; g += 2) {
      add_group(g, g / 2, g / 2 + 1, std::integral_constant<int, 0>{});
      if (g + 1 < groups) add_group(g + 1, g / 2, g / 2 + 1, std::integral_constant<int, UNIT>{});
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++)
      store(out + (r * P + j / PARTS) * PANEL + j % PARTS * WIDTH, total[r][j]);
}

template <int R>
void few_rows(const ProductCall& c) {
  static thread_local Arena memory;
  const int64_t groups = c.groups(), padded = c.padded();
  float *x, *sums;
  memory.allocate(Array{x, (size_t)(R * padded)}, Array{sums, (size_t)(R * groups)});
  std::fill_n(x, R * padded, 0.f);
  std::fill_n(sums, R * groups, 0.f);
  for (int64_t r = 0; r < c.rows; r++) {
    widen(c, r, x + r * padded);
    sum_groups(c, x + r * padded, sums + r * groups);
  }
#pragma omp parallel num_threads(c.threads)
  {
    const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    const int64_t begin = c.panels() * id / threads, end = c.panels() * (id + 1) / threads;
    constexpr int P = REGISTERS == 32 ? (R <= 2 ? 4 : 2) : R == 1 ? 2 : 1;
    float out[R * P * PANEL];
    for (int64_t panel = begin; panel < end; panel += P) {
      if (c.group_size < CHUNK)
        multiply_few<R, P, CHUNK / 2>(c, panel, end - 1, x, sums, out);
      else
        multiply_few<R, P, CHUNK>(c, panel, end - 1, x, sums, out);
      const int64_t count = std::min<int64_t>(P, end - panel) * PANEL;
      store_results(c, 0, c.rows, panel, count, out, P * PANEL);
    }
  }
}

// ---- Many rows: a panel's weights become floats in the first-level cache, a piece of the inputs
// at a time, and meet a block of rows there.

constexpr int DEPTH = 256;  // inputs of a piece
constexpr int BLOCK = 240;  // rows of a block
constexpr int STRIP_ROWS = REGISTERS == 32 ? 12 : 6, STRIP_PANELS = REGISTERS == 32 ? 2 : 1;
constexpr int STRIP_WIDTH = STRIP_PANELS * PANEL;
static_assert(BLOCK % STRIP_ROWS == 0 && DEPTH % CHUNK == 0);

// Inputs `begin` to `end` of a panel as floats [inputs][STRIP_WIDTH].
void dequantize(const ProductCall& c, int64_t panel, int64_t begin, int64_t end, float* to) {
  const QuantizedValues quantized;
  const int64_t chunks = c.chunks(), last = c.groups() - 1;
  for (int64_t k = begin; k < end; k += CHUNK) {
    const uint32_t* words = c.words + (panel * chunks + k / CHUNK) * BITS * PANEL;
    for (int j = 0; j < PARTS; j++) {
      Group group(c, panel, k / c.group_size, j);
      float* here = to + (k - begin) * STRIP_WIDTH + j * WIDTH;
#pragma GCC unroll 32
      for (int i = 0; i < CHUNK; i++) {
        if (i == CHUNK / 2 && c.group_size < CHUNK)
          group = Group(c, panel, std::min((k + i) / c.group_size, last), j);
        store(here + i * STRIP_WIDTH,
              (quantized.at(words + j * WIDTH, i) - group.zero) * group.scale);
      }
    }
  }
}

// Rows of x for `multiply_strip`: whole strips of rows, a row a lane, [strip][padded][STRIP_ROWS];
// zeros where there is no row.
void widen_strip(const ProductCall& c, int64_t first, int64_t rows, float* row, float* to) {
  for (int r = 0; r < STRIP_ROWS; r++) {
    if (r < rows) widen(c, first + r, row);
    for (int64_t k = 0; k < c.padded(); k++) to[k * STRIP_ROWS + r] = r < rows ? row[k] : 0.f;
  }
}

// out[R, STRIP_WIDTH] (+)= x[R, depth] * weights[depth, STRIP_WIDTH].
template <int R>
void multiply_strip(const float* x, const float* weights, int64_t depth, bool add, float* out) {
  constexpr int N = STRIP_WIDTH / WIDTH;
  Vec sum[R][N];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sum[r][j] = add ? load(out + r * STRIP_WIDTH + j * WIDTH) : Vec{};
  for (int64_t k = 0; k < depth; k++) {
    Vec weight[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) weight[j] = load(weights + k * STRIP_WIDTH + j * WIDTH);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sum[r][j] += x[k * STRIP_ROWS + r] * weight[j];
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(out + r * STRIP_WIDTH + j * WIDTH, sum[r][j]);
}

void many_rows(const ProductCall& c) {
  static thread_local Arena memory;
  const int64_t padded = c.padded(), block = std::min<int64_t>(BLOCK, c.rows);
  const int64_t row_strips = (block + STRIP_ROWS - 1) / STRIP_ROWS,
                strip_size = padded * STRIP_ROWS;
  const int64_t strips = (c.panels() + STRIP_PANELS - 1) / STRIP_PANELS;
  // Of each thread: a row of x, weights, results.
  const int64_t own = padded + (DEPTH + row_strips * STRIP_ROWS) * STRIP_WIDTH;
  float *x, *others;
  memory.allocate(Array{x, (size_t)(row_strips * strip_size)},
                  Array{others, (size_t)(c.threads * own)});
  for (int64_t first = 0; first < c.rows; first += block) {
    const int64_t rows = std::min(block, c.rows - first);
#pragma omp parallel num_threads(c.threads)
    {
      float* const row = others + omp_get_thread_num() * own;
      float *const weights = row + padded, *const out = weights + DEPTH * STRIP_WIDTH;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; r += STRIP_ROWS)
        widen_strip(c, first + r, rows - r, row, x + r * padded);
#pragma omp for schedule(static)
      for (int64_t strip = 0; strip < strips; strip++) {
        const int64_t panel = strip * STRIP_PANELS;
        for (int64_t k = 0; k < padded; k += DEPTH) {
          const int64_t depth = std::min<int64_t>(DEPTH, padded - k);
          for (int64_t j = 0; j < STRIP_PANELS; j++)  // an odd panel is taken twice
            dequantize(c, std::min(panel + j, c.panels() - 1), k, k + depth, weights + j * PANEL);
          for (int64_t r = 0; r < rows; r += STRIP_ROWS) {
            const auto run = [&](auto count) {
              multiply_strip<decltype(count)::value>(x + r * padded + k * STRIP_ROWS, weights,
                                                     depth, k > 0, out + r * STRIP_WIDTH);
            };
            constexpr int THIRD = STRIP_ROWS / 3;
            if (rows - r <= THIRD)
              run(std::integral_constant<int, THIRD>{});
            else if (rows - r <= 2 * THIRD)
              run(std::integral_constant<int, 2 * THIRD>{});
            else
              run(std::integral_constant<int, STRIP_ROWS>{});
          }
        }
        store_results(c, first, rows, panel, STRIP_WIDTH, out, STRIP_WIDTH);
      }
    }
  }
}

// ---- Many rows of bfloat16 on AMX tiles. Values less the midpoint are exact in bfloat16, so the
// tiles multiply those, a group at a time, and scales and zero points come afterwards in float32.

// A group's values of one panel, woven: [inputs / 2][16][2].
void weave(const ProductCall& c, int64_t panel, int64_t begin, int64_t end, BFloat16* to) {
  const QuantizedValues quantized;
  const uint32_t* words = c.words + panel * c.chunks() * BITS * PANEL;
  for (int64_t k = begin; k < end; k += CHUNK)
#pragma GCC unroll 16
    for (int i = 0; i < CHUNK; i += 2)
      for (int j = 0; j < PANEL; j += WIDTH) {
        const uint32_t* chunk = words + k / CHUNK * BITS * PANEL + j;
        const UintVec first = (UintVec)quantized.at(chunk, i),
                      second = (UintVec)quantized.at(chunk, i + 1);
        const UintVec both = first >> 16 | (second & 0xffff0000u);
        std::memcpy(to + (k - begin + i) * PANEL + 2 * j, &both, sizeof both);
      }
}

void many_rows_amx(const ProductCall& c) {
  constexpr int WIDE = 2 * PANEL;
  static thread_local Arena memory;
  const int64_t padded = c.padded(), groups = c.groups(), depth = std::min(c.group_size, padded);
  const int64_t block = std::min<int64_t>(BLOCK, c.rows);
  const int64_t lines = (block + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
  // Of each thread: a group of two panels, a product of tiles, results.
  const int64_t own = depth * PANEL + (TILE_ROWS + lines) * WIDE;
  float *sums, *others;
  BFloat16* x;
  memory.allocate(Array{sums, (size_t)(lines * groups)}, Array{x, (size_t)(lines * padded)},
                  Array{others, (size_t)(c.threads * own)});
  for (int64_t first = 0; first < c.rows; first += block) {
    const int64_t rows = std::min(block, c.rows - first);
#pragma omp parallel num_threads(c.threads)
    {
      const AmxTiles tiles(TILE_ROWS);
      BFloat16* const woven = (BFloat16*)(others + omp_get_thread_num() * own);
      float *const product = (float*)(woven + depth * WIDE), *const out =
                                                                 product + TILE_ROWS * WIDE;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < lines; r++) {
        BFloat16* const line = x + r * padded;
        const int64_t there = r < rows ? c.inputs : 0;
        std::memcpy((void*)line, (const BFloat16*)c.x + (first + r) * c.x_stride, there * 2);
        std::memset((void*)(line + there), 0, (padded - there) * 2);
        sum_groups(c, line, sums + r * groups);
      }
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < c.panels(); panel += 2) {
        const int64_t other = std::min(panel + 1, c.panels() - 1);
        std::fill_n(out, lines * WIDE, 0.f);
        for (int64_t g = 0; g < groups; g++) {
          const int64_t k = g * c.group_size, end = std::min(k + c.group_size, padded);
          weave(c, panel, k, end, woven);
          weave(c, other, k, end, woven + depth * PANEL);
          Vec scale[WIDE / WIDTH], zero[WIDE / WIDTH];
          for (int j = 0; j < WIDE / WIDTH; j++) {
            const Group group(c, j < PARTS ? panel : other, g, j % PARTS);
            scale[j] = group.scale;
            zero[j] = group.zero;
          }
          for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            amx_multiply<2, false>(x + r * padded + k, padded, woven, depth * PANEL, end - k,
                                   product, WIDE, 0);
            for (int64_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
              for (int j = 0; j < WIDE / WIDTH; j++) {
                float* const to = out + (r + i) * WIDE + j * WIDTH;
                const Vec sum = load(product + i * WIDE + j * WIDTH);
                store(to, load(to) + scale[j] * (sum - zero[j] * sums[(r + i) * groups + g]));
              }
          }
        }
        store_results(c, first, rows, panel, WIDE, out, WIDE);
      }
    }
  }
}

void multiply(const ProductCall& c) {
  if (c.rows == 0) return;
  if (c.rows == 1) return few_rows<1>(c);
  if (c.rows == 2) return few_rows<2>(c);
  if (c.rows <= FEW) return few_rows<FEW>(c);
  if constexpr (HAS_AMX)
    if (c.format == BFLOAT16 && c.group_size >= CHUNK && amx_permitted()) return many_rows_amx(c);
  many_rows(c);
}

// Rows of the weight, by number; false, and nothing read, if one of them is not there.
bool gather(const ProductCall& c, const int64_t* ids) {
  const int64_t groups = c.groups(), length = c.chunks() * BITS;
  for (int64_t r = 0; r < c.rows; r++)
    if (ids[r] < 0 || ids[r] >= c.outputs) return false;
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.rows > 16)
  for (int64_t r = 0; r < c.rows; r++) {
    const int64_t panel = ids[r] / PANEL, lane = ids[r] % PANEL;
    const uint32_t* words = c.words + panel * length * PANEL + lane;
    for (int64_t k = 0; k < c.inputs; k++) {
      const int64_t bit = k * BITS, word = bit / 32, offset = bit % 32;
      uint64_t bits = words[word * PANEL];
      if (offset + BITS > 32) bits |= (uint64_t)words[(word + 1) * PANEL] << 32;
      const int64_t at = (panel * groups + k / c.group_size) * PANEL + lane;
      const float value = (float)((bits >> offset) & MASK);
      float scale, zero;
      if (c.zero_format == LEVELS) {
        const int level = ((const uint8_t*)c.zeros)[at];
        scale =
            ((level & 15) + 1) / 16.0f * value_at(c.scales, panel * PANEL + lane, c.scale_format);
        zero = (level >> 4) * ZERO_STEP;
      } else {
        scale = value_at(c.scales, at, c.scale_format);
        zero = c.zero_format == NONE ? MIDPOINT : value_at(c.zeros, at, c.zero_format);
      }
      store_as(c.out, r * c.inputs + k, (value - zero) * scale, c.format);
    }
  }
  return true;
}

}  // namespace

extern "C" {

// out[rows, outputs] = x[rows, inputs] * weight^T; 0, or 1 if memory ran out.
int attnserve_packed_multiply(const ProductCall* c) {
  try {
    multiply(*c);
    return 0;
  } catch (...) {
    return 1;
  }
}

// out[rows, inputs] = weight[ids]; `x` holds the ids, int64. 0, or 1 if the weight has no such row.
int attnserve_packed_gather(const ProductCall* c) { return !gather(*c, (const int64_t*)c->x); }

// For the loader: a library whose struct differs from Python's must not be called.
int attnserve_packed_abi() { return (int)sizeof(ProductCall); }
}
