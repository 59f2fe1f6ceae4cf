// The product of matmul.hpp on AMX tiles, for bfloat16: sixteen rows by sixteen columns over
// thirty-two rows of a panel at a time. A woven panel is the layout that the tiles' B operand has.
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

// Sixteen floats rounded to bfloat16.
inline void round_panel(const float* from, BFloat16* to) {
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
  std::memcpy(to, &rounded, 32);
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
inline void round_panel(const float*, BFloat16*) {}
constexpr bool HAS_AMX = false;
#endif
