// How keys and values lie in the paged cache: in packed order inside each block of each KV head.
//
//   keys          [block_size / 16][head_size][16]: panels of sixteen tokens
//   values        [head_size / 16][block_size][16]: panels of sixteen dims
//
// In bfloat16 two rows of a panel are woven: [head_size / 2][16][2] and [block_size / 2][16][2].
//
//   accumulators  [block_size] float32, of stateful variants; KV head 0's are used
//
// Either product of attention then reads a block's memory once and in order (matmul.hpp).
#pragma once
#include "simd.hpp"

struct CacheShape {
  void* data;
  int64_t block_stride, head_stride;  // in elements
  int32_t block_size, head_size, num_kv_heads;
};

template <class T>
struct Cache : CacheShape {
  explicit Cache(const CacheShape& shape) : CacheShape(shape) {}

  T* block(int64_t index, int kv_head) const {
    return (T*)data + index * block_stride + kv_head * head_stride;
  }
  static int in_panel(int row, int column) {
    return row / T::PAIR * T::PAIR * PANEL + column * T::PAIR + row % T::PAIR;
  }
  // Where the panel of the token at `offset` (a multiple of 16) in its block begins.
  const T* keys(int64_t index, int kv_head, int offset) const {
    return block(index, kv_head) + (ptrdiff_t)offset * head_size;
  }
  // Where the token at `offset` (even) lies in the first panel; the next panel is value_panel()
  // further.
  const T* values(int64_t index, int kv_head, int offset) const {
    return block(index, kv_head) + (ptrdiff_t)block_size * head_size + offset * PANEL;
  }
  ptrdiff_t value_panel() const { return (ptrdiff_t)block_size * PANEL; }

  float* accumulators(int64_t index) const {
    return (float*)(block(index, 0) + (ptrdiff_t)2 * block_size * head_size);
  }

  // key, value: one token's [num_kv_heads, head_size].
  void write(int64_t slot, const T* key, const T* value, bool stateful) const {
    const int64_t index = slot / block_size;
    const int offset = slot % block_size;
    for (int h = 0; h < num_kv_heads; h++, key += head_size, value += head_size) {
      T* k = block(index, h) + (ptrdiff_t)(offset / PANEL * PANEL) * head_size;
      for (int d = 0; d < head_size; d++) k[in_panel(d, offset % PANEL)] = key[d];
      T* v = block(index, h) + (ptrdiff_t)block_size * head_size;
      for (int d = 0; d < head_size; d++)
        v[d / PANEL * value_panel() + in_panel(offset, d % PANEL)] = value[d];
    }
    if (stateful) accumulators(index)[offset] = 0.f;
  }
};
