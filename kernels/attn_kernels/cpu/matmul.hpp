// The one product that attention needs: C[rows, 16] += A[rows, depth] * panel[depth, 16].
// With keys as panels of sixteen tokens and values as panels of sixteen dims, both q.K and
// weights.V are this product over memory that is read once and in order.
#pragma once
#include "simd.hpp"

// Rows of C that stay in registers. AVX-512: 12 rows of 2 panels, 24 of 32 registers; AVX2: 6 rows
// of 1 panel (2 vectors each), 12 of 16.
constexpr int ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int PANELS = REGISTERS == 32 ? 2 : 1;
constexpr int PARTS = PANEL / WIDTH;

// Panels that a few rows read side by side: four streams of memory are faster than one.
constexpr int STREAMS = REGISTERS == 32 ? 4 : 1;

// Panels whose listed rows a row of A meets at a time.
constexpr int LISTED_PANELS = REGISTERS == 32 ? 4 : 2;

// Into the second-level cache: what is fetched is a block away.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// C[R, NP * 16] = C * rescale[row] + A * panels. A's rows are LDA floats apart, C's LDC; panel p
// starts at `panels + p * panel_stride` (in objects of T), at an even row. With ADD false, C is
// overwritten. `ahead` is how many bytes behind a panel the memory lies that is to be fetched
// meanwhile: a few rows wait for memory, and the processor's own prefetcher stops at every page.
// With LISTED, A's columns meet the panels' rows `listed[0], listed[1], ...`, and nothing is
// fetched.
template <int R, int NP, int LDA, int LDC, bool ADD, bool LISTED = false, class T>
inline void multiply(const float* a, const T* panels, ptrdiff_t panel_stride, ptrdiff_t depth,
                     float* c, const float* rescale, ptrdiff_t ahead,
                     const int32_t* listed = nullptr) {
  static_assert(!LISTED || T::PAIR == 1);
  constexpr int N = NP * PARTS, PAIR = T::PAIR;
  // A row or two alone would wait for each addition: so many sums run side by side. Not of a list,
  // behind whose pairs there is a rest or none, which no processor foretells.
  constexpr int CHAINS = LISTED || R * N >= 8 ? 1 : R * N >= 4 ? 2 : 4;
  constexpr int STEP = CHAINS > PAIR ? CHAINS : PAIR;
  const auto at = [&](ptrdiff_t k, int j) {
    if constexpr (LISTED) k = listed[k];
    return panels + j / PARTS * panel_stride + units<T>(k * PANEL + j % PARTS * WIDTH * PAIR);
  };
  Vec sum[CHAINS][R][N] = {};
  ptrdiff_t k = 0;
  for (; k + STEP <= depth; k += STEP)
#pragma GCC unroll 4
    for (int pair = 0; pair < STEP; pair += PAIR) {
      Vec b[N][PAIR];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) {
        const T* p = at(k + pair, j);
        if constexpr (R <= 4 && !LISTED) prefetch((const char*)p + ahead);
        load_rows(p, b[j]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < PAIR; i++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int j = 0; j < N; j++)
            sum[(pair + i) % CHAINS][r][j] += a[r * LDA + k + pair + i] * b[j][i];
    }
  for (int rest = 1; rest < STEP && k < depth; rest++, k++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      Vec b[PAIR];
      load_rows(at(k / PAIR * PAIR, j), b);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) sum[0][r][j] += a[r * LDA + k] * b[k % PAIR];
    }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      Vec total = sum[0][r][j];
#pragma GCC unroll 4
      for (int chain = 1; chain < CHAINS; chain++) total += sum[chain][r][j];
      float* out = c + r * LDC + j * WIDTH;
      store(out, ADD ? load(out) * rescale[r] + total : total);
    }
}

// The least number of rows >= `rows` that `multiply_rows` has a kernel for.
inline int kernel_rows(int rows) {
  return rows <= 4 ? rows : rows <= 6 ? 6 : rows <= 8 && ROWS >= 8 ? 8 : ROWS;
}

// `multiply` for 1 to ROWS rows; rows up to kernel_rows(rows) of A and C must exist.
template <int NP, int LDA, int LDC, bool ADD, class T>
inline void multiply_rows(int rows, const float* a, const T* panels, ptrdiff_t panel_stride,
                          ptrdiff_t depth, float* c, const float* rescale, ptrdiff_t ahead) {
  switch (kernel_rows(rows)) {
    // clang-format off
#define CASE(R) \
  case R: return multiply<R, NP, LDA, LDC, ADD>(a, panels, panel_stride, depth, c, rescale, ahead);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(6)
#if defined(__AVX512F__)
    CASE(8) CASE(12)
#endif
#undef CASE
    // clang-format on
  }
}
