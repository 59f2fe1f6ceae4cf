// The arguments of a call.
#pragma once
#include <algorithm>

#include "arena.hpp"
#include "cache.hpp"

enum Format : int32_t { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // the last two of a cache

// A step's requests, for all layers; attn_kernels/batch.py has the same fields in the same order.
struct Batch {
  const int32_t* block_table;  // [num_reqs, block_table_stride]
  int64_t block_table_stride;
  const int32_t* query_start_loc;  // [num_reqs + 1]
  const int32_t* seq_lens;         // [num_reqs]
  int32_t num_reqs, threads;
};

// Arguments of one call; attn_kernels/cpu/kernel.py has the same fields in the same order.
struct AttendCall {
  CacheShape cache;
  const void* query;                 // [num_tokens, num_heads, head_size]
  void* out;                         // [>= num_tokens, num_heads, head_size]
  int64_t query_stride, out_stride;  // of a token, in elements
  const Batch* batch;
  const float* values;  // see Parameters
  const float* const* learned;
  const float* alibi_slopes;  // [num_heads], or null
  const void* selecting;      // [num_tokens, head_size]: head 0's queries, of a selector
  int64_t selecting_stride;   // of a token, in elements
  float scale, soft_cap;      // soft_cap: 0 is none
  int32_t num_heads, window;  // window: 0 is none
  int32_t selector;           // whether head 0 is another rank's, its keys behind the heads'
  int32_t query_format, out_format, cache_format;
};

// f(row) with the row at `offset` elements behind `p`, as a pointer of its format.
template <class F>
inline void with_row(int32_t format, const void* p, int64_t offset, F&& f) {
  switch (format) {
    case FLOAT32: return f((Float32*)p + offset);
    case BFLOAT16: return f((BFloat16*)p + offset);
    case FLOAT16: return f((Float16*)p + offset);
  }
}
inline void load_row(int32_t format, const void* from, int64_t offset, int count, float* to) {
  with_row(format, from, offset, [&](const auto* row) {
    for (int d = 0; d < count; d += WIDTH) store(to + d, load(row + d));
  });
}
// The length of a row of floats.
inline float norm(const float* row, int count) {
  Vec squares = {};
  for (int d = 0; d < count; d += WIDTH) squares += load(row + d) * load(row + d);
  return std::sqrt(horizontal_sum(squares));
}
inline void store_row(const float* from, float factor, int count, int32_t format, void* to,
                      int64_t offset) {
  with_row(format, to, offset, [&](auto* row) {
    for (int d = 0; d < count; d++) convert(from[d] * factor, row[d]);
  });
}

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }
