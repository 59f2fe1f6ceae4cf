// Scaled cosine attention (arXiv 2111.09883): softmax of exp(min(t, ln 100)) q.k / |q||k|.
#pragma once
#include "softmax/kernel.hpp"

struct Cosine : Softmax {
  static constexpr bool unit_keys = true;

  const float* temperatures;  // [num_heads]
  explicit Cosine(const Parameters& p) : Softmax(p), temperatures(p.learned[0]) {}

  float query_factor(const Query& query) const {
    const float factor = std::exp(std::min(temperatures[query.head], 4.605170186f));
    return factor * LOG2E / larger(query.norm, 1e-12f);
  }
};
