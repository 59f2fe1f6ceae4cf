// Attention of one tile of query rows over a range of keys: what one thread does at a time.
#pragma once
#include <optional>

#include "accumulators.hpp"
#include "gates.hpp"

// A unit of work: the queries [first_query, first_query + num_queries) of a request against its
// keys [key_begin, key_end), for one KV head or (stateful variants) for all.
struct Task {
  int request, kv_head, first_query, num_queries;
  int key_begin, key_end;
  int part, num_parts, group;  // of a context split over threads; group numbers such tiles
  float* snapshot;             // stateful: the accumulators of all keys before the tile, or null
  int64_t cost;
};

template <class V, class T>
class Attention : public Accumulators<V, T> {
 public:
  using Base = Accumulators<V, T>;
  using Base::accumulate, Base::add_listed_values, Base::add_values, Base::cache, Base::call,
      Base::factor, Base::find_span, Base::first_position, Base::first_visible, Base::for_each_span,
      Base::gather, Base::group_size, Base::head_size, Base::load_state, Base::NARROW, Base::norms,
      Base::num_spans, Base::prepare, Base::query_offset, Base::ROTATED, Base::save_state,
      Base::scale, Base::score, Base::SCORES, Base::selecting_head, Base::selection, Base::SPAN,
      Base::TILES, Base::variant;
  template <class U>
  using Span = typename Base::template Span<U>;
  template <class U>
  using Segment = typename Base::template Segment<U>;
  using Row = typename V::Row;

  explicit Attention(const AttendCall& c) : Base(c) {}

  // Rows of scratch memory; a block's kernel may have a few more rows than the block.
  static int padded(int rows) { return round_up(rows, MAX_BLOCK); }
  static size_t scores_size(int rows, int begin, int end) {
    return (size_t)padded(rows) * SCORES * (V::two_pass ? num_spans(begin, end) : 1);
  }

  // Everything a tile needs, in this thread's arena.
  struct Tile {
    int request, first_position, num_queries, rows, key_begin, key_end, kv_head;
    int block;             // rows of a block
    bool bf16, has_norms;  // has_norms: those of the span's keys are in per_norm
    float *q, *o, *scores, *per_norm;
    float *penalty, *state;               // stateful: [num_queries, keys], and of the span at hand
    float *sums, *rests;                  // gated: of the span's keys, [group, SPAN]
    float *own_sum, *own_rest;            // gated: [rows]
    float *selecting, *selected;          // selector: queries of a block and their scores
    int32_t* columns;                     // sparse: [block, SCORES], of a span
    float* factor;                        // bf16: of each row's scores
    BFloat16 *narrow_q, *narrow_weights;  // bf16: [rows, WIDE] and [block, NARROW]
    BFloat16* last_values;                // bf16: the last values of a context, zeros behind them
    Float32 *wide_keys, *wide_values;
    Row* row;
    Query* query;  // of each row
  };

  // Products of bfloat16 need it on both sides, whole tiles of dims, and those of tokens in a
  // block.
  bool multiplies_bf16() const {
    return TILES && call.query_format == BFLOAT16 && head_size % TILE_DEPTH == 0 &&
           cache.block_size % TILE_DEPTH == 0 && bf16_permitted();
  }

