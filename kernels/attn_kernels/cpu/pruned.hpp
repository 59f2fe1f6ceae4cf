// Attention of a stateful variant within a budget: each request keeps at most `budget` tokens a
// layer, in one page. The rule of eviction is that of attn_kernels/pruning.py, carried out token by
// token: a page is small, so that a query meets `budget` keys however long its context is.
//
// A page: keys [num_kv_heads][budget][head_size], values likewise, those of a selector (head 0's
// keys where that is another rank's) [budget][head_size], accumulators [budget] int32, positions
// [budget] int32. Slots are in no order; the first min(tokens, budget) are taken.
#pragma once
#include <vector>

#include "call.hpp"
#include "spans.hpp"
#include "variant.hpp"

// Arguments of one call; attn_kernels/cpu/kernel.py has the same fields in the same order.
struct PrunedCall {
  void* pages;
  int64_t page_stride;              // in bytes
  const void *query, *key, *value;  // [num_tokens, heads, head_size]; key and value as in the page
  void* out;                        // [>= num_tokens, num_heads, head_size]
  const void *selecting_query, *selecting_key;                 // head 0's, of a selector, or null
  int64_t query_stride, key_stride, value_stride, out_stride;  // of a token, in elements
  int64_t selecting_query_stride, selecting_key_stride;
  const Batch* batch;   // the first entry of a request's block table is its page
  const float* values;  // see Parameters
  float scale;
  int32_t num_heads, num_kv_heads, head_size, budget;
  int32_t query_format, out_format, page_format;
};

template <class V, class T>
class Pruned {
  static_assert(V::stateful && !V::two_pass && !V::unit_keys && !V::biased && !V::gated,
                "a one-pass variant with accumulators");
  static constexpr float FRACTION = 0x1p16f;  // of an accumulator

  const PrunedCall& call;
  const V variant;
  const int head_size, budget, group_size, padded;  // padded: slots in whole vectors of `update`

  // The scan of a request's tokens, which KV head 0 leaves for the other heads.
  struct Scan {
    int request, first_token, num_tokens, num_before;
    int32_t* slots;    // [num_tokens]: where each token goes
    float* penalties;  // [num_tokens, padded]
  };

  // Of the query heads of a KV head: each query, its scores, and what is known of it.
  struct Group {
    float *q, *s;
    Query* query;
  };

 public:
  explicit Pruned(const PrunedCall& c)
      : call(c),
        variant(Parameters{c.scale, c.head_size, c.values, nullptr}),
        head_size(c.head_size),
        budget(c.budget),
        group_size(c.num_heads / c.num_kv_heads),
        padded(round_up(c.budget, PANEL)) {}

