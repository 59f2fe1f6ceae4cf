// Re-weighted softplus attention (arXiv 2501.13428): weights proportional to relu(s - mean)^power
// of LSSA's s, in units of (largest - mean)^power so that the largest term is 1.
#pragma once
#include "lssa/kernel.hpp"

struct LSSAR : LSSA {
  static constexpr bool two_pass = true, sparse = true;

  float power;
  bool by_squaring;  // a whole power

  explicit LSSAR(const Parameters& p)
      : LSSA(p), power(p.values[0]), by_squaring(power == std::floor(power) && power <= 64.f) {}

  struct Row {
    double row_sum = 0.;     // of s over the visible keys; its error is raised to the power
    Vec row_max = {};        // of s
    float mean = 0.f;        // of s
    float per_spread = 0.f;  // 1 / (largest - mean); 0 says that all scores are equal
    float least = 0.f;       // (s - mean) * per_spread up to which weights are 0
    Vec sum = {};            // of the weights
  };

  // First pass: scores become s, and the row gathers their sum and maximum.
  void update_statistics(Row& row, float* s, int count, const Query&) const {
    Vec sum = {}, row_max = row.row_max;
    softplus(s, count, [&](Vec w) {
      sum += w;
      row_max = max(row_max, w);
    });
    row.row_sum += horizontal_sum(sum);
    row.row_max = row_max;
  }

  void merge_statistics(Row& row, const Row& other) const {
    row.row_sum += other.row_sum;
    row.row_max = max(row.row_max, other.row_max);
  }

  void finish_statistics(Row& row, const Query& query) const {
    row.mean = query.n <= 3.f ? 0.f : (float)(row.row_sum / query.n);
    const float largest = horizontal_max(row.row_max), spread = largest - row.mean;
    row.per_spread = spread <= 16 * 0x1p-23f * largest ? 0.f : 1.f / spread;
    // NaN, which no comparison below would keep, where a score is NaN or infinite; else 0.
    row.sum = broadcast((float)(row.row_sum - row.row_sum));
    // Smaller bases are taken as 0: the powers of all of them together are less than a unit in the
    // last place of the largest one, which is 1.
    row.least = std::exp2((-23.f - std::log2(query.n)) / power);
  }

  float cutoff(const Row& row) const {
    return row.per_spread == 0.f ? 0.f : row.mean + row.least / row.per_spread;
  }

  // Second pass.
  float update(Row& row, float* s, int count, const Query&) const {
    Vec sum = {};
    side_by_side<2>(count, [&](auto n, int i) { sum += to_weights<n()>(row, s + i); });
    row.sum += sum;
    return 1.f;
  }

  // Turns N vectors of s into weights; returns their sum.
  template <int N>
  Vec to_weights(const Row& row, float* s) const {
    Vec w[N], sum = {};
    for (int i = 0; i < N; i++) {
      const Vec x = load(s + i * WIDTH), base = (x - row.mean) * row.per_spread;
      if (row.per_spread == 0.f)
        w[i] = x > 0.f ? broadcast(1.f) : Vec{};  // masked keys have s = 0
      else
        w[i] = base > row.least ? base : Vec{};
    }
    raise(w);
    for (int i = 0; i < N; i++) {
      store(s + i * WIDTH, w[i]);
      sum += w[i];
    }
    return sum;
  }

  // To the power, several vectors side by side since each product waits for the one before.
  template <int N>
  void raise(Vec (&base)[N]) const {
    if (!by_squaring) {
      for (Vec& b : base)
        for (int lane = 0; lane < WIDTH; lane++) b[lane] = std::pow(b[lane], power);
      return;
    }
    Vec result[N];
    for (Vec& r : result) r = broadcast(1.f);
    for (int n = (int)power;; n >>= 1) {
      if (n & 1)
        for (int i = 0; i < N; i++) result[i] *= base[i];
      if (n <= 1) break;
      for (Vec& b : base) b *= b;
    }
    for (int i = 0; i < N; i++) base[i] = result[i];
  }
};
