// torch's operators for packed weights on a CPU. As Python functions they would take 28 us a call,
// which 121 calls of a decoding step feel; here they take a few. Only torch's stable interface is
// used: a library is built once for all versions of torch from 2.10 on.
//
// The kernels are in one library for each number of bits, loaded by Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "product.hpp"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Multiply = int (*)(const ProductCall*);
using Gather = void (*)(const ProductCall*);

struct Kernels {
  Multiply multiply;
  Gather gather;
};
Kernels kernels[9];  // by bits

Format format_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return FLOAT32;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    case ScalarType::Byte: return UINT8;
    case ScalarType::Char: return LEVELS;
    default: return NONE;
  }
}

bool floating(ScalarType type) { return format_of(type) < UINT8; }

// A call with a weight, whose tensors have the shapes that its numbers say.
ProductCall call_of(const Tensor& words, const Tensor& scales, const std::optional<Tensor>& zeros,
                    int64_t bits, int64_t group_size, int64_t outputs, int64_t inputs) {
  const bool two_level = zeros && zeros->scalar_type() == ScalarType::Char;
  const bool whole = group_size >= CHUNK && group_size % CHUNK == 0;
  STD_TORCH_CHECK(bits >= 2 && bits <= 8 && (whole || (two_level && group_size == CHUNK / 2)) &&
                      words.scalar_type() == ScalarType::Int && outputs >= 0 && inputs >= 0,
                  bits, " bits in groups of ", group_size, " columns, in words of 32 bits");
  STD_TORCH_CHECK(kernels[bits].multiply, "the kernels of ", bits, " bits are not loaded");
  ProductCall c{};
  c.outputs = outputs, c.inputs = inputs, c.group_size = group_size;
  const int64_t numbers = c.panels() * c.groups() * PANEL;
  STD_TORCH_CHECK(
      words.numel() == c.panels() * c.chunks() * bits * PANEL &&
          scales.numel() == (two_level ? c.panels() * PANEL : numbers) &&
          (!zeros || zeros->numel() == numbers) && words.is_contiguous() &&
          scales.is_contiguous() && (!zeros || zeros->is_contiguous()) &&
          floating(scales.scalar_type()) && (!zeros || format_of(zeros->scalar_type()) != NONE),
      "a matrix [", outputs, ", ", inputs, "] of ", bits, " bits in groups of ", group_size,
      " columns does not have ", words.numel(), " words and ", scales.numel(), " scales");
  c.words = (const uint32_t*)words.data_ptr();
  c.scales = scales.data_ptr();
  c.zeros = zeros ? zeros->data_ptr() : nullptr;
  c.scale_format = format_of(scales.scalar_type());
  c.zero_format = zeros ? format_of(zeros->scalar_type()) : NONE;
  c.threads = torch::stable::get_num_threads();
  return c;
}

Tensor multiply(const Tensor& x, const Tensor& words, const Tensor& scales,
                const std::optional<Tensor>& zeros, int64_t bits, int64_t group_size,
                int64_t outputs, int64_t inputs) {
  ProductCall c = call_of(words, scales, zeros, bits, group_size, outputs, inputs);
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim > 0 && x.size(dim - 1) == inputs && floating(x.scalar_type()),
                  "x is not [..., ", inputs, "] in float32, bfloat16 or float16");
  // Rows are a constant number of elements apart, or are copied.
  Tensor rows = dim == 2 && x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outputs;
  Tensor out = torch::stable::new_empty(x, shape);
  c.x = rows.data_ptr(), c.out = out.data_ptr();
  c.rows = inputs ? x.numel() / inputs : 0;
  c.x_stride = dim == 2 ? rows.stride(0) : inputs;
  c.format = format_of(x.scalar_type());
  STD_TORCH_CHECK(!kernels[bits].multiply(&c),
                  "no memory for the scratch space of a product with packed weights");
  return out;
}

Tensor gather(const Tensor& ids, ScalarType type, const Tensor& words, const Tensor& scales,
              const std::optional<Tensor>& zeros, int64_t bits, int64_t group_size, int64_t outputs,
              int64_t inputs) {
  ProductCall c = call_of(words, scales, zeros, bits, group_size, outputs, inputs);
  STD_TORCH_CHECK(floating(type), "rows are float32, bfloat16 or float16");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids are int64");
  const Tensor given = torch::stable::contiguous(ids);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(inputs);
  Tensor out = torch::stable::new_empty(words, shape, type);
  c.x = given.data_ptr(), c.out = out.data_ptr();
  c.rows = ids.numel(), c.format = format_of(type);
  kernels[bits].gather(&c);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnserve, CPU, m) {
  m.impl("packed_multiply", TORCH_BOX(&multiply));
  m.impl("packed_gather", TORCH_BOX(&gather));
}

extern "C" {

// Take the kernels of so many bits.
void attnserve_packed_use(int bits, Multiply multiply, Gather gather) {
  kernels[bits] = {multiply, gather};
}

// As in packed.cpp.
int attnserve_packed_abi() { return (int)sizeof(ProductCall); }
}
