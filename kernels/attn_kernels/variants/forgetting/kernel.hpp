// Forgetting attention (arXiv 2503.02130): softmax of scores plus the logarithms of the forget
// gates between key and query.
#pragma once
#include "softmax/kernel.hpp"

struct Forgetting : Softmax {
  static constexpr bool gated = true;

  using Softmax::Softmax;

  Vec score_bias(const Query&, Vec, Vec decay) const { return LOG2E * decay; }
};
