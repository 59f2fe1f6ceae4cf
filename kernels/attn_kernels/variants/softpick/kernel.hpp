// Softpick (arXiv 2504.20966): relu(e^x - 1) / (sum |e^x - 1| + eps).
#pragma once
#include "variant.hpp"

struct Softpick : OnePass {
  static constexpr float masked = 0.f;  // e^0 - 1 adds nothing to either sum

  float scale, eps;
  explicit Softpick(const Parameters& p) : scale(p.scale * LOG2E), eps(p.values[0]) {}

  float query_factor(const Query&) const { return scale; }

  struct Row {
    float exponent = 0.f;     // never below 0: a row without a positive score is 0 anyway
    float running_max = 0.f;  // max(0, largest score), the unit of eps
    Vec sum = {};
  };

  float update(Row& row, float* s, int count, const Query&) const {
    Vec maxima = load(s);
    for (int i = WIDTH; i < count; i += WIDTH) maxima = max(maxima, load(s + i));
    const float largest = horizontal_max(maxima);
    const float exponent = larger(row.exponent, nearest(largest));
    const float one = power_of_two(-exponent);
    Vec sum = {};
    for (int i = 0; i < count; i += WIDTH) {
      // (2^y - 1) 2^-exponent = 2^(n - exponent) (2^r - 1) + (2^(n - exponent) - 2^-exponent):
      // small scores lose nothing, for n = 0 the bracket is exactly 0.
      const Vec y = max(broadcast(exponent - 127.f), load(s + i));
      const Whole whole(y, exponent);
      const Vec p = exp2m1_fraction(y - whole.n) * whole.power + (whole.power - one);
      store(s + i, max(Vec{}, p));
      sum += absolute(p);
    }
    const float factor = power_of_two(row.exponent - exponent);
    row.sum = row.sum * factor + sum;
    row.exponent = exponent;
    row.running_max = larger(row.running_max, largest);
    return factor;
  }

  Factors merge(Row& row, const Row& other) const {
    row.running_max = larger(row.running_max, other.running_max);
    return merge_sums(row, other);
  }

  float epilogue(const Row& row, const Query&) const {
    return 1.f / (horizontal_sum(row.sum) + eps * std::exp2(row.running_max - row.exponent));
  }
};
