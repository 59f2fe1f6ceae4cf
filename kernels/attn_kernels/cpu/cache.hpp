// How keys and values lie in the paged cache: in packed order inside each block of each KV head.
//
//   keys          [block_size / 16][head_size][16]: panels of sixteen tokens
//   values        [head_size / 16][block_size][16]: panels of sixteen dims
//
// In bfloat16 two rows of a panel are woven: [head_size / 2][16][2] and [block_size / 2][16][2]. So
// they are in 4 bits, with the halves of a byte for the last 2.
//
//   key, value parameters  [2][block_size] 32-bit words, of quantized formats
//   accumulators  [block_size] float32, of stateful variants; KV head 0's are used
//   gate sums     [query heads of the KV head][block_size] float64, of gated variants (gates.hpp)
//
// Behind the heads of a block there may be selecting keys, head 0's of another rank: keys of one
// more KV head, which has nothing else.
//
// Either product of attention then reads a block's memory once and in order (matmul.hpp).
#pragma once
#include "quantized.hpp"

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
  T* keys(int64_t index, int kv_head, int offset) const {
    return block(index, kv_head) + units<T>((ptrdiff_t)offset * head_size);
  }
  // Where the token at `offset` (even) lies in the first panel; the next panel is value_panel()
  // further.
  T* values(int64_t index, int kv_head, int offset) const {
    return block(index, kv_head) + units<T>((ptrdiff_t)block_size * head_size + offset * PANEL);
  }
  ptrdiff_t value_panel() const { return units<T>((ptrdiff_t)block_size * PANEL); }

  // Of the keys of a block; those of its values follow. None where nothing is quantized.
  uint32_t* parameters(int64_t index, int kv_head) const {
    return (uint32_t*)(block(index, kv_head) + units<T>((ptrdiff_t)2 * block_size * head_size));
  }
  // What a stateful or a gated variant has behind all that.
  void* behind(int64_t index, int kv_head) const {
    return parameters(index, kv_head) + (QUANTIZED<T> ? 2 * block_size : 0);
  }
  float* accumulators(int64_t index) const { return (float*)behind(index, 0); }

  void write_key(int64_t slot, int kv_head, const T* key) const {
    const int offset = slot % block_size;
    T* k = keys(slot / block_size, kv_head, offset / PANEL * PANEL);
    for (int d = 0; d < head_size; d++) k[in_panel(d, offset % PANEL)] = key[d];
  }

  // One token's key and value [head_size] of a KV head: as they are, or float32 that is quantized,
  // which changes them.
  template <class U>
  void write(int64_t slot, int kv_head, U* key, U* value) const {
    const int64_t index = slot / block_size;
    const int offset = slot % block_size;
    T *k = keys(index, kv_head, offset / PANEL * PANEL), *v = values(index, kv_head, 0);
    if constexpr (QUANTIZED<T>) {
      int8_t quantized[MAX_HEAD_SIZE];
      uint32_t* words = parameters(index, kv_head) + offset;
      words[0] = quantize<T>(key, head_size, quantized);
      put_column(k, offset % PANEL, quantized, head_size);
      words[block_size] = quantize<T>(value, head_size, quantized);
      for (int d = 0; d < head_size; d += PANEL, v += value_panel())
        put_row(v, offset, quantized + d);
    } else {
      write_key(slot, kv_head, key);
      for (int d = 0; d < head_size; d++)
        v[d / PANEL * value_panel() + in_panel(offset, d % PANEL)] = value[d];
    }
  }
};
