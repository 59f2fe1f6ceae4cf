// What a variant's struct is: that in the kernel.hpp of its folder in ../variants/. The struct
// has the name of its Python class.
//
//   scores, s      a row of q.k, times query_factor; `masked` where the query does not see the key
//   query          what is known of the row's query; given to all that looks at one row
//   query_factor   what a query is multiplied with
//   Row            what a query row carries along its keys, and how it starts
//   update         turns `count` scores (a multiple of 16, in place) into weights, exactly 0 where
//                  masked; returns the factor for what was summed up so far
//   merge          of two parts of a split context; returns the factors of both parts' outputs
//   epilogue       the factor of the output after the last key; unless defined, 1 / row.sum
//
// unit_keys        the scores are also divided by |k|
// biased           `score_bias(query, distance)` is added to the scores: a vector for a vector of
//                  distances, 0 for the query's own key (negative ones are masked afterwards); not
//                  of stateful variants
// gated            each token and head has a gate: `score_bias(query, distance, decay)` is added,
//                  which also sees what the gates after each key add up to
// two_pass         `update_statistics` sees all scores first (and may change them, for `update`),
//                  `merge_statistics` adds up parts of a split context, `finish_statistics` ends
//                  the pass
// sparse           of two passes, where most weights are 0: those of scores up to `cutoff(row)`,
//                  which `update` may then not be given (others come in order, zeros behind them)
// stateful         each token has a float32 accumulator: `penalise` scores by it, then add
//                  `selection` of head 0's score
#pragma once
#include "simd.hpp"

struct Parameters {
  float scale;  // the model's, usually 1/sqrt(head_size)
  int head_size;
  const float* values;          // the Python dataclass's fields in order; None is NaN
  const float* const* learned;  // each [num_heads], in the order of Variant.learned
};

struct Query {
  int head;      // of this rank: what learned tensors are indexed with
  int position;  // in its sequence, from 0
  float n;       // how many keys it sees
  float norm;    // |q|
};

struct Factors {
  float mine, theirs;
};

inline float reciprocal(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

struct OnePass {
  static constexpr bool unit_keys = false;
  static constexpr bool biased = false;
  static constexpr bool gated = false;
  static constexpr bool two_pass = false;
  static constexpr bool sparse = false;
  static constexpr bool stateful = false;

  template <class Row>
  float epilogue(const Row& row, const Query&) const {
    return reciprocal(horizontal_sum(row.sum));
  }
};

// Adds up two parts of a row whose sums are in units of 2^exponent.
template <class Row>
Factors merge_sums(Row& row, const Row& other) {
  const float exponent = larger(row.exponent, other.exponent);
  const Factors f = {power_of_two(row.exponent - exponent),
                     power_of_two(other.exponent - exponent)};
  row.sum = row.sum * f.mine + other.sum * f.theirs;
  row.exponent = exponent;
  return f;
}