  Tile make_tile(const Task& task, Arena& arena) const {
    Tile t;
    t.request = task.request;
    t.first_position = first_position(task.request) + task.first_query;
    t.num_queries = task.num_queries;
    t.rows = task.num_queries * group_size;
    t.key_begin = task.key_begin;
    t.key_end = task.key_end;
    t.kv_head = task.kv_head;
    t.bf16 = multiplies_bf16();
    t.block = t.bf16 ? TILE_ROWS : ROWS;
    const size_t rows = padded(t.rows), matrix = rows * WIDE, span = (size_t)SPAN * head_size;
    const size_t keys = round_up(t.key_end - t.key_begin, SPAN) + SPAN;
    arena.allocate(
        Array{t.q, matrix}, Array{t.o, matrix},
        Array{t.scores, scores_size(t.rows, t.key_begin, t.key_end) + MAX_BLOCK * SCORES},
        Array{t.wide_keys, span}, Array{t.wide_values, span}, Array{t.per_norm, SPAN},
        Array{t.penalty, V::stateful ? t.num_queries * keys : 0},
        Array{t.state, V::stateful ? SPAN : 0}, Array{t.sums, V::gated ? group_size * SPAN : 0},
        Array{t.rests, V::gated ? group_size * SPAN : 0}, Array{t.own_sum, V::gated ? rows : 0},
        Array{t.own_rest, V::gated ? rows : 0}, Array{t.selecting, call.selector ? ROWS * WIDE : 0},
        Array{t.columns, V::sparse ? MAX_BLOCK * SCORES : 0},
        Array{t.selected, call.selector ? ROWS * SCORES : 0}, Array{t.row, rows},
        Array{t.query, rows}, Array{t.factor, rows}, Array{t.narrow_q, t.bf16 ? matrix : 0},
        Array{t.narrow_weights, t.bf16 ? MAX_BLOCK * NARROW : 0},
        Array{t.last_values, t.bf16 ? 2 * TILE_DEPTH * PANEL : 0});
    return t;
  }

  void start(Tile& t) const {
    const int pad = padded(t.rows);
    for (int r = 0; r < t.rows; r++) {
      const int position = t.first_position + r / group_size;
      const int head = t.kv_head * group_size + r % group_size;
      float* q = t.q + (ptrdiff_t)r * WIDE;
      t.query[r] = prepare(t.request, position, head, q);
      t.factor[r] = factor(t.query[r]);
      if (t.bf16)  // as it is: its scores are scaled instead
        std::copy_n((const BFloat16*)call.query + query_offset(t.request, position, head),
                    head_size, t.narrow_q + (ptrdiff_t)r * WIDE);
      else
        scale(q, head_size, t.factor[r]);
    }
    for (int r = t.rows; r < pad; r++) {
      std::fill_n(t.q + (ptrdiff_t)r * WIDE, head_size, 0.f);
      if (t.bf16) std::fill_n(t.narrow_q + (ptrdiff_t)r * WIDE, head_size, BFloat16{0});
    }
    if constexpr (V::gated) {
      for (int r = 0; r < t.rows; r++) {
        const double sum = gate_sums().at(t.request, t.query[r].head, t.query[r].position);
        t.own_sum[r] = (float)sum;
        t.own_rest[r] = rest_of(sum);
      }
    }
    for (int r = 0; r < pad; r++) {
      new (t.row + r) Row();
      std::fill_n(t.o + (ptrdiff_t)r * WIDE, head_size, 0.f);
    }
  }

  // With many rows, widening 16-bit panels (and joining small blocks) once pays.
  bool gathers(const Tile& t) const {
    return !t.bf16 && t.rows > ROWS && (sizeof(T) < 4 || cache.block_size % SPAN);
  }
  // ---- one block of rows against one span

