// The sums of gates of a gated variant: float64, of each query head, in the cache behind the values
// of its KV head. A difference of two is what the gates between two tokens add up to; float32 would
// round the sums of a long context by more than that.
#pragma once
#include "call.hpp"

// Arguments of one call; attn_kernels/cpu/kernel.py has the same fields in the same order.
struct GateCall {
  CacheShape cache;
  const float* gates;   // [num_tokens, num_heads]
  int64_t gate_stride;  // of a token
  const Batch* batch;
  int32_t num_heads, window;  // window: 0 is none
  int32_t cache_format;
};

// What a sum loses as a float. The difference of two sums is that of the floats, which is exact
// where they are near each other, and that of the rests.
inline float rest_of(double sum) { return (float)(sum - (float)sum); }

template <class T>
struct GateSums {
  const Cache<T> cache;
  const Batch& batch;
  const int group_size;  // query heads of a KV head

  // The sums of a query head in a request's block that has the token at `position`.
  double* block(int request, int head, int position) const {
    const int64_t index =
        batch.block_table[request * batch.block_table_stride + position / cache.block_size];
    return (double*)cache.behind(index, head / group_size) + head % group_size * cache.block_size;
  }
  double& at(int request, int head, int position) const {
    return block(request, head, position)[position % cache.block_size];
  }

  // The sums of the positions [begin, end), as pairs of floats.
  void load(int request, int head, int begin, int end, float* rounded, float* rests) const {
    for (int p = begin; p < end;) {
      const int offset = p % cache.block_size,
                length = std::min(cache.block_size - offset, end - p);
      const double* sums = block(request, head, p) + offset;
      for (int i = 0; i < length; i++) {
        rounded[p - begin + i] = (float)sums[i];
        rests[p - begin + i] = rest_of(sums[i]);
      }
      p += length;
    }
  }

  // Continues the sums of a head with a request's new tokens.
  void write(const GateCall& call, int request, int head) const {
    const int first = batch.query_start_loc[request], end = batch.query_start_loc[request + 1];
    int position = batch.seq_lens[request] - (end - first);
    const bool hidden = call.window == 1;  // the block before may be another request's
    double sum = first == end || position == 0 || hidden ? 0 : at(request, head, position - 1);
    for (int token = first; token < end; token++, position++)
      at(request, head, position) = sum += call.gates[token * call.gate_stride + head];
  }
};

template <class T>
void write_gates(const GateCall& call) {
  const Batch& batch = *call.batch;
  const GateSums<T> sums{Cache<T>(call.cache), batch, call.num_heads / call.cache.num_kv_heads};
  const int64_t work = (int64_t)batch.query_start_loc[batch.num_reqs] * call.num_heads;
#pragma omp parallel for collapse(2) num_threads(batch.threads) if (work > 8192)
  for (int request = 0; request < batch.num_reqs; request++)
    for (int head = 0; head < call.num_heads; head++) sums.write(call, request, head);
}
