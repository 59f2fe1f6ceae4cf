// Attention of one tile of query rows over a range of keys: what one thread does at a time.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <type_traits>

#include "amx.hpp"
#include "cache.hpp"
#include "matmul.hpp"
#include "variant.hpp"

constexpr int MAX_HEAD_SIZE = 256;
// Row stride of the scratch matrices of queries and outputs. A panel more than the content, so that
// rows do not share cache sets.
constexpr int WIDE = MAX_HEAD_SIZE + PANEL;

// Rows that are scored and weighed together.
constexpr int MAX_BLOCK = 16;
static_assert(ROWS <= MAX_BLOCK && TILE_ROWS <= MAX_BLOCK);

enum Format : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

// Arguments of one call; attn_kernels/cpu/kernel.py has the same fields in the same order.
struct Call {
  CacheShape cache;
  const void* query;              // [num_tokens, num_heads, head_size]
  void* out;                      // [>= num_tokens, num_heads, head_size]
  int64_t query_stride, out_stride;  // of a token, in elements
  const int32_t* block_table;     // [num_reqs, block_table_stride]
  int64_t block_table_stride;
  const int32_t* query_start_loc; // [num_reqs + 1]
  const int32_t* seq_lens;        // [num_reqs]
  const float* values;            // see Parameters
  const float* const* learned;
  float scale;
  int32_t num_reqs, num_heads, window;  // window: 0 is none
  int32_t query_format, out_format, cache_format, threads;
};

// Memory that grows and is kept: a call a layer must not ask the system for pages.
class Arena {
  char* memory = nullptr;
  size_t capacity = 0, used = 0;

 public:
  ~Arena() { std::free(memory); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= capacity) return;
    std::free(memory);
    capacity = (bytes + bytes / 4 + 63) / 64 * 64;
    memory = (char*)std::aligned_alloc(64, capacity);
    if (!memory) {
      capacity = 0;
      throw std::bad_alloc();
    }
  }
  template <class X>
  static size_t bytes(size_t count) {
    return (count * sizeof(X) + 63) / 64 * 64;
  }
  template <class X>
  X* take(size_t count) {
    X* p = (X*)(memory + used);
    used += bytes<X>(count);
    return p;
  }
};

// A unit of work: the queries [first_query, first_query + num_queries) of a request against its keys
// [key_begin, key_end), for one KV head or (stateful variants) for all.
struct Task {
  int request, kv_head, first_query, num_queries;
  int key_begin, key_end;
  int part, num_parts, group;  // of a context split over threads; group numbers such tiles
  float* snapshot;             // stateful: the accumulators of all keys before the tile, or null
  int64_t cost;
};

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

template <class V, class T>
class Attention {
 public:
  using Row = typename V::Row;

  // Keys whose scores are in flight at once: those of a block of rows stay in the first-level cache.
  // Tiles multiply so fast that the rest of a span's work counts.
  static constexpr bool TILES = HAS_AMX && std::is_same_v<T, BFloat16>;
  static constexpr int SPAN = TILES ? 256 : 128;
  static constexpr int SCORES = SPAN + PANEL;      // row stride of scores
  static constexpr int NARROW = SPAN + 2 * PANEL;  // row stride of bfloat16 weights

  static constexpr float ones[12] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  const Call& call;
  const Cache<T> cache;
  const V variant;
  const int head_size, group_size;  // group_size: query heads of a KV head

  explicit Attention(const Call& c)
      : call(c),
        cache(c.cache),
        variant(Parameters{c.scale, c.cache.head_size, c.values, c.learned}),
        head_size(c.cache.head_size),
        group_size(c.num_heads / c.cache.num_kv_heads) {}

  int queries_of(int request) const {
    return call.query_start_loc[request + 1] - call.query_start_loc[request];
  }
  // Position in its context of a request's first query of this call.
  int first_position(int request) const { return call.seq_lens[request] - queries_of(request); }
  // The first key that a query sees.
  int first_visible(int position) const {
    return call.window ? std::max(0, position - call.window + 1) : 0;
  }

  // Rows of scratch memory; a block's kernel may have a few more rows than the block.
  static int padded(int rows) { return round_up(rows, MAX_BLOCK); }
  static int num_spans(int begin, int end) { return (end - 1) / SPAN - begin / SPAN + 1; }
  static size_t scores_size(int rows, int begin, int end) {
    return (size_t)padded(rows) * SCORES * (V::two_pass ? num_spans(begin, end) : 1);
  }

  // Everything a tile needs, in this thread's arena.
  struct Tile {
    int request, first_position, num_queries, rows, key_begin, key_end, kv_head;
    int block;  // rows of a block
    bool amx;
    float *q, *o, *scores, *per_norm, *penalty;
    float* factor;                       // amx: of each row's scores
    BFloat16 *narrow_q, *narrow_weights; // amx: [rows, WIDE] and [block, NARROW]
    BFloat16* last_values;               // amx: the last values of a context, zeros behind them
    Float32 *wide_keys, *wide_values;
    Row* row;
  };

  // Tiles need bfloat16 on both sides, whole tiles of dims, and those of tokens within a block.
  bool uses_amx() const {
    return TILES && call.query_format == BFLOAT16 &&
           head_size % TILE_DEPTH == 0 && cache.block_size % TILE_DEPTH == 0 && amx_permitted();
  }

  Tile make_tile(const Task& task, Arena& arena) const {
    const int rows = task.num_queries * group_size, pad = padded(rows);
    const int keys = round_up(task.key_end - task.key_begin, SPAN) + SPAN;
    const size_t matrix = (size_t)pad * WIDE, span = (size_t)SPAN * head_size;
    const size_t scores = scores_size(rows, task.key_begin, task.key_end) + MAX_BLOCK * SCORES;
    const bool amx = uses_amx();
    const size_t narrow_q = amx ? matrix : 0, narrow_weights = amx ? MAX_BLOCK * NARROW : 0;
    const size_t last_values = amx ? 2 * TILE_DEPTH * PANEL : 0;
    const size_t penalties = V::stateful ? (size_t)task.num_queries * keys : 0;
    arena.reserve(2 * Arena::bytes<float>(matrix) + Arena::bytes<float>(scores) +
                  2 * Arena::bytes<float>(span) + Arena::bytes<float>(SPAN) +
                  Arena::bytes<float>(penalties) + Arena::bytes<Row>(pad) +
                  Arena::bytes<float>(pad) + Arena::bytes<BFloat16>(narrow_q) +
                  Arena::bytes<BFloat16>(narrow_weights) + Arena::bytes<BFloat16>(last_values));
    Tile t;
    t.request = task.request;
    t.first_position = first_position(task.request) + task.first_query;
    t.num_queries = task.num_queries;
    t.rows = rows;
    t.key_begin = task.key_begin;
    t.key_end = task.key_end;
    t.kv_head = task.kv_head;
    t.q = arena.take<float>(matrix);
    t.o = arena.take<float>(matrix);
    t.scores = arena.take<float>(scores);
    t.wide_keys = arena.take<Float32>(span);
    t.wide_values = arena.take<Float32>(span);
    t.per_norm = arena.take<float>(SPAN);
    t.penalty = arena.take<float>(penalties);
    t.row = arena.take<Row>(pad);
    t.factor = arena.take<float>(pad);
    t.narrow_q = arena.take<BFloat16>(narrow_q);
    t.narrow_weights = arena.take<BFloat16>(narrow_weights);
    t.last_values = arena.take<BFloat16>(last_values);
    t.amx = amx;
    t.block = amx ? TILE_ROWS : ROWS;
    return t;
  }

  // Where in `query` a head's query at a position begins.
  int64_t query_offset(int request, int position, int head) const {
    const int64_t token = call.query_start_loc[request] + position - first_position(request);
    return token * call.query_stride + (int64_t)head * head_size;
  }

  // One head's query at a position, widened; returns what it is to be multiplied with.
  float prepare(int request, int position, int head, float* q) const {
    const int64_t offset = query_offset(request, position, head);
    switch (call.query_format) {
      case FLOAT32: std::memcpy(q, (const Float32*)call.query + offset, head_size * 4); break;
      case BFLOAT16: widen((const BFloat16*)call.query + offset, q); break;
      case FLOAT16: widen((const Float16*)call.query + offset, q); break;
    }
    Vec squares = {};
    for (int d = 0; d < head_size; d += WIDTH) squares += load(q + d) * load(q + d);
    const float n = position + 1 - first_visible(position);
    return variant.query_factor(head, n, std::sqrt(horizontal_sum(squares)));
  }
  void scale(float* x, int count, float factor) const {
    for (int i = 0; i < count; i += WIDTH) store(x + i, load(x + i) * factor);
  }

  template <class U>
  void widen(const U* from, float* to) const {
    for (int d = 0; d < head_size; d++) to[d] = to_float(from[d]);
  }

  void start(Tile& t) const {
    const int pad = padded(t.rows);
    for (int r = 0; r < t.rows; r++) {
      const int position = t.first_position + r / group_size;
      const int head = t.kv_head * group_size + r % group_size;
      float* q = t.q + (ptrdiff_t)r * WIDE;
      t.factor[r] = prepare(t.request, position, head, q);
      if (t.amx)  // as it is: its scores are scaled instead
        std::copy_n((const BFloat16*)call.query + query_offset(t.request, position, head),
                    head_size, t.narrow_q + (ptrdiff_t)r * WIDE);
      else
        scale(q, head_size, t.factor[r]);
    }
    for (int r = t.rows; r < pad; r++) {
      std::fill_n(t.q + (ptrdiff_t)r * WIDE, head_size, 0.f);
      if (t.amx) std::fill_n(t.narrow_q + (ptrdiff_t)r * WIDE, head_size, BFloat16{0});
    }
    for (int r = 0; r < pad; r++) {
      new (t.row + r) Row();
      std::fill_n(t.o + (ptrdiff_t)r * WIDE, head_size, 0.f);
    }
  }

  // Consecutive tokens of a span that lie in one block.
  template <class U>
  struct Segment {
    const U *keys, *values;
    ptrdiff_t value_panel;
    int column, length;  // columns of the span
  };
  template <class U>
  struct Span {
    int begin, end, count;
    Segment<U> segments[SPAN / PANEL];
  };

  Span<T> find_span(int request, int kv_head, int begin, int end) const {
    Span<T> span{begin, end, 0, {}};
    const int32_t* table = call.block_table + request * call.block_table_stride;
    for (int p = begin; p < end;) {
      const int offset = p % cache.block_size, length = std::min(cache.block_size - offset, end - p);
      const int64_t index = table[p / cache.block_size];
      span.segments[span.count++] = {cache.keys(index, kv_head, offset),
                                     cache.values(index, kv_head, offset), cache.value_panel(),
                                     p - begin, length};
      p += length;
    }
    return span;
  }

  // Spans end at multiples of SPAN; the first begins at a panel.
  template <class F>
  void for_each_span(int request, int kv_head, int begin, int end, F&& f) const {
    for (int p = begin / PANEL * PANEL; p < end;) {
      const int stop = std::min((p / SPAN + 1) * SPAN, end);
      f(find_span(request, kv_head, p, stop));
      p = stop;
    }
  }

  // With many rows, widening 16-bit panels (and joining small blocks) once pays.
  bool gathers(const Tile& t) const {
    return !t.amx && t.rows > ROWS && (sizeof(T) < 4 || cache.block_size % SPAN);
  }
  // `count` elements of whole rows, of pairs of rows as far as there are.
  static void widen_panels(const T* from, int count, Float32* to) {
    constexpr int PAIR = T::PAIR;
    for (int i = 0; i < count; i += PANEL * PAIR)
      for (int j = 0; j < PANEL; j += WIDTH) {
        Vec rows[PAIR];
        load_rows(from + i + j * PAIR, rows);
        for (int k = 0; k < PAIR; k++) store((float*)to + i + k * PANEL + j, rows[k]);
      }
  }
  Span<Float32> gather(const Tile& t, const Span<T>& span, bool keys, bool values) const {
    Span<Float32> wide{span.begin, span.end, 1, {}};
    wide.segments[0] = {t.wide_keys, t.wide_values, SPAN * PANEL, 0, span.end - span.begin};
    for (int i = 0; i < span.count; i++) {
      const Segment<T>& g = span.segments[i];
      if (keys)
        widen_panels(g.keys, round_up(g.length, PANEL) * head_size,
                     t.wide_keys + g.column * head_size);
      if (values)
        for (int d = 0; d < head_size / PANEL; d++)
          widen_panels(g.values + d * g.value_panel, g.length * PANEL,
                       t.wide_values + (d * SPAN + g.column) * PANEL);
    }
    return wide;
  }

  // 1 / |k| of a span's keys.
  template <class U>
  void norms(const Span<U>& span, float* per_norm) const {
    for (int i = 0; i < span.count; i++) {
      const Segment<U>& g = span.segments[i];
      for (int c = 0; c < g.length; c += PANEL)
        for (int j = 0; j < PANEL; j += WIDTH) {
          const U* k = g.keys + c * head_size + j * U::PAIR;
          Vec squares = {};
          for (int d = 0; d < head_size; d += U::PAIR) {
            Vec rows[U::PAIR];
            load_rows(k + d * PANEL, rows);
            for (const Vec& row : rows) squares += row * row;
          }
          store(per_norm + g.column + c + j,
                1.f / max(broadcast(1e-12f), square_root(squares)));
        }
    }
  }

  // DIMS dims are summed up at a time: one running sum over all would carry the rounding of the
  // whole score at every step, and the score is an exponent.
  static constexpr int DIMS = 32;
  template <int NP, class U>
  void dot(int rows, const float* q, const U* panels, float* s) const {
    const ptrdiff_t stride = (ptrdiff_t)head_size * PANEL;
    multiply_rows<NP, WIDE, SCORES, false>(rows, q, panels, stride, std::min(DIMS, head_size), s,
                                           nullptr);
    for (int d = DIMS; d < head_size; d += DIMS)
      multiply_rows<NP, WIDE, SCORES, true>(rows, q + d, panels + d * PANEL, stride,
                                            std::min(DIMS, head_size - d), s, ones);
  }

  // Scores of `rows` rows in the span's columns [from, to), both multiples of 16.
  template <class U>
  void score(const Span<U>& span, int rows, const float* q, float* s, int from, int to) const {
    for (int i = 0; i < span.count; i++) {
      const Segment<U>& g = span.segments[i];
      const int last = std::min(to, g.column + round_up(g.length, PANEL));
      for (int c = std::max(from, g.column); c < last;) {
        const U* k = g.keys + (ptrdiff_t)(c - g.column) * head_size;
        if (PANELS == 2 && rows > 4 && last - c >= 2 * PANEL) {
          dot<PANELS>(rows, q, k, s + c);
          c += PANELS * PANEL;
        } else {
          dot<1>(rows, q, k, s + c);
          c += PANEL;
        }
      }
    }
  }

  // o = o * rescale + weights . values over the span's columns [from, to).
  template <class U>
  void add_values(const Span<U>& span, int rows, const float* weights, int from, int to, float* o,
                  const float* rescale) const {
    for (int i = 0; i < span.count; i++) {
      const Segment<U>& g = span.segments[i];
      // An even row: the token before `from` is this request's too, and its weight is 0.
      const int c = std::max(from / U::PAIR * U::PAIR, g.column), depth = std::min(to, g.column + g.length) - c;
      if (depth <= 0) continue;
      const U* v = g.values + (ptrdiff_t)(c - g.column) * PANEL;
      for (int d = 0; d < head_size; v += g.value_panel) {
        if (PANELS == 2 && rows > 4 && head_size - d >= 2 * PANEL) {
          multiply_rows<PANELS, SCORES, WIDE, true>(rows, weights + c, v, g.value_panel, depth,
                                                    o + d, rescale);
          v += g.value_panel;
          d += PANELS * PANEL;
        } else {
          multiply_rows<1, SCORES, WIDE, true>(rows, weights + c, v, 0, depth, o + d, rescale);
          d += PANEL;
        }
      }
      rescale = ones;
    }
  }

  // ---- one block of rows against one span

  // The columns of a span that the rows [first, first + count) see between them.
  struct Columns {
    int from, to;            // visible to some row
    int panel_from, panel_to;  // whole panels around them
  };
  Columns visible(const Tile& t, int begin, int end, int first, int count) const {
    Columns c;
    const int first_pos = t.first_position + first / group_size;
    const int last_pos = t.first_position + (first + count - 1) / group_size;
    c.from = std::max({begin, t.key_begin, first_visible(first_pos)}) - begin;
    c.to = std::min(end, last_pos + 1) - begin;
    c.panel_from = c.from / PANEL * PANEL;
    c.panel_to = round_up(c.to, PANEL);
    return c;
  }

  // `score` and `add_values` on tiles.
  void score_tiles(const Tile& t, const Span<BFloat16>& span, int first, int count,
                   const Columns& c, float* s) const {
    const BFloat16* q = t.narrow_q + (ptrdiff_t)first * WIDE;
    for (int i = 0; i < span.count; i++) {
      const Segment<BFloat16>& g = span.segments[i];
      const int last = std::min(c.panel_to, g.column + round_up(g.length, PANEL));
      for (int j = std::max(c.panel_from, g.column); j < last; j += 2 * PANEL) {
        const BFloat16* k = g.keys + (ptrdiff_t)(j - g.column) * head_size;
        if (last - j > PANEL)
          amx_multiply<2, false>(q, WIDE, k, (ptrdiff_t)head_size * PANEL, head_size, s + j, SCORES);
        else
          amx_multiply<1, false>(q, WIDE, k, 0, head_size, s + j, SCORES);
      }
    }
    for (int r = 0; r < count; r++)
      scale(s + r * SCORES + c.panel_from, c.panel_to - c.panel_from, t.factor[first + r]);
  }

  void add_values_tiles(const Tile& t, const Span<BFloat16>& span, int count, const Columns& c,
                        const float* s, float* o, const float* rescale) const {
    // Weights of whole tiles: those of keys that no row sees are 0.
    const int from = c.panel_from / TILE_DEPTH * TILE_DEPTH, to = round_up(c.panel_to, TILE_DEPTH);
    for (int r = 0; r < count; r++) {
      BFloat16* weights = t.narrow_weights + r * NARROW;
      std::fill(weights + from, weights + c.panel_from, BFloat16{0});
      for (int j = c.panel_from; j < c.panel_to; j += PANEL) round_panel(s + r * SCORES + j, weights + j);
      std::fill(weights + c.panel_to, weights + to, BFloat16{0});
      if (rescale[r] != 1.f) scale(o + (ptrdiff_t)r * WIDE, head_size, rescale[r]);
    }
    for (int i = 0; i < span.count; i++) {
      const Segment<BFloat16>& g = span.segments[i];
      const int first = std::max(from, g.column), end = std::min(to, g.column + g.length);
      if (first >= end) continue;
      const int whole = (end - first) / TILE_DEPTH * TILE_DEPTH;
      for (int d = 0; d < head_size; d += 2 * PANEL) {
        const BFloat16* v =
            g.values + d / PANEL * g.value_panel + (ptrdiff_t)(first - g.column) * PANEL;
        const BFloat16* weights = t.narrow_weights + first;
        if (whole) amx_multiply<2, true>(weights, NARROW, v, g.value_panel, whole, o + d, WIDE);
        if (whole == end - first) continue;
        // What is behind the context's end was never written, and may be NaN.
        for (int panel = 0; panel < 2; panel++)
          copy_rows(v + panel * g.value_panel + whole * PANEL, end - first - whole,
                    t.last_values + panel * TILE_DEPTH * PANEL);
        amx_multiply<2, true>(weights + whole, NARROW, t.last_values, TILE_DEPTH * PANEL,
                              TILE_DEPTH, o + d, WIDE);
      }
    }
  }

  // `count` rows of a woven panel, zeros behind them up to a whole tile.
  static void copy_rows(const BFloat16* from, int count, BFloat16* to) {
    std::copy_n(from, count / 2 * 2 * PANEL, to);
    std::fill(to + count / 2 * 2 * PANEL, to + TILE_DEPTH * PANEL, BFloat16{0});
    if (count % 2)
      for (int j = 0; j < PANEL; j++) to[(count - 1) * PANEL + 2 * j] = from[(count - 1) * PANEL + 2 * j];
  }

  void mask(const Tile& t, int begin, int first, int count, const Columns& c, float* s) const {
    for (int r = 0; r < count; r++, s += SCORES) {
      const int position = t.first_position + (first + r) / group_size;
      const int from = std::max(first_visible(position), t.key_begin) - begin;
      const int to = std::max(position + 1 - begin, c.panel_from);
      for (int j = c.panel_from; j < std::min(from, c.panel_to); j++) s[j] = V::masked;
      for (int j = to; j < c.panel_to; j++) s[j] = V::masked;
    }
  }

  template <class U>
  void score_block(Tile& t, const Task& task, const Span<U>& span, int first, int count,
                   const Columns& c, float* s) const {
    if constexpr (std::is_same_v<U, BFloat16>) {
      if (t.amx)
        score_tiles(t, span, first, count, c, s);
      else
        score(span, count, t.q + (ptrdiff_t)first * WIDE, s, c.panel_from, c.panel_to);
    } else {
      score(span, count, t.q + (ptrdiff_t)first * WIDE, s, c.panel_from, c.panel_to);
    }
    if constexpr (V::unit_keys)
      for (int r = 0; r < count; r++)
        for (int j = c.panel_from; j < c.panel_to; j += WIDTH)
          store(s + r * SCORES + j, load(s + r * SCORES + j) * load(t.per_norm + j));
    if constexpr (V::stateful) {
      // A single query adds to the accumulators in the pass that has head 0's scores anyway.
      if (!task.snapshot && t.num_queries == 1 && t.kv_head == 0 && first == 0)
        select_one(t, span.begin, span.end, c, s);
      for (int r = 0; r < count; r++) {
        const float* penalty = penalties(t, (first + r) / group_size, span.begin);
        for (int j = c.panel_from; j < c.panel_to; j += WIDTH)
          store(s + r * SCORES + j, V::penalise(load(s + r * SCORES + j), load(penalty + j)));
      }
    }
    mask(t, span.begin, first, count, c, s);
  }

  template <class U>
  void weigh_block(Tile& t, const Span<U>& span, int first, int count, const Columns& c,
                   float* s) const {
    float rescale[MAX_BLOCK] = {};
    for (int r = 0; r < count; r++)
      rescale[r] = variant.update(t.row[first + r], s + r * SCORES + c.panel_from,
                                  c.panel_to - c.panel_from);
    float* o = t.o + (ptrdiff_t)first * WIDE;
    if constexpr (std::is_same_v<U, BFloat16>) {
      if (t.amx) return add_values_tiles(t, span, count, c, s, o, rescale);
    }
    add_values(span, count, s, c.from, c.to, o, rescale);
  }

  enum Pass { OBSERVE = 1, WEIGH = 2, BOTH = 3 };

  template <class U>
  void span_pass(Tile& t, const Task& task, const Span<U>& span, Pass pass) const {
    if (V::unit_keys && pass & OBSERVE) norms(span, t.per_norm);
    const int index = span.begin / SPAN - t.key_begin / SPAN;
    for (int first = 0; first < t.rows; first += t.block) {
      const int count = std::min(t.block, t.rows - first);
      const Columns c = visible(t, span.begin, span.end, first, count);
      if (c.from >= c.to) continue;
      float* s = t.scores;
      if (V::two_pass) s += ((ptrdiff_t)index * padded(t.rows) + first) * SCORES;
      if (pass & OBSERVE) score_block(t, task, span, first, count, c, s);
      if constexpr (V::two_pass) {
        if (pass & OBSERVE)
          for (int r = 0; r < count; r++)
            variant.observe(t.row[first + r], s + r * SCORES + c.panel_from,
                            c.panel_to - c.panel_from);
      }
      if (pass & WEIGH) weigh_block(t, span, first, count, c, s);
    }
  }

  void run_pass(Tile& t, const Task& task, Pass pass) const {
    std::optional<AmxTiles> tiles;
    if (t.amx) tiles.emplace(std::min(t.rows, TILE_ROWS));
    for_each_span(t.request, t.kv_head, t.key_begin, t.key_end, [&](const Span<T>& span) {
      if (gathers(t))
        span_pass(t, task, gather(t, span, pass & OBSERVE, pass & WEIGH), pass);
      else
        span_pass(t, task, span, pass);
    });
  }

  void settle(Tile& t) const {
    if constexpr (V::two_pass)
      for (int r = 0; r < t.rows; r++) {
        const int position = t.first_position + r / group_size;
        variant.settle(t.row[r], position + 1 - first_visible(position));
      }
  }

  // ---- accumulators of stateful variants

  // f(accumulators, column, length) for the pieces of the positions [begin, end) in each block.
  template <class F>
  void for_each_piece(int request, int begin, int end, F&& f) const {
    const int32_t* table = call.block_table + request * call.block_table_stride;
    for (int p = begin; p < end;) {
      const int offset = p % cache.block_size, length = std::min(cache.block_size - offset, end - p);
      f(cache.accumulators(table[p / cache.block_size]) + offset, p - begin, length);
      p += length;
    }
  }

  // What a query of head 0 adds to the accumulators of the span's columns [from, to): nothing to its
  // own token's and nothing to the first's.
  void selection(int position, int begin, int from, int to, const float* s, float* added) const {
    std::fill_n(added, SPAN, 0.f);
    if constexpr (V::stateful)
      for (int j = from / WIDTH * WIDTH; j < to; j += WIDTH) store(added + j, V::selection(load(s + j)));
    for (int j = from / WIDTH * WIDTH; j < std::max(from, 1 - begin); j++) added[j] = 0.f;
    for (int j = std::max(0, std::min(to, position - begin)); j < SPAN; j++) added[j] = 0.f;
  }

  float* penalties(const Tile& t, int query, int position) const {
    const int first = t.key_begin / SPAN * SPAN;
    return t.penalty + (ptrdiff_t)query * (round_up(t.key_end - t.key_begin, SPAN) + SPAN) + position - first;
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
        scale(q + r * WIDE, head_size, prepare(request, position + r, 0, q + r * WIDE));
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

  void select_one(const Tile& t, int begin, int end, const Columns& c, const float* s) const {
    alignas(64) float added[SPAN];
    selection(t.first_position, begin, c.from, c.to, s, added);
    for_each_piece(t.request, begin, end, [&](float* accumulators, int column, int length) {
      for (int j = 0; j < length; j++) accumulators[j] += added[column + j];
    });
  }

  // What each query of a tile subtracts from its scores.
  void find_penalties(Tile& t, const Task& task) const {
    alignas(64) float state[SPAN];
    for_each_span(t.request, 0, t.key_begin, t.key_end, [&](const Span<T>& span) {
      const int length = span.end - span.begin;
      if (task.snapshot)
        std::copy_n(task.snapshot + span.begin, length, state);
      else
        load_state(t.request, span.begin, span.end, state);
      if (t.num_queries == 1) {
        std::copy_n(state, length, penalties(t, 0, span.begin));
        return;
      }
      accumulate(t.request, task.first_query, t.num_queries, span, t.q, t.scores, state,
                 [&](int query, const float* now) {
                   std::copy_n(now, length, penalties(t, query - task.first_query, span.begin));
                 });
      if (!task.snapshot) save_state(t.request, span.begin, span.end, state);
    });
  }

  // A request of several tiles: the accumulators before each tile of `tile` queries, as
  // snapshots[tile * stride + position], for the keys [begin, end); the cache gets the last ones.
  void take_snapshots(int request, int tile, int begin, int end, float* snapshots, ptrdiff_t stride,
                      Arena& arena) const {
    const size_t queries = ROWS * WIDE, scores = ROWS * SCORES;
    arena.reserve(Arena::bytes<float>(queries) + Arena::bytes<float>(scores));
    float *q = arena.take<float>(queries), *s = arena.take<float>(scores);
    alignas(64) float state[SPAN];
    for_each_span(request, 0, begin, end, [&](const Span<T>& span) {
      load_state(request, span.begin, span.end, state);
      accumulate(request, 0, queries_of(request), span, q, s, state, [&](int query, const float* now) {
        if (query % tile == 0)
          std::copy_n(now, span.end - span.begin,
                      snapshots + query / tile * stride + span.begin);
      });
      save_state(request, span.begin, span.end, state);
    });
  }

  // ---- results

  template <class O>
  void narrow(const float* o, float factor, O* out) const {
    for (int d = 0; d < head_size; d++) convert(o[d] * factor, out[d]);
  }

  void write_out(const Tile& t, int r, const float* o, float factor) const {
    const int64_t token = call.query_start_loc[t.request] + t.first_position + r / group_size -
                          first_position(t.request);
    const int64_t head = t.kv_head * group_size + r % group_size;
    const int64_t offset = token * call.out_stride + head * head_size;
    switch (call.out_format) {
      case FLOAT32: narrow(o, factor, (Float32*)call.out + offset); break;
      case BFLOAT16: narrow(o, factor, (BFloat16*)call.out + offset); break;
      case FLOAT16: narrow(o, factor, (Float16*)call.out + offset); break;
    }
  }

  void finish(const Tile& t) const {
    for (int r = 0; r < t.rows; r++)
      write_out(t, r, t.o + (ptrdiff_t)r * WIDE, variant.finish(t.row[r]));
  }
};
