// The arguments of a call.
#pragma once
#include <algorithm>

#include "arena.hpp"
#include "cache.hpp"

enum Format : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

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
  float scale;
  int32_t num_heads, window;  // window: 0 is none
  int32_t query_format, out_format, cache_format;
};

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }
