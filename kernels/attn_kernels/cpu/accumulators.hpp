// The accumulators of a stateful variant: float32, one a token, in the cache behind KV head 0's
// values; and the queries that add to them, prepared as those of all variants are.
#pragma once
#include "spans.hpp"
#include "variant.hpp"

template <class V, class T>
class Accumulators : public Spans<T> {
 public:
  using Base = Spans<T>;
  using Base::cache, Base::call, Base::first_position, Base::first_visible, Base::for_each_span,
      Base::head_size, Base::queries_of, Base::query_offset, Base::ROTATED, Base::scale,
      Base::score, Base::SCORES, Base::SPAN, Base::token_at;
  template <class U>
  using Span = typename Base::template Span<U>;

  const V variant;

  explicit Accumulators(const AttendCall& c)
      : Base(c), variant(Parameters{c.scale, c.cache.head_size, c.values, c.learned}) {}

  // One head's query at a position, widened and rotated like the keys.
  Query prepare(int request, int position, int head, float* q) const {
    load_row(call.query_format, call.query, query_offset(request, position, head), head_size, q);
    return know(position, head, q);
  }
  // Head 0's, wherever that is.
  Query prepare_selecting(int request, int position, float* q) const {
    if (!call.selector) return prepare(request, position, 0, q);
    const int64_t offset = token_at(request, position) * call.selecting_stride;
    load_row(call.query_format, call.selecting, offset, head_size, q);
    return know(position, 0, q);
  }
  Query know(int position, int head, float* q) const {
    const float n = position + 1 - first_visible(position);
    const Query query{head, position, n, norm(q, head_size)};
    rotate<T>(q, head_size);
    return query;
  }

  // What it is to be multiplied with.
  float factor(const Query& query) const {
    const float f = variant.query_factor(query);
    return ROTATED ? f / hadamard_block(head_size) : f;
  }

  // f(accumulators, column, length) for the pieces of the positions [begin, end) in each block.
  template <class F>
  void for_each_piece(int request, int begin, int end, F&& f) const {
    const int32_t* table = call.batch->block_table + request * call.batch->block_table_stride;
    for (int p = begin; p < end;) {
      const int offset = p % cache.block_size,
                length = std::min(cache.block_size - offset, end - p);
      f(cache.accumulators(table[p / cache.block_size]) + offset, p - begin, length);
      p += length;
    }
  }

  // The KV head in the cache with head 0's keys.
  int selecting_head() const { return call.selector ? cache.num_kv_heads : 0; }

  // What a query of head 0 adds to the accumulators of the span's columns [from, to): nothing to
  // its own token's and nothing to the first's.
  void selection(int position, int begin, int from, int to, const float* s, float* added) const {
    std::fill_n(added, SPAN, 0.f);
    if constexpr (V::stateful)
      for (int j = from / WIDTH * WIDTH; j < to; j += WIDTH)
        store(added + j, V::selection(load(s + j)));
    for (int j = from / WIDTH * WIDTH; j < std::max(from, 1 - begin); j++) added[j] = 0.f;
    for (int j = std::max(0, std::min(to, position - begin)); j < SPAN; j++) added[j] = 0.f;
  }

  // Runs the queries [first, first + count) of head 0 over a span: their selections are added to
  // `state` [SPAN] in order, and before(query, state) is called ahead of each query's own.
  template <class F>
  void accumulate(int request, int first, int count, const Span<T>& span, float* q, float* s,
                  float* state, F&& before) const {
    alignas(64) float added[SPAN];
    for (int i = 0; i < count; i += ROWS) {
      const int rows = std::min(ROWS, count - i);
      const int position = first_position(request) + first + i;
      const int to = std::min(span.end, position + rows) - span.begin;
      for (int r = 0; r < rows; r++)
        scale(q + r * WIDE, head_size,
              factor(prepare_selecting(request, position + r, q + r * WIDE)));
      if (to > 0) score(span, rows, q, s, 0, round_up(to, PANEL));
      for (int r = 0; r < rows; r++) {
        before(first + i + r, state);
        const int from = std::max(0, first_visible(position + r) - span.begin);
        const int seen = std::min(span.end, position + r + 1) - span.begin;
        if (from >= seen) continue;
        selection(position + r, span.begin, from, seen, s + r * SCORES, added);
        for (int j = 0; j < SPAN; j++) state[j] += added[j];
      }
    }
  }

  void load_state(int request, int begin, int end, float* state) const {
    for_each_piece(request, begin, end, [&](const float* accumulators, int column, int length) {
      std::copy_n(accumulators, length, state + column);
    });
  }
  void save_state(int request, int begin, int end, const float* state) const {
    for_each_piece(request, begin, end, [&](float* accumulators, int column, int length) {
      std::copy_n(state + column, length, accumulators);
    });
  }

  // A request of several tiles: the accumulators before each tile of `tile` queries, as
  // snapshots[tile * stride + position], for the keys [begin, end); the cache gets the last ones.
  void take_snapshots(int request, int tile, int begin, int end, float* snapshots, ptrdiff_t stride,
                      Arena& arena) const {
    float *q, *s;
    arena.allocate(Array{q, ROWS * WIDE}, Array{s, ROWS * SCORES});
    alignas(64) float state[SPAN];
    for_each_span(request, selecting_head(), begin, end, [&](const Span<T>& span) {
      load_state(request, span.begin, span.end, state);
      accumulate(request, 0, queries_of(request), span, q, s, state,
                 [&](int query, const float* now) {
                   if (query % tile == 0)
                     std::copy_n(now, span.end - span.begin,
                                 snapshots + query / tile * stride + span.begin);
                 });
      save_state(request, span.begin, span.end, state);
    });
  }
};
