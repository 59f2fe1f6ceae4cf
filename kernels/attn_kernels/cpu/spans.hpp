// The keys and values of requests, a span at a time, and the two products with them.
#pragma once
#include "bf16.hpp"
#include "call.hpp"
#include "matmul.hpp"

// Row stride of the scratch matrices of queries and outputs. A panel more than the content, so that
// rows do not share cache sets.
constexpr int WIDE = MAX_HEAD_SIZE + PANEL;

// Rows that are scored and turned into weights together.
constexpr int MAX_BLOCK = 16;
static_assert(ROWS <= MAX_BLOCK && TILE_ROWS <= MAX_BLOCK);

template <class T>
class Spans {
 public:
  // Keys whose scores are in flight at once: those of a block of rows stay in the first-level
  // cache. Tiles multiply so fast that the rest of a span's work counts.
  static constexpr bool TILES = HAS_BF16 && std::is_same_v<T, BFloat16>;
  static constexpr int SPAN = TILES && HAS_AMX ? 256 : 128;
  // Queries, keys, values and sums of outputs are all rotated (quantized.hpp).
  static constexpr bool ROTATED = std::is_same_v<T, Int4>;
  static constexpr int SCORES = SPAN + 2 * PANEL;  // row stride of scores
  static constexpr int NARROW = SPAN + 2 * PANEL;  // row stride of bfloat16 weights

  static constexpr float ones[MAX_BLOCK] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  const AttendCall& call;
  const Cache<T> cache;
  const int head_size, group_size;  // group_size: query heads of a KV head

  explicit Spans(const AttendCall& c)
      : call(c),
        cache(c.cache),
        head_size(c.cache.head_size),
        group_size(c.num_heads / c.cache.num_kv_heads) {}

  int queries_of(int request) const {
    return call.batch->query_start_loc[request + 1] - call.batch->query_start_loc[request];
  }
  // Position in its context of a request's first query of this call.
  int first_position(int request) const {
    return call.batch->seq_lens[request] - queries_of(request);
  }
  // The first key that a query sees.
  int first_visible(int position) const {
    return call.window ? std::max(0, position - call.window + 1) : 0;
  }

  static int num_spans(int begin, int end) { return (end - 1) / SPAN - begin / SPAN + 1; }

  // The token of a call that is at a position of a request.
  int64_t token_at(int request, int position) const {
    return call.batch->query_start_loc[request] + position - first_position(request);
  }
  // Where in `query` a head's query at a position begins.
  int64_t query_offset(int request, int position, int head) const {
    return token_at(request, position) * call.query_stride + (int64_t)head * head_size;
  }

  void scale(float* x, int count, float factor) const {
    for (int i = 0; i < count; i += WIDTH) store(x + i, load(x + i) * factor);
  }

  // Consecutive tokens of a span that lie in one block.
  template <class U>
  struct Segment {
    const U *keys, *values;
    ptrdiff_t value_panel;
    int column, length;  // columns of the span
    ptrdiff_t ahead;     // bytes from this block to the request's next, 0 behind the last
    // Of a quantized format: a word a token.
    const uint32_t *key_parameters, *value_parameters;
  };
  template <class U>
  struct Span {
    int begin, end, count;
    Segment<U> segments[SPAN / PANEL];
  };

