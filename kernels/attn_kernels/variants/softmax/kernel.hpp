// Softmax (arXiv 1706.03762). What every variant's struct has is explained in cpu/variant.hpp.
#pragma once
#include "variant.hpp"

struct Softmax : OnePass {
  static constexpr float masked = -INFINITY;

  float scale;
  explicit Softmax(const Parameters& p) : scale(p.scale * LOG2E) {}

  float query_factor(const Query&) const { return scale; }

  struct Row {
    float exponent = -0x1p20f;  // sums and outputs are in units of 2^exponent
    Vec sum = {};
  };

  float update(Row& row, float* s, int count, const Query&) const {
    Vec maxima = load(s);
    for (int i = WIDTH; i < count; i += WIDTH) maxima = max(maxima, load(s + i));
    const float exponent = larger(row.exponent, nearest(horizontal_max(maxima)));
    Vec sum = {};
    for (int i = 0; i < count; i += WIDTH) {
      const Vec w = exp2(load(s + i), exponent);
      store(s + i, w);
      sum += w;
    }
    const float factor = power_of_two(row.exponent - exponent);
    row.sum = row.sum * factor + sum;
    row.exponent = exponent;
    return factor;
  }

  Factors merge(Row& row, const Row& other) const { return merge_sums(row, other); }
};
