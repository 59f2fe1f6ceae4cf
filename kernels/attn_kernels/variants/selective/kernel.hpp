// Selective attention (arXiv 2410.02703): softmax(x - F), where F_j gathers relu(x0_kj) of head 0's
// scores over the queries k between key j and this query.
#pragma once
#include "softmax/kernel.hpp"

struct Selective : Softmax {
  static constexpr bool stateful = true;

  using Softmax::Softmax;

  static Vec penalise(Vec s, Vec accumulated) { return s - accumulated * LOG2E; }
  static Vec selection(Vec s) { return max(Vec{}, s) * LN2; }
};