  Span<T> find_span(int request, int kv_head, int begin, int end) const {
    Span<T> span{begin, end, 0, {}};
    const int32_t* table = call.batch->block_table + request * call.batch->block_table_stride;
    for (int p = begin; p < end;) {
      const int offset = p % cache.block_size,
                length = std::min(cache.block_size - offset, end - p);
      const int block = p / cache.block_size;
      const bool last = (block + 1) * cache.block_size >= call.batch->seq_lens[request];
      const int64_t index = table[block], next = last ? index : table[block + 1];
      const uint32_t* words = cache.parameters(index, kv_head) + offset;
      span.segments[span.count++] = {cache.keys(index, kv_head, offset),
                                     cache.values(index, kv_head, offset),
                                     cache.value_panel(),
                                     p - begin,
                                     length,
                                     (next - index) * cache.block_stride * (ptrdiff_t)sizeof(T),
                                     words,
                                     words + cache.block_size};
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

  // Rows [0, count) of a panel, pairs of rows as far as there are, as float32. `decode(row, j)`
  // says what quantized values stand for in the columns [j, j + WIDTH).
  template <class D>
  static void widen_panel(const T* from, int count, Float32* to, D&& decode) {
    constexpr int PAIR = T::PAIR;
    for (int row = 0; row < count; row += PAIR)
      for (int j = 0; j < PANEL; j += WIDTH) {
        Vec rows[PAIR];
        load_rows(from + units<T>(row * PANEL + j * PAIR), rows);
        for (int k = 0; k < PAIR; k++) {
          if constexpr (QUANTIZED<T>) rows[k] = decode(row + k, j)(rows[k]);
          store((float*)to + (row + k) * PANEL + j, rows[k]);
        }
      }
  }
  Span<Float32> gather(const Span<T>& span, Float32* wide_keys, Float32* wide_values, bool keys,
                       bool values) const {
    Span<Float32> wide{span.begin, span.end, 1, {}};
    wide.segments[0] = {wide_keys, wide_values, SPAN * PANEL, 0, span.end - span.begin,
                        0,         nullptr,     nullptr};
    for (int i = 0; i < span.count; i++) {
      const Segment<T>& g = span.segments[i];
      for (int c = 0; keys && c < g.length; c += PANEL)
        widen_panel(g.keys + units<T>(c * head_size), head_size,
                    wide_keys + (g.column + c) * head_size,
                    [&](int, int j) { return Decoder<T>(g.key_parameters + c + j); });
      for (int d = 0; values && d < head_size / PANEL; d++)
        widen_panel(g.values + d * g.value_panel, g.length,
                    wide_values + (d * SPAN + g.column) * PANEL,
                    [&](int row, int) { return Decoder<T>(g.value_parameters[row]); });
    }
    return wide;
  }

  // 1 / |k| of a span's keys. A rotated one is longer than the key.
  template <class U>
  void norms(const Span<U>& span, float* per_norm) const {
    const float longer = ROTATED ? std::sqrt((float)hadamard_block(head_size)) : 1.f;
    for (int i = 0; i < span.count; i++) {
      const Segment<U>& g = span.segments[i];
      for (int c = 0; c < g.length; c += PANEL)
        for (int j = 0; j < PANEL; j += WIDTH) {
          const U* k = g.keys + units<U>(c * head_size + j * U::PAIR);
          Vec squares[2] = {};
          for (int d = 0; d < head_size; d += 2) {
            Vec rows[2];
            load_rows(k + units<U>(d * PANEL), rows);
            if constexpr (U::PAIR == 1) load_rows(k + (d + 1) * PANEL, rows + 1);
            for (int i = 0; i < 2; i++) {
              if constexpr (QUANTIZED<U>) rows[i] = Decoder<U>(g.key_parameters + c + j)(rows[i]);
              squares[i] += rows[i] * rows[i];
            }
          }
          store(per_norm + g.column + c + j,
                longer / max(broadcast(longer * 1e-12f), square_root(squares[0] + squares[1])));
        }
    }
  }

  // DIMS dims are summed up at a time: one running sum over all would carry the rounding of the
  // whole score at every step, and the score is an exponent.
  static constexpr int DIMS = 16;
  template <int NP, class U>
  void dot(int rows, const float* q, const U* panels, float* s, ptrdiff_t ahead) const {
    const ptrdiff_t stride = units<U>((ptrdiff_t)head_size * PANEL);
    multiply_rows<NP, WIDE, SCORES, false>(rows, q, panels, stride, std::min(DIMS, head_size), s,
                                           nullptr, ahead);
    for (int d = DIMS; d < head_size; d += DIMS)
      multiply_rows<NP, WIDE, SCORES, true>(rows, q + d, panels + units<U>(d * PANEL), stride,
                                            std::min(DIMS, head_size - d), s, ones, ahead);
  }

  // Woven panels are read as fast one by one.
  template <class U>
  static bool streams(int rows) {
    return STREAMS > 1 && U::PAIR == 1 && rows <= 4;
  }

  // Scores of `rows` rows in the span's columns [from, to), both multiples of 16.
  template <class U>
  void score(const Span<U>& span, int rows, const float* q, float* s, int from, int to) const {
    for (int i = 0; i < span.count; i++) {
      const Segment<U>& g = span.segments[i];
      const int first = std::max(from, g.column),
                last = std::min(to, g.column + round_up(g.length, PANEL));
      for (int c = first; c < last;) {
        const U* k = g.keys + units<U>((ptrdiff_t)(c - g.column) * head_size);
        if (streams<U>(rows) && last - c >= STREAMS * PANEL) {
          dot<STREAMS>(rows, q, k, s + c, g.ahead);
          c += STREAMS * PANEL;
        } else if (PANELS == 2 && rows > 4 && last - c >= 2 * PANEL) {
          dot<PANELS>(rows, q, k, s + c, g.ahead);
          c += PANELS * PANEL;
        } else {
          dot<1>(rows, q, k, s + c, g.ahead);
          c += PANEL;
        }
      }
      if constexpr (QUANTIZED<U>)
        for (int r = 0; r < rows; r++) decode_scores(g, q + r * WIDE, s + r * SCORES, first, last);
    }
  }

  // Products of a query with what is quantized in a segment's columns [from, to), of whole panels,
  // become those with its keys: q.k = scale * q.quantized + offset * sum(q).
  template <class U>
  void decode_scores(const Segment<U>& g, const float* q, float* s, int from, int to) const {
    Vec sums = {};
    if (ROTATED)
      for (int d = 0; d < head_size; d += WIDTH) sums += load(q + d);
    const float sum = horizontal_sum(sums);
    for (int j = from; j < to; j += WIDTH) {
      const Decoder<U> decoder(g.key_parameters + j - g.column);
      store(s + j, load(s + j) * decoder.scale + decoder.offset * sum);
    }
  }

  // Weights of a segment's columns [from, to) become those of its quantized values; returns what
  // they add to every dim of the output: weights.v = (weights * scale).quantized + weights.offset.
  template <class U>
  float encode_weights(const Segment<U>& g, float* weights, int from, int to) const {
    const uint32_t* words = g.value_parameters - g.column;
    Vec added = {};
    int j = from;
    for (; j + WIDTH <= to; j += WIDTH) {
      const Decoder<U> decoder(words + j);
      const Vec w = load(weights + j);
      added += w * decoder.offset;
      store(weights + j, w * decoder.scale);
    }
    float rest = 0;
    for (; j < to; j++) {  // behind `to` there may be no token
      const Decoder<U> decoder(words[j]);
      rest += weights[j] * decoder.offset[0];
      weights[j] *= decoder.scale[0];
    }
    return horizontal_sum(added) + rest;
  }

  // o = o * rescale + weights . values over the span's columns [from, to). The weights may change.
  template <class U>
  void add_values(const Span<U>& span, int rows, float* weights, int from, int to, float* o,
                  const float* rescale) const {
    for (int i = 0; i < span.count; i++) {
      const Segment<U>& g = span.segments[i];
      // An even row: the token before `from` is this request's too, and its weight is 0.
      const int c = std::max(from / U::PAIR * U::PAIR, g.column),
                depth = std::min(to, g.column + g.length) - c;
      if (depth <= 0) continue;
      float added[MAX_BLOCK] = {};
      if constexpr (QUANTIZED<U>)
        for (int r = 0; r < rows; r++)
          added[r] = encode_weights(g, weights + r * SCORES, std::max(from, c), c + depth);
      const U* v = g.values + units<U>((ptrdiff_t)(c - g.column) * PANEL);
      for (int d = 0; d < head_size; v += g.value_panel) {
        if (streams<U>(rows) && head_size - d >= STREAMS * PANEL) {
          multiply_rows<STREAMS, SCORES, WIDE, true>(rows, weights + c, v, g.value_panel, depth,
                                                     o + d, rescale, g.ahead);
          v += (STREAMS - 1) * g.value_panel;
          d += STREAMS * PANEL;
        } else if (PANELS == 2 && rows > 4 && head_size - d >= 2 * PANEL) {
          multiply_rows<PANELS, SCORES, WIDE, true>(rows, weights + c, v, g.value_panel, depth,
                                                    o + d, rescale, g.ahead);
          v += g.value_panel;
          d += PANELS * PANEL;
        } else {
          multiply_rows<1, SCORES, WIDE, true>(rows, weights + c, v, 0, depth, o + d, rescale,
                                               g.ahead);
          d += PANEL;
        }
      }
      if (QUANTIZED<U> && ROTATED)
        for (int r = 0; r < rows; r++)
          for (int d = 0; d < head_size; d += WIDTH)
            store(o + r * WIDE + d, load(o + r * WIDE + d) + added[r]);
      rescale = ones;
    }
  }

  // The same where few weights are not 0: `listed` of each row, of the keys `columns` [rows,
  // SCORES].
  void add_listed_values(const Span<Float32>& span, int rows, const float* weights,
                         const int32_t* columns, const int* listed, float* o,
                         const float* rescale) const {
    int done[MAX_BLOCK] = {}, until[MAX_BLOCK];
    for (int i = 0; i < span.count; i++) {
      const Segment<Float32>& g = span.segments[i];
      for (int r = 0; r < rows; r++) {
        const int32_t* list = columns + r * SCORES;
        until[r] = listed[r];
        if (i + 1 < span.count)
          until[r] = std::lower_bound(list + done[r], list + listed[r], g.column + g.length) - list;
      }
      // All rows meet the values of a few panels, which the first-level cache holds.
      const auto add = [&](auto panels, int d) {
        const Float32* v = g.values + d / PANEL * g.value_panel - (ptrdiff_t)g.column * PANEL;
        for (int r = 0; r < rows; r++) {
          const int next = r * SCORES + done[r];
          multiply<1, panels(), SCORES, WIDE, true, true>(
              weights + next, v, g.value_panel, until[r] - done[r], o + (ptrdiff_t)r * WIDE + d,
              rescale + r, 0, columns + next);
        }
      };
      int d = 0;
      for (; d + LISTED_PANELS * PANEL <= head_size; d += LISTED_PANELS * PANEL)
        add(std::integral_constant<int, LISTED_PANELS>(), d);
      for (; d < head_size; d += PANEL) add(std::integral_constant<int, 1>(), d);
      std::copy_n(until, rows, done);
      rescale = ones;
    }
  }
};
