// What one product or lookup is asked for, in plain C.
#pragma once
#include "simd.hpp"

constexpr int CHUNK = 32;  // values that take a whole number of words, whatever their bits

enum Format : int32_t { FLOAT32, BFLOAT16, FLOAT16, UINT8, NONE, LEVELS };

struct ProductCall {
  const uint32_t* words;
  const void *scales, *zeros;
  const void* x;  // [rows, inputs], rows x_stride elements apart
  void* out;      // [rows, outputs]
  int64_t outputs, inputs, group_size, x_stride, rows;
  int32_t scale_format, zero_format, format, threads;

  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
  int64_t chunks() const { return (inputs + CHUNK - 1) / CHUNK; }
  int64_t padded() const { return chunks() * CHUNK; }
  int64_t groups() const { return (inputs + group_size - 1) / group_size; }
};
