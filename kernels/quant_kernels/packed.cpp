// Products with weights of a few bits that stay packed in memory, and lookups of rows. Compiled
// with -DWEIGHT_BITS=2 to 8. Plain C arguments; no exception leaves.
#include "bytes.hpp"
#include "floats.hpp"
#include "tiles.hpp"

namespace {

void multiply(const ProductCall& c) {
  if (c.rows == 0) return;
  if constexpr (HAS_AMX)
    if (c.rows > FEW && c.format == BFLOAT16 && c.group_size >= CHUNK && amx_permitted())
      return many_rows_amx(c);
  if constexpr (IN_BYTES)
    if (has_vnni()) {
      if (c.rows <= FEW) return multiply_bytes<3>(c);
      if (c.format != FLOAT32) return multiply_bytes<2>(c);  // floats are faster than three digits
    }
  if (c.rows == 1) return few_rows<1>(c);
  if (c.rows == 2) return few_rows<2>(c);
  if (c.rows <= FEW) return few_rows<FEW>(c);
  many_rows(c);
}

// Rows of the weight, by number; zeros, and nothing is read, for one that is not there.
void gather(const ProductCall& c, const int64_t* ids) {
  const int64_t groups = c.groups(), length = c.chunks() * BITS;
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.rows > 16)
  for (int64_t r = 0; r < c.rows; r++) {
    if (ids[r] < 0 || ids[r] >= c.outputs) {
      for (int64_t k = 0; k < c.inputs; k++) store_as(c.out, r * c.inputs + k, 0.f, c.format);
      continue;
    }
    const int64_t panel = ids[r] / PANEL, lane = ids[r] % PANEL;
    const uint32_t* words = c.words + panel * length * PANEL + lane;
    // Each word lies in a cache line of its own: they all come at once.
    for (int64_t w = 0; w < length; w++) __builtin_prefetch(words + w * PANEL);
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

// out[rows, inputs] = weight[ids]; `x` holds the ids, int64.
void attnserve_packed_gather(const ProductCall* c) { gather(*c, (const int64_t*)c->x); }

// For the loader: a library with another struct must not be called.
int attnserve_packed_abi() { return (int)sizeof(ProductCall); }
}
