// Scalable softmax (arXiv 2501.19399): softmax of queries scaled by s ln(n) + b.
#pragma once
#include "softmax/kernel.hpp"

struct SSMax : Softmax {
  const float *scales = nullptr, *biases = nullptr;  // learned, one a head
  float fixed_scale;

  explicit SSMax(const Parameters& p) : Softmax(p), fixed_scale(p.values[0]) {
    int next = 0;
    if (std::isnan(fixed_scale)) scales = p.learned[next++];
    if (p.values[1] != 0.f) biases = p.learned[next];
  }

  float query_factor(const Query& query) const {
    const float s = scales ? scales[query.head] : fixed_scale;
    return scale * (s * std::log(query.n) + (biases ? biases[query.head] : 0.f));
  }
};