  // The columns of a span that the rows [first, first + count) see between them.
  struct Columns {
    int from, to;              // visible to some row
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
          multiply_bf16<2, false>(count, q, WIDE, k, (ptrdiff_t)head_size * PANEL, head_size, s + j,
                                  SCORES, g.ahead);
        else
          multiply_bf16<1, false>(count, q, WIDE, k, 0, head_size, s + j, SCORES, g.ahead);
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
      for (int j = c.panel_from; j < c.panel_to; j += PANEL)
        round_panel(s + r * SCORES + j, weights + j);
      // And behind them, where the last tile of a segment that begins between two may end.
      std::fill(weights + c.panel_to, weights + to + TILE_DEPTH, BFloat16{0});
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
        if (whole)
          multiply_bf16<2, true>(count, weights, NARROW, v, g.value_panel, whole, o + d, WIDE,
                                 g.ahead);
        if (whole == end - first) continue;
        // What is behind the context's end was never written, and may be NaN.
        for (int panel = 0; panel < 2; panel++)
          copy_rows(v + panel * g.value_panel + whole * PANEL, end - first - whole,
                    t.last_values + panel * TILE_DEPTH * PANEL);
        multiply_bf16<2, true>(count, weights + whole, NARROW, t.last_values, TILE_DEPTH * PANEL,
                               TILE_DEPTH, o + d, WIDE, 0);
      }
    }
  }

  // `count` rows of a woven panel, zeros behind them up to a whole tile.
  static void copy_rows(const BFloat16* from, int count, BFloat16* to) {
    std::copy_n(from, count / 2 * 2 * PANEL, to);
    std::fill(to + count / 2 * 2 * PANEL, to + TILE_DEPTH * PANEL, BFloat16{0});
    if (count % 2)
      for (int j = 0; j < PANEL; j++)
        to[(count - 1) * PANEL + 2 * j] = from[(count - 1) * PANEL + 2 * j];
  }

  void mask(const Tile& t, int begin, int first, int count, const Columns& c, float* s) const {
    const Query &earliest = t.query[first], &latest = t.query[first + count - 1];
    if (begin + c.panel_to <= earliest.position + 1 &&
        begin + c.panel_from >= std::max(first_visible(latest.position), t.key_begin))
      return;
    for (int r = 0; r < count; r++, s += SCORES) {
      const int position = t.query[first + r].position;
      const int from = std::max(first_visible(position), t.key_begin) - begin;
      const int to = std::max(position + 1 - begin, c.panel_from);
      for (int j = c.panel_from; j < std::min(from, c.panel_to); j++) s[j] = V::masked;
      for (int j = to; j < c.panel_to; j++) s[j] = V::masked;
    }
  }

  // The model's own changes of the scores: a soft cap, and ALiBi.
  void modify(const Tile& t, int begin, int first, int count, const Columns& c, float* s) const {
    if (call.soft_cap > 0.f) {
      const float cap = call.soft_cap * LOG2E;
      for (int r = 0; r < count; r++)
        for (int j = c.panel_from; j < c.panel_to; j += WIDTH)
          store(s + r * SCORES + j, cap * tanh(load(s + r * SCORES + j) * (1 / cap)));
    }
    if (!call.alibi_slopes) return;
    for (int r = 0; r < count; r++) {
      const Query query = t.query[first + r];
      const float slope = call.alibi_slopes[query.head] * LOG2E;
      for (int j = c.panel_from; j < c.panel_to; j += WIDTH)
        store(s + r * SCORES + j, load(s + r * SCORES + j) - slope * distances(query, begin + j));
    }
  }

  // How far before a query the keys from `key` on are.
  static Vec distances(const Query& query, int key) {
    return (float)(query.position - key) - counting_from(0.f);
  }

  GateSums<T> gate_sums() const { return {cache, *call.batch, group_size}; }

  void find_sums(Tile& t, int begin, int end) const {
    for (int i = 0; i < group_size; i++)
      gate_sums().load(t.request, t.kv_head * group_size + i, begin, end, t.sums + i * SPAN,
                       t.rests + i * SPAN);
  }

  template <class U>
  void score_block(Tile& t, const Span<U>& span, int first, int count, const Columns& c,
                   float* s) const {
    if constexpr (std::is_same_v<U, BFloat16>) {
      if (t.bf16)
        score_tiles(t, span, first, count, c, s);
      else
        score(span, count, t.q + (ptrdiff_t)first * WIDE, s, c.panel_from, c.panel_to);
    } else {
      score(span, count, t.q + (ptrdiff_t)first * WIDE, s, c.panel_from, c.panel_to);
    }
    if constexpr (V::unit_keys) {
      // The product before has fetched the keys, in several streams.
      if (!t.has_norms) norms(span, t.per_norm);
      t.has_norms = true;
      for (int j = c.panel_from; j < c.panel_to; j += WIDTH) {
        const Vec per_norm = load(t.per_norm + j);
        for (int r = 0; r < count; r++)
          store(s + r * SCORES + j, load(s + r * SCORES + j) * per_norm);
      }
    }
    if constexpr (!V::unit_keys && !V::stateful) modify(t, span.begin, first, count, c, s);
    if constexpr (V::biased || V::gated) {
      static_assert(!V::stateful, "accumulators are of scores without a bias");
      for (int r = 0; r < count; r++) {
        const Query query = t.query[first + r];
        for (int j = c.panel_from; j < c.panel_to; j += WIDTH) {
          const Vec distance = distances(query, span.begin + j);
          Vec bias;
          if constexpr (V::gated) {
            const int key = (first + r) % group_size * SPAN + j;
            const Vec sums = t.own_sum[first + r] - load(t.sums + key);
            const Vec rests = t.own_rest[first + r] - load(t.rests + key);
            bias = variant.score_bias(query, distance, sums + rests);
          } else {
            bias = variant.score_bias(query, distance);
          }
          store(s + r * SCORES + j, load(s + r * SCORES + j) + bias);
        }
      }
    }
    if constexpr (V::stateful) {
      if (t.kv_head == 0 && !call.selector) select(t, span.begin, first, count, c, s);
      for (int r = 0; r < count; r++) {
        const float* penalty = penalties(t, (first + r) / group_size, span.begin);
        for (int j = c.panel_from; j < c.panel_to; j += WIDTH)
          store(s + r * SCORES + j, V::penalise(load(s + r * SCORES + j), load(penalty + j)));
      }
    }
    mask(t, span.begin, first, count, c, s);
  }

  template <class U>
  void output_block(Tile& t, const Span<U>& span, int first, int count, const Columns& c,
                    float* s) const {
    float rescale[MAX_BLOCK] = {};
    if constexpr (V::sparse && std::is_same_v<U, Float32>) {
      int listed[MAX_BLOCK];
      s += c.panel_from;
      for (int r = 0; r < count; r++)
        listed[r] = keep_above(variant.cutoff(t.row[first + r]), c.panel_to - c.panel_from,
                               c.panel_from, s + r * SCORES, t.columns + r * SCORES);
      for (int r = 0; r < count; r++)
        rescale[r] = variant.update(t.row[first + r], s + r * SCORES,
                                    round_up(listed[r], 2 * PANEL), t.query[first + r]);
      return add_listed_values(span, count, s, t.columns, listed, t.o + (ptrdiff_t)first * WIDE,
                               rescale);
    }
    for (int r = 0; r < count; r++)
      rescale[r] = variant.update(t.row[first + r], s + r * SCORES + c.panel_from,
                                  c.panel_to - c.panel_from, t.query[first + r]);
    float* o = t.o + (ptrdiff_t)first * WIDE;
    if constexpr (std::is_same_v<U, BFloat16>) {
      if (t.bf16) return add_values_tiles(t, span, count, c, s, o, rescale);
    }
    add_values(span, count, s, c.from, c.to, o, rescale);
  }

  enum Pass { STATISTICS = 1, OUTPUT = 2, WHOLE = 3 };

  template <class U>
  void span_pass(Tile& t, const Task& task, const Span<U>& span, Pass pass) const {
    t.has_norms = false;
    if (V::stateful && t.kv_head == 0) {
      find_state(t, task, span.begin, span.end);
      if (call.selector) select_apart(t, task, span.begin, span.end);
    }
    if (V::gated && pass & STATISTICS) find_sums(t, span.begin, span.end);
    const int index = span.begin / SPAN - t.key_begin / SPAN;
    for (int first = 0; first < t.rows; first += t.block) {
      const int count = std::min(t.block, t.rows - first);
      const Columns c = visible(t, span.begin, span.end, first, count);
      if (c.from >= c.to) continue;
      float* s = t.scores;
      if (V::two_pass) s += ((ptrdiff_t)index * padded(t.rows) + first) * SCORES;
      if (pass & STATISTICS) score_block(t, span, first, count, c, s);
      if constexpr (V::two_pass) {
        if (pass & STATISTICS)
          for (int r = 0; r < count; r++)
            variant.update_statistics(t.row[first + r], s + r * SCORES + c.panel_from,
                                      c.panel_to - c.panel_from, t.query[first + r]);
      }
      if (pass & OUTPUT) output_block(t, span, first, count, c, s);
    }
    if (V::stateful && t.kv_head == 0 && !task.snapshot)
      save_state(t.request, span.begin, span.end, t.state);
  }

  void run_pass(Tile& t, const Task& task, Pass pass) const {
    std::optional<AmxTiles> tiles;
    if (t.bf16) tiles.emplace(std::min(t.rows, TILE_ROWS));
    for_each_span(t.request, t.kv_head, t.key_begin, t.key_end, [&](const Span<T>& span) {
      if (gathers(t))
        span_pass(t, task,
                  gather(span, t.wide_keys, t.wide_values, pass & STATISTICS, pass & OUTPUT), pass);
      else
        span_pass(t, task, span, pass);
    });
  }

  void finish_statistics(Tile& t) const {
    if constexpr (V::two_pass)
      for (int r = 0; r < t.rows; r++) variant.finish_statistics(t.row[r], t.query[r]);
  }

  // ---- stateful variants: each query subtracts what the accumulators are from its scores

  float* penalties(const Tile& t, int query, int position) const {
    const int first = t.key_begin / SPAN * SPAN;
    return t.penalty + (ptrdiff_t)query * (round_up(t.key_end - t.key_begin, SPAN) + SPAN) +
           position - first;
  }

  // The accumulators ahead of a tile, for its walk over a span.
  void find_state(Tile& t, const Task& task, int begin, int end) const {
    if (task.snapshot)
      std::copy_n(task.snapshot + begin, end - begin, t.state);
    else
      load_state(t.request, begin, end, t.state);
  }

  // A block's scores before penalties, of KV head 0: each query keeps the accumulators as its
  // penalties for all KV heads, then adds what its head 0 selects.
  void select(const Tile& t, int begin, int first, int count, const Columns& c,
              const float* s) const {
    alignas(64) float added[SPAN];
    for (int row = round_up(first, group_size); row < first + count; row += group_size) {
      const int query = row / group_size, position = t.first_position + query;
      std::copy(t.state + c.panel_from, t.state + c.panel_to,
                penalties(t, query, begin) + c.panel_from);
      const int from = std::max(0, std::max(t.key_begin, first_visible(position)) - begin);
      const int to = std::min(c.to, position + 1 - begin);
      if (from >= to) continue;
      selection(position, begin, from, to, s + (row - first) * SCORES, added);
      for (int j = c.panel_from; j < c.panel_to; j++) t.state[j] += added[j];
    }
  }

  // The same where head 0 is not among the block's rows.
  void select_apart(const Tile& t, const Task& task, int begin, int end) const {
    const Span<T> span = find_span(t.request, selecting_head(), begin, end);
    const int columns = round_up(end - begin, PANEL);
    accumulate(t.request, task.first_query, t.num_queries, span, t.selecting, t.selected, t.state,
               [&](int query, const float* now) {
                 std::copy_n(now, columns, penalties(t, query - task.first_query, begin));
               });
  }

  // ---- results

  void write_out(const Tile& t, int r, const float* o, float factor) const {
    const int64_t token = call.batch->query_start_loc[t.request] + t.first_position +
                          r / group_size - first_position(t.request);
    const int64_t head = t.kv_head * group_size + r % group_size;
    const int64_t offset = token * call.out_stride + head * head_size;
    float turned[MAX_HEAD_SIZE];
    if (ROTATED) {
      std::copy_n(o, head_size, turned);
      rotate<T>(turned, head_size);
      o = turned;
      factor /= hadamard_block(head_size);
    }
    store_row(o, factor, head_size, call.out_format, call.out, offset);
  }

  void epilogue(const Tile& t) const {
    for (int r = 0; r < t.rows; r++)
      write_out(t, r, t.o + (ptrdiff_t)r * WIDE, variant.epilogue(t.row[r], t.query[r]));
  }
};
