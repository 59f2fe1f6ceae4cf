// Sigmoid attention (arXiv 2409.04431): weights sigmoid(x + bias), which are not normalised.
#pragma once
#include "variant.hpp"

struct Sigmoid : OnePass {
  static constexpr float masked = -INFINITY;  // its sigmoid is exactly 0

  float scale, bias;  // in units of log2(e); a bias of NaN is -ln(n)
  explicit Sigmoid(const Parameters& p) : scale(p.scale * LOG2E), bias(p.values[0] * LOG2E) {}

  float query_factor(const Query&) const { return scale; }

  struct Row {};  // no sum and no maximum: a weight depends on its own score alone

  float update(Row&, float* s, int count, const Query& query) const {
    const float b = std::isnan(bias) ? -std::log2(query.n) : bias;
    for (int i = 0; i < count; i += WIDTH) {
      // u / (1 + u) of u = 2^min(y, 64), which is 0 where y is -infinity and 1 far above 0.
      const Vec u = exp2(-max(broadcast(-64.f), -(load(s + i) + b)));
      store(s + i, u / (1.f + u));
    }
    return 1.f;  // what was summed up so far keeps its unit
  }

  Factors merge(Row&, const Row&) const { return {1.f, 1.f}; }

  float epilogue(const Row&, const Query&) const { return 1.f; }
};
