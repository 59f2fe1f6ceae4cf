// Softmax with a learned sink a head (gpt-oss, arXiv 2508.10925): e^x / (e^sink + sum e^x).
#pragma once
#include "softmax/kernel.hpp"

struct Sinks : Softmax {
  const float* sinks;  // [num_heads]
  explicit Sinks(const Parameters& p) : Softmax(p), sinks(p.learned[0]) {}

  float epilogue(const Row& row, const Query& query) const {
    return normalise(row, sinks[query.head] * LOG2E);
  }

  // With a sink in powers of two. 2^128, of a sink far above all scores, is infinite: they get 0.
  static float normalise(const Row& row, float sink) {
    return reciprocal(horizontal_sum(row.sum) + std::exp2(sink - row.exponent));
  }
};
