// Re-weighted softplus attention (arXiv 2501.13428): weights proportional to relu(s - mean)^power
// of LSSA's s, in units of (largest - mean)^power so that the largest term is 1.
#pragma once
#include "lssa.hpp"

struct LSSAR : LSSA {
  static constexpr bool two_pass = true;

  float power;
  explicit LSSAR(const Parameters& p) : LSSA(p), power(p.values[0]) {}

  struct Row {
    double total = 0.;            // of s over the visible keys; its error is raised to the power
    float top = 0.f, mean = 0.f;  // of s
    float per_spread = 0.f;       // 1 / (top - mean); 0 says that all scores are equal
    Vec sum = {};                 // of the weights
  };

  // First pass: scores become s, and the row gathers their sum and maximum.
  void observe(Row& row, float* s, int count) const {
    Vec sum = {}, top = {};
    for (int i = 0; i < count; i += WIDTH) {
      const Vec w = softplus2(load(s + i));
      store(s + i, w);
      sum += w;
      top = max(top, w);
    }
    row.total += horizontal_sum(sum);
    row.top = larger(row.top, horizontal_max(top));
  }

  void combine(Row& row, const Row& other) const {
    row.total += other.total;
    row.top = larger(row.top, other.top);
  }

  void settle(Row& row, float n) const {
    row.mean = n <= 3.f ? 0.f : (float)(row.total / n);
    const float spread = row.top - row.mean;
    row.per_spread = spread <= 16 * 0x1p-23f * row.top ? 0.f : 1.f / spread;
  }

  // Second pass.
  float update(Row& row, float* s, int count) const {
    Vec sum = {};
    for (int i = 0; i < count; i += WIDTH) {
      const Vec x = load(s + i);
      Vec w;
      if (row.per_spread == 0.f)
        w = x > 0.f ? broadcast(1.f) : Vec{};  // masked keys have s = 0
      else
        w = to_the_power(max(Vec{}, (x - row.mean) * row.per_spread));
      store(s + i, w);
      sum += w;
    }
    row.sum += sum;
    return 1.f;
  }

  Vec to_the_power(Vec base) const {
    if (power != (float)(int)power || power > 64.f) {
      for (int lane = 0; lane < WIDTH; lane++) base[lane] = std::pow(base[lane], power);
      return base;
    }
    Vec result = broadcast(1.f);
    for (int n = (int)power;; base *= base) {
      if (n & 1) result *= base;
      if (!(n >>= 1)) return result;
    }
  }

  Factors merge(Row& row, const Row& other) const {
    row.sum += other.sum;
    return {1.f, 1.f};
  }

  float finish(const Row& row) const { return reciprocal(horizontal_sum(row.sum)); }
};
