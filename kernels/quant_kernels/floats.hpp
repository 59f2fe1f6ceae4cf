// Products in float32, for all bits, instruction sets and numbers of rows.
#pragma once
#include "packed.hpp"

namespace {

// ---- Few rows: values go from memory into registers and meet every row there.

constexpr int FEW = 4;

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
  const int64_t ahead = words_ahead(c, P);
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

}  // namespace
