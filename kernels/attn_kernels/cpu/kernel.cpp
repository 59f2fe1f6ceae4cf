// The entry points of one variant's library: compiled with -include variants/NAME/kernel.hpp and
// -DVARIANT=Struct. Plain C arguments; no exception leaves. Quantized caches are in a library of
// their own (quantized.cpp): either compiles in half the time.
#include <omp.h>

#include <atomic>
#include <vector>

#include "attention.hpp"
#include "pruned.hpp"

namespace {

// Rows of a tile: many, so that each key that is loaded meets many queries; but two-pass variants
// keep the scores of a whole tile, and stateful ones its penalties.
constexpr int MAX_TILE_ROWS = 6 * MAX_BLOCK;
constexpr int TILE_FLOATS = 1 << 20;

// Splitting a context is worth its merge from so many keys a part.
constexpr int MIN_PART = 512;
// Parts a thread, so that an uneven batch still fills all threads.
constexpr int PARTS_PER_THREAD = 4;

template <class V, class T>
class Plan {
  using A = Attention<V, T>;
  using Row = typename V::Row;
  static constexpr int SPAN = A::SPAN;

  const A attention;
  const AttendCall& call;
  std::vector<Task>& tasks;
  Arena& shared;

  // A request of several tiles whose accumulators must be known before each tile.
  struct Walk {
    int request, tile, begin, end;
    ptrdiff_t stride;
    float* snapshots;
  };
  std::vector<Walk> walks;

  // Partial results of split tiles, [group][kv head of the task][part].
  int num_groups = 0, max_rows = 0, max_parts = 1;
  int heads_per_task;
  std::atomic<int>* finished = nullptr;
  float* part_outputs = nullptr;
  Row* part_rows = nullptr;
  Row* statistics = nullptr;
  float* part_scores = nullptr;
  size_t scores_per_part = 0;

 public:
  Plan(const AttendCall& c, std::vector<Task>& t, Arena& a)
      : attention(c),
        call(c),
        tasks(t),
        shared(a),
        heads_per_task(V::stateful ? c.cache.num_kv_heads : 1) {}

  int tile_queries(int keys) const {
    int rows = MAX_TILE_ROWS;
    if (V::two_pass)
      rows = std::clamp(TILE_FLOATS / keys / MAX_BLOCK * MAX_BLOCK, MAX_BLOCK, MAX_TILE_ROWS);
    int queries = std::max(1, rows / attention.group_size);
    if (V::stateful) queries = std::min(queries, std::max(1, TILE_FLOATS / keys));
    return queries;
  }

  void make_tasks() {
    tasks.clear();
    int64_t total = 0;
    for (int request = 0; request < call.batch->num_reqs; request++) {
      const int queries = attention.queries_of(request), keys = call.batch->seq_lens[request];
      if (queries == 0) continue;
      const int first = attention.first_position(request);
      const int tile = tile_queries(keys);
      for (int q = 0; q < queries; q += tile) {
        const int count = std::min(tile, queries - q);
        const int begin = attention.first_visible(first + q), end = first + q + count;
        // Few rows are bound by memory: four cost what one does.
        const int64_t cost = (int64_t)std::max(4, count * attention.group_size) * (end - begin);
        for (int h = 0; h < (V::stateful ? 1 : call.cache.num_kv_heads); h++) {
          tasks.push_back(
              {request, h, q, count, begin, end, 0, 1, 0, nullptr, cost * heads_per_task});
          total += cost * heads_per_task;
        }
      }
      if (V::stateful && queries > tile) {
        const int begin = attention.first_visible(first) / PANEL * PANEL;
        walks.push_back({request, tile, begin, keys, keys - begin, nullptr});
      }
    }
    if (call.batch->threads > 1) split(total / (call.batch->threads * PARTS_PER_THREAD) + 1);
    if (call.batch->threads > 1)
      std::stable_sort(tasks.begin(), tasks.end(),
                       [](const Task& a, const Task& b) { return a.cost > b.cost; });
  }

  void split(int64_t target) {
    const size_t whole = tasks.size();
    for (size_t i = 0; i < whole; i++) {
      Task task = tasks[i];
      const int begin = task.key_begin / SPAN * SPAN, spans = A::num_spans(begin, task.key_end);
      const int wanted =
          std::min<int64_t>((task.cost + target - 1) / target, (task.key_end - begin) / MIN_PART);
      if (wanted <= 1) continue;
      const int each = (spans + wanted - 1) / wanted, parts = (spans + each - 1) / each;
      if (parts <= 1) continue;
      task.group = num_groups++;
      task.num_parts = parts;
      task.cost /= parts;
      max_rows = std::max(max_rows, task.num_queries * attention.group_size);
      max_parts = std::max(max_parts, parts);
      const int last = task.key_end, first = task.key_begin;
      for (int part = 0; part < parts; part++) {
        task.part = part;
        task.key_begin = part ? begin + part * each * SPAN : first;
        task.key_end = part == parts - 1 ? last : begin + (part + 1) * each * SPAN;
        if (part)
          tasks.push_back(task);
        else
          tasks[i] = task;
        if (V::two_pass)
          scores_per_part =
              std::max(scores_per_part, A::scores_size(task.num_queries * attention.group_size,
                                                       task.key_begin, task.key_end));
      }
    }
  }

  void reserve() {
    const size_t parts = (size_t)num_groups * heads_per_task * max_parts, rows = parts * max_rows;
    const size_t counters = (size_t)num_groups * heads_per_task;
    size_t snapshots = 0;
    for (const Walk& w : walks) snapshots += snapshots_of(w);
    float* snapshot;
    shared.allocate(Array{finished, counters}, Array{part_outputs, rows * attention.head_size},
                    Array{part_rows, rows}, Array{statistics, V::two_pass ? rows : 0},
                    Array{part_scores, parts * scores_per_part}, Array{snapshot, snapshots});
    for (size_t i = 0; i < counters; i++) new (finished + i) std::atomic<int>(0);
    for (Walk& w : walks) {
      // Positions index a snapshot: move its start back by the keys that nobody sees.
      w.snapshots = snapshot - w.begin;
      snapshot += snapshots_of(w);
      for (Task& task : tasks)
        if (task.request == w.request)
          task.snapshot = w.snapshots + task.first_query / w.tile * w.stride;
    }
  }
  size_t snapshots_of(const Walk& w) const {
    return (size_t)((attention.queries_of(w.request) - 1) / w.tile + 1) * w.stride;
  }

  size_t part_index(const Task& task, int kv_head, int part) const {
    const int head = V::stateful ? kv_head : 0;
    return ((size_t)task.group * heads_per_task + head) * max_parts + part;
  }

  void run() {
    make_tasks();
    reserve();
    const int num_tasks = tasks.size(), num_walks = walks.size();
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.batch->threads) if (num_tasks > 1)
    {
      static thread_local Arena arena;
      const auto guarded = [&](auto&& f) {
        try {
          f();
        } catch (...) {
          failed = true;
        }
      };
      if (num_walks) walk_all(arena, guarded);
      if (V::two_pass && num_groups) {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < num_tasks; i++)
          if (tasks[i].num_parts > 1) guarded([&] { gather_statistics(tasks[i], arena); });
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int i = 0; i < num_tasks; i++) guarded([&] { attend(tasks[i], arena); });
    }
    if (failed) throw std::bad_alloc();
  }

  // Different keys' accumulators are independent: the keys of a request are walked in pieces.
  template <class G>
  void walk_all(Arena& arena, G& guarded) {
    for (const Walk& w : walks) {
      const int first = w.begin / SPAN, pieces = A::num_spans(w.begin, w.end);
#pragma omp for schedule(dynamic, 1)
      for (int piece = 0; piece < pieces; piece++)
        guarded([&] {
          attention.take_snapshots(w.request, w.tile, std::max(w.begin, (first + piece) * SPAN),
                                   std::min(w.end, (first + piece + 1) * SPAN), w.snapshots,
                                   w.stride, arena);
        });
    }
  }

  void gather_statistics(const Task& task, Arena& arena) {
    auto tile = attention.make_tile(task, arena);
    const size_t index = part_index(task, task.kv_head, task.part);
    tile.scores = part_scores + index * scores_per_part;
    attention.start(tile);
    attention.run_pass(tile, task, A::STATISTICS);
    std::copy_n(tile.row, tile.rows, statistics + index * max_rows);
  }

  void attend(const Task& task, Arena& arena) {
    auto tile = attention.make_tile(task, arena);
    for (int h = 0; h < heads_per_task; h++) {
      if (V::stateful) tile.kv_head = h;
      attention.start(tile);
      if constexpr (V::two_pass) {
        if (task.num_parts > 1)
          merge_all_statistics(tile, task);
        else
          attention.run_pass(tile, task, A::STATISTICS);
        attention.finish_statistics(tile);
        attention.run_pass(tile, task, A::OUTPUT);
      } else {
        attention.run_pass(tile, task, A::WHOLE);
      }
      if (task.num_parts > 1)
        store_part(tile, task);
      else
        attention.epilogue(tile);
    }
  }

  // The first pass of a split context is over: what all parts saw together.
  void merge_all_statistics(typename A::Tile& tile, const Task& task) {
    if constexpr (V::two_pass) {
      tile.scores = part_scores + part_index(task, task.kv_head, task.part) * scores_per_part;
      for (int part = 0; part < task.num_parts; part++) {
        const Row* seen = statistics + part_index(task, task.kv_head, part) * max_rows;
        for (int r = 0; r < tile.rows; r++)
          attention.variant.merge_statistics(tile.row[r], seen[r]);
      }
    }
  }

  // Leaves a part's result; whoever comes last merges all parts, always in the same order.
  void store_part(const typename A::Tile& tile, const Task& task) {
    const int d = attention.head_size;
    const size_t first = part_index(task, tile.kv_head, 0);
    const size_t mine = (first + task.part) * max_rows;
    for (int r = 0; r < tile.rows; r++) {
      part_rows[mine + r] = tile.row[r];
      std::copy_n(tile.o + (ptrdiff_t)r * WIDE, d, part_outputs + (mine + r) * d);
    }
    if (finished[first / max_parts].fetch_add(1, std::memory_order_acq_rel) + 1 < task.num_parts)
      return;
    for (int r = 0; r < tile.rows; r++) {
      Row row = part_rows[first * max_rows + r];
      float* o = part_outputs + (first * max_rows + r) * d;
      for (int part = 1; part < task.num_parts; part++) {
        const size_t other = (first + part) * max_rows + r;
        const Factors f = attention.variant.merge(row, part_rows[other]);
        for (int j = 0; j < d; j++) o[j] = o[j] * f.mine + part_outputs[other * d + j] * f.theirs;
      }
      attention.write_out(tile, r, o, attention.variant.epilogue(row, tile.query[r]));
    }
  }
};

template <class T>
void attend(const AttendCall& call) {
  static thread_local std::vector<Task> tasks;
  static thread_local Arena shared;
  Plan<VARIANT, T>(call, tasks, shared).run();
}

struct WriteCall {
  CacheShape cache;
  // [>= num_tokens, num_kv_heads, head_size], in the cache's format unless that is quantized
  const void *key, *value;
  const void* selecting;  // [>= num_tokens, head_size]: head 0's keys, of a selector, or null
  int64_t key_stride, value_stride, selecting_stride;  // of a token, in elements
  const int64_t* slot_mapping;                         // [num_tokens]; -1 is padding
  int64_t num_tokens;
  int32_t key_format, value_format, cache_format, threads;
};

template <class T>
void write(const WriteCall& w) {
  const Cache<T> cache(w.cache);
#pragma omp parallel num_threads(w.threads) if (w.num_tokens > 256)
  for (int64_t i = 0; i < w.num_tokens; i++) {
    // Tokens of a panel may share bytes: the same thread writes them.
    const int64_t slot = w.slot_mapping[i];
    if (slot < 0 || slot / PANEL % omp_get_num_threads() != omp_get_thread_num()) continue;
    for (int h = 0; h < cache.num_kv_heads; h++) {
      const int64_t key = i * w.key_stride + h * cache.head_size,
                    value = i * w.value_stride + h * cache.head_size;
      if constexpr (QUANTIZED<T>) {
        alignas(64) float k[MAX_HEAD_SIZE], v[MAX_HEAD_SIZE];
        load_row(w.key_format, w.key, key, cache.head_size, k);
        load_row(w.value_format, w.value, value, cache.head_size, v);
        cache.write(slot, h, k, v);
      } else {
        cache.write(slot, h, (const T*)w.key + key, (const T*)w.value + value);
      }
    }
    if constexpr (VARIANT::stateful && !QUANTIZED<T>)
      if (w.selecting)
        cache.write_key(slot, cache.num_kv_heads, (const T*)w.selecting + i * w.selecting_stride);
    if (VARIANT::stateful) cache.accumulators(slot / cache.block_size)[slot % cache.block_size] = 0;
  }
}

// Runs `f` on a value of the cache's format; 0, or 1 if memory ran out.
template <class F>
int in_format(int32_t format, F&& f) {
  try {
    switch (format) {
#ifdef QUANTIZED_CACHE
      case INT8: f(Int8{}); break;
      case INT4: f(Int4{}); break;
#else
      case FLOAT32: f(Float32{}); break;
      case BFLOAT16: f(BFloat16{}); break;
      case FLOAT16: f(Float16{}); break;
#endif
    }
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

extern "C" {

// 0, or 1 if memory ran out.
int attnserve_attend(const AttendCall* call) {
  return in_format(call->cache_format, [&](auto t) { attend<decltype(t)>(*call); });
}

int attnserve_write(const WriteCall* w) {
  return in_format(w->cache_format, [&](auto t) { write<decltype(t)>(*w); });
}

// Of a gated variant: stores the sums of the new tokens' gates.
int attnserve_write_gates(const GateCall* call) {
  return in_format(call->cache_format, [&](auto t) {
    if constexpr (VARIANT::gated) write_gates<decltype(t)>(*call);
  });
}

// A layer's step: what comes new is written first.
int attnserve_step(const WriteCall* w, const AttendCall* call) {
  const int failed = attnserve_write(w);
  return failed ? failed : attnserve_attend(call);
}

// Of a stateful variant within a budget: stores the new tokens and attends.
int attnserve_attend_pruned(const PrunedCall* call) {
  return in_format(call->page_format, [&](auto t) {
    if constexpr (VARIANT::stateful && !QUANTIZED<decltype(t)>)
      Pruned<VARIANT, decltype(t)>(*call).run();
  });
}

// For the loader: a library whose structs differ from Python's must not be called.
int attnserve_abi() {
  return (int)(sizeof(AttendCall) * 1000000 + sizeof(WriteCall) * 1000 + sizeof(PrunedCall) +
               sizeof(GateCall));
}
}
