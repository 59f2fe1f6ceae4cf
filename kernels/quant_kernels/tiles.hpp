// Many rows of bfloat16 on AMX tiles. Values less the midpoint are exact in bfloat16, so the tiles
// multiply those, a group at a time, and scales and zero points come afterwards in float32.
#pragma once
#include "bf16.hpp"
#include "packed.hpp"

namespace {

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
          const Group group[] = {Group(c, panel, g), Group(c, other, g)};
          for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            amx_multiply<2, false>(x + r * padded + k, padded, woven, depth * PANEL, end - k,
                                   product, WIDE, 0);
            for (int64_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
              for (int j = 0; j < 2; j++) {
                float* const to = out + (r + i) * WIDE + j * WIDTH;
                const Vec sum = load(product + i * WIDE + j * WIDTH);
                store(to, load(to) +
                              group[j].scale * (sum - group[j].zero * sums[(r + i) * groups + g]));
              }
          }
        }
        store_results(c, first, rows, panel, WIDE, out, WIDE);
      }
    }
  }
}

}  // namespace
