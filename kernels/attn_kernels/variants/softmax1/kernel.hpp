// Softmax plus one (Miller, Attention Is Off By One): e^x / (1 + sum e^x).
#pragma once
#include "sinks/kernel.hpp"

struct Softmax1 : Softmax {
  using Softmax::Softmax;

  float epilogue(const Row& row, const Query&) const { return Sinks::normalise(row, 0.f); }
};