  void run() {
    static thread_local Arena shared;
    static thread_local std::vector<Scan> scans;
    const Batch& batch = *call.batch;
    scans.clear();
    int64_t total = 0;
    for (int r = 0; r < batch.num_reqs; r++) {
      const int first = batch.query_start_loc[r], count = batch.query_start_loc[r + 1] - first;
      if (count == 0) continue;
      scans.push_back({r, first, count, batch.seq_lens[r] - count, nullptr, nullptr});
      total += count;
    }
    int32_t* slots;
    float* penalties;
    shared.allocate(Array{slots, (size_t)total}, Array{penalties, (size_t)total * padded});
    for (Scan& scan : scans) {
      scan.slots = slots;
      scan.penalties = penalties;
      slots += scan.num_tokens;
      penalties += (ptrdiff_t)scan.num_tokens * padded;
    }
    const Scan* all = scans.data();
    const int num = scans.size(), others = call.num_kv_heads - 1;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(batch.threads) if (num * call.num_kv_heads > 1)
    {
      static thread_local Arena arena;
      Group group{};
      try {
        const size_t rows = group_size;
        arena.allocate(Array{group.q, rows * head_size}, Array{group.s, rows * padded},
                       Array{group.query, rows});
      } catch (...) {
        failed = true;
      }
#pragma omp barrier
      if (!failed) {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < num; i++) select(all[i], group);
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < num * others; i++) follow(all[i / others], 1 + i % others, group);
      }
    }
    if (failed) throw std::bad_alloc();
  }

 private:
  char* page(const Scan& scan) const {
    const int64_t index = call.batch->block_table[scan.request * call.batch->block_table_stride];
    return (char*)call.pages + index * call.page_stride;
  }
  T* keys(const Scan& scan, int kv_head) const {
    return (T*)page(scan) + (ptrdiff_t)kv_head * budget * head_size;
  }
  T* values(const Scan& scan, int kv_head) const { return keys(scan, call.num_kv_heads + kv_head); }
  T* selecting_keys(const Scan& scan) const { return keys(scan, 2 * call.num_kv_heads); }

  // KV head 0: evicts, inserts, attends and accumulates.
  void select(const Scan& scan, const Group& group) const {
    const bool apart = call.selecting_key;
    int32_t* accumulators = (int32_t*)(selecting_keys(scan) + (apart ? budget * head_size : 0));
    int32_t* positions = accumulators + budget;
    for (int i = 0; i < scan.num_tokens; i++) {
      const int position = scan.num_before + i, stored = std::min(position + 1, budget);
      const int slot = position < budget ? position : victim(accumulators, positions);
      scan.slots[i] = slot;
      accumulators[slot] = 0;
      positions[slot] = position;
      float* penalties = scan.penalties + (ptrdiff_t)i * padded;
      for (int j = 0; j < stored; j++) penalties[j] = accumulators[j] * (1 / FRACTION);
      if (apart) {
        score_apart(scan, i, stored, group);
        accumulate(group.s, stored, slot, accumulators, positions);
      }
      attend(scan, 0, i, group, [&](const float* scores) {
        if (!apart) accumulate(scores, stored, slot, accumulators, positions);
      });
    }
  }

  // A selector's token: its key into its slot, then its scores.
  void score_apart(const Scan& scan, int i, int stored, const Group& group) const {
    const int64_t token = scan.first_token + i;
    T* k = selecting_keys(scan);
    std::copy_n((const T*)call.selecting_key + token * call.selecting_key_stride, head_size,
                k + (ptrdiff_t)scan.slots[i] * head_size);
    prepare(call.selecting_query, token * call.selecting_query_stride, 0, scan.num_before + i,
            stored, group.q);
    for (int j = 0; j < stored; j++) group.s[j] = dot(group.q, k + (ptrdiff_t)j * head_size);
  }

  // Another KV head, in the slots that head 0 chose.
  void follow(const Scan& scan, int kv_head, const Group& group) const {
    for (int i = 0; i < scan.num_tokens; i++) attend(scan, kv_head, i, group, [](const float*) {});
  }

  // The largest accumulator's slot, the oldest of equal ones, never the first token's.
  int victim(const int32_t* accumulators, const int32_t* positions) const {
    int chosen = -1;
    for (int j = 0; j < budget; j++) {
      if (positions[j] == 0) continue;
      if (chosen < 0 || accumulators[j] > accumulators[chosen] ||
          (accumulators[j] == accumulators[chosen] && positions[j] < positions[chosen]))
        chosen = j;
    }
    return chosen;
  }

  // What the newest token, in `slot`, adds to the others: nothing to the first.
  void accumulate(const float* scores, int stored, int slot, int32_t* accumulators,
                  const int32_t* positions) const {
    for (int j = 0; j < stored; j += WIDTH) {
      alignas(64) float added[WIDTH];
      store(added, V::selection(load(scores + j)));
      for (int k = 0; k < std::min(WIDTH, stored - j); k++) {
        if (j + k == slot || positions[j + k] == 0) continue;
        // Both fit a double exactly; INT32_MAX is where an accumulator stays.
        const double sum = accumulators[j + k] + std::nearbyint((double)added[k] * FRACTION);
        accumulators[j + k] = (int32_t)std::min(sum, (double)INT32_MAX);
      }
    }
  }

  // One token: into its slot, then against all that is there. before(scores of the group's first
  // head) sees them without penalties.
  template <class F>
  void attend(const Scan& scan, int kv_head, int i, const Group& group, F&& before) const {
    const int position = scan.num_before + i, stored = std::min(position + 1, budget);
    const int token = scan.first_token + i;
    T *k = keys(scan, kv_head), *v = values(scan, kv_head);
    const ptrdiff_t place = (ptrdiff_t)scan.slots[i] * head_size,
                    head = (ptrdiff_t)kv_head * head_size;
    std::copy_n((const T*)call.key + token * call.key_stride + head, head_size, k + place);
    std::copy_n((const T*)call.value + token * call.value_stride + head, head_size, v + place);
    const int end = round_up(stored, PANEL);
    for (int r = 0; r < group_size; r++) {
      const int h = kv_head * group_size + r;
      group.query[r] = prepare(call.query, token * call.query_stride + (int64_t)h * head_size, h,
                               position, stored, group.q + r * head_size);
    }
    for (int j = 0; j < stored; j++)
      for (int r = 0; r < group_size; r++)
        group.s[r * padded + j] = dot(group.q + r * head_size, k + (ptrdiff_t)j * head_size);
    before(group.s);
    const float* penalties = scan.penalties + (ptrdiff_t)i * padded;
    for (int r = 0; r < group_size; r++) {
      float* scores = group.s + r * padded;
      for (int j = 0; j < stored; j += WIDTH)
        store(scores + j, V::penalise(load(scores + j), load(penalties + j)));
      std::fill(scores + stored, scores + end, V::masked);
      typename V::Row row;
      variant.update(row, scores, end, group.query[r]);
      add_values(scores, v, stored, variant.epilogue(row, group.query[r]), token,
                 kv_head * group_size + r);
    }
  }

  Query prepare(const void* queries, int64_t offset, int head, int position, int stored,
                float* q) const {
    load_row(call.query_format, queries, offset, head_size, q);
    const Query query{head, position, (float)stored, norm(q, head_size)};
    const float factor = variant.query_factor(query);
    for (int d = 0; d < head_size; d += WIDTH) store(q + d, load(q + d) * factor);
    return query;
  }

  // Always summed up in the same order, whatever else is in the call: evictions depend on it.
  float dot(const float* q, const T* k) const {
    Vec sum = {};
    for (int d = 0; d < head_size; d += WIDTH) sum += load(q + d) * load(k + d);
    return horizontal_sum(sum);
  }

  void add_values(const float* weights, const T* v, int stored, float factor, int token,
                  int head) const {
    constexpr int VECTORS = 4;
    alignas(64) float o[MAX_HEAD_SIZE + VECTORS * WIDTH];
    for (int d = 0; d < head_size; d += VECTORS * WIDTH) {
      const int vectors = std::min(VECTORS, (head_size - d) / WIDTH);
      Vec sum[VECTORS] = {};
      if (vectors == VECTORS)
        for (int j = 0; j < stored; j++)
#pragma GCC unroll 4
          for (int n = 0; n < VECTORS; n++)
            sum[n] += weights[j] * load(v + (ptrdiff_t)j * head_size + d + n * WIDTH);
      else
        for (int j = 0; j < stored; j++)
          for (int n = 0; n < vectors; n++)
            sum[n] += weights[j] * load(v + (ptrdiff_t)j * head_size + d + n * WIDTH);
      for (int n = 0; n < VECTORS; n++) store(o + d + n * WIDTH, sum[n]);
    }
    const int64_t offset = token * call.out_stride + (int64_t)head * head_size;
    store_row(o, factor, head_size, call.out_format, call.out, offset);
  }
};
