// Softplus attention with length scaling (arXiv 2501.13428):
// s = softplus(ln(d) ln(n) q.k / |q||k|), weights s / sum s.
#pragma once
#include "variant.hpp"

struct LSSA : OnePass {
  static constexpr float masked = -INFINITY;
  static constexpr bool unit_keys = true;

  float scale;
  explicit LSSA(const Parameters& p) : scale(std::log((float)p.head_size) * LOG2E) {}

  float query_factor(const Query& query) const {
    return scale * std::log(query.n) / larger(query.norm, 1e-12f);
  }

  // Turns `count` scores into s, in place; each vector of them is seen.
  template <class F>
  static void softplus(float* s, int count, F&& see) {
    side_by_side<REGISTERS / 8>(count, [&](auto n, int i) {
      Vec w[n()];
      for (int k = 0; k < n(); k++) w[k] = load(s + i + k * WIDTH);
      softplus2(w);
      for (int k = 0; k < n(); k++) {
        store(s + i + k * WIDTH, w[k]);
        see(w[k]);
      }
    });
  }

  struct Row {
    Vec sum = {};
  };

  // Scores are bounded by ln(d) ln(n): there is no running maximum, and the unit ln 2 cancels.
  float update(Row& row, float* s, int count, const Query&) const {
    softplus(s, count, [&](Vec w) { row.sum += w; });
    return 1.f;
  }

  template <class R>
  Factors merge(R& row, const R& other) const {
    row.sum += other.sum;
    return {1.f, 1.f};
  }
};
