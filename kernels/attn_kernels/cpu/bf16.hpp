// The product of matmul.hpp for bfloat16, where a processor multiplies that: on AMX tiles, sixteen
// rows by sixteen columns over thirty-two rows of a panel at a time, or by AVX512-BF16's products
// of pairs. A woven panel is the layout that either has for its right operand.
#pragma once
#include "matmul.hpp"

constexpr int TILE_ROWS = 16;   // of A and C
constexpr int TILE_DEPTH = 32;  // rows of a panel in a tile of B

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives a process tiles when it asks for them.
inline bool amx_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// The tile intrinsics do not tell the compiler what memory they read: have it all written before.
inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Tiles for A and C of `rows` rows, while the object lives. C: 0 and 1, A: 2, B: 3 and 4.
struct AmxTiles {
  explicit AmxTiles(int rows) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    config.rows[0] = config.rows[1] = config.rows[2] = rows;
    config.rows[3] = config.rows[4] = 16;
    written(&config);
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
};

// C[rows, NP * 16] += A * panels, or = where ADD is false. A is bfloat16 with rows `lda` elements
// apart, C's are `ldc` floats apart; depth is a multiple of TILE_DEPTH.
template <int NP, bool ADD>
inline void amx_multiply(const BFloat16* a, int lda, const BFloat16* panels, ptrdiff_t panel_stride,
                         int depth, float* c, int ldc, ptrdiff_t ahead) {
  written(a);
  if constexpr (ADD) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (NP > 1) _tile_loadd(1, c + PANEL, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (NP > 1) _tile_zero(1);
  }
  for (int k = 0; k < depth; k += TILE_DEPTH) {
    for (int line = 0; line < 16; line++)
      for (int p = 0; p < NP; p++)
        prefetch((const char*)(panels + p * panel_stride + k * PANEL) + line * 64 + ahead);
    _tile_loadd(2, a + k, lda * 2);
    _tile_loadd(3, panels + k * PANEL, 64);
    _tile_dpbf16ps(0, 2, 3);
    if constexpr (NP > 1) {
      _tile_loadd(4, panels + panel_stride + k * PANEL, 64);
      _tile_dpbf16ps(1, 2, 4);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (NP > 1) _tile_stored(1, c + PANEL, ldc * 4);
}

constexpr bool HAS_AMX = true;
#else
inline bool amx_permitted() { return false; }
struct AmxTiles {
  explicit AmxTiles(int) {}
};
template <int NP, bool ADD>
inline void amx_multiply(const BFloat16*, int, const BFloat16*, ptrdiff_t, int, float*, int,
                         ptrdiff_t) {}
constexpr bool HAS_AMX = false;
#endif

// DOT_IN_AVX512 is for tests on other processors: the same sums by other instructions.
#if defined(__AVX512BF16__) || defined(DOT_IN_AVX512)
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif
inline bool bf16_permitted() { return HAS_AMX ? amx_permitted() : HAS_BF16; }

// Sixteen floats rounded to bfloat16.
inline void round_panel(const float* from, BFloat16* to) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
  std::memcpy(to, &rounded, 32);
#else
  for (int i = 0; i < PANEL; i++) convert(from[i], to[i]);
#endif
}

// sum[j] + a[0] * b[j][0] + a[1] * b[j][1] of pairs of bfloat16.
inline Vec add_pairs(Vec sum, uint32_t a, UintVec b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)(UintVec{} + a), (__m512bh)b);
#else
  sum += (Vec)(UintVec{} + (a & 0xffff0000u)) * (Vec)(b & 0xffff0000u);
  return sum + (Vec)(UintVec{} + (a << 16)) * (Vec)(b << 16);
#endif
}

// `amx_multiply` of R rows by such sums.
template <int R, int NP, bool ADD>
inline void multiply_pairs(const BFloat16* a, int lda, const BFloat16* panels,
                           ptrdiff_t panel_stride, int depth, float* c, int ldc, ptrdiff_t ahead) {
  Vec sum[R][NP] = {};
  for (int r = 0; r < R; r++)
    for (int p = 0; p < NP; p++)
      if (ADD) sum[r][p] = load(c + r * ldc + p * PANEL);
  for (int k = 0; k < depth; k += 2) {
    UintVec b[NP];
    for (int p = 0; p < NP; p++) {
      const BFloat16* row = panels + p * panel_stride + k * PANEL;
      prefetch((const char*)row + ahead);
      std::memcpy(b + p, row, sizeof *b);
    }
    for (int r = 0; r < R; r++) {
      uint32_t pair;
      std::memcpy(&pair, a + r * lda + k, sizeof pair);
      for (int p = 0; p < NP; p++) sum[r][p] = add_pairs(sum[r][p], pair, b[p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < NP; p++) store(c + r * ldc + p * PANEL, sum[r][p]);
}

// The product of `rows` rows, by what there is; rows up to a multiple of four must exist. On tiles
// it is that of as many as `AmxTiles` has.
template <int NP, bool ADD>
inline void multiply_bf16(int rows, const BFloat16* a, int lda, const BFloat16* panels,
                          ptrdiff_t panel_stride, int depth, float* c, int ldc, ptrdiff_t ahead) {
  if constexpr (HAS_AMX)
    amx_multiply<NP, ADD>(a, lda, panels, panel_stride, depth, c, ldc, ahead);
  else if constexpr (HAS_BF16)
    for (int r = 0; r < rows; r += 4)
      multiply_pairs<4, NP, ADD>(a + r * lda, lda, panels, panel_stride, depth, c + r * ldc, ldc,
                                 ahead);
}
