// Everything that is known of a row, in one formula (__init__.py).
#pragma once
#include "sinks/kernel.hpp"

struct Probe : Softmax {
  static constexpr bool biased = true;

  const float *slopes, *sinks;
  explicit Probe(const Parameters& p) : Softmax(p), slopes(p.learned[0]), sinks(p.learned[1]) {}

  float query_factor(const Query& query) const {
    return scale * (1.f + std::log(1.f + query.position)) / (1.f + query.norm);
  }

  Vec score_bias(const Query& query, Vec distance) const {
    return -slopes[query.head] * LOG2E * square_root(distance);
  }

  float epilogue(const Row& row, const Query& query) const {
    return query.n / (query.n + 1.f) * Sinks::normalise(row, sinks[query.head] * LOG2E);
  }
};
