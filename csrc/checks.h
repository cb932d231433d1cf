// What the native operators check before they touch memory. Anyone can call them, with any tensors
// and numbers, past the checks of fused_resnet/layers/checks.py.
//
// What fails is a ValueError in Python, a dtype too: the stable ABI has no way to a TypeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

// Fails with a message made of the other arguments, which are evaluated only then.
#define FR_CHECK(condition, ...)         \
  do {                                   \
    if (!(condition)) [[unlikely]]       \
      ::fused_resnet::fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_string(const Tensor& tensor) {
  std::ostringstream out;
  out << '(';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) out << (dim ? ", " : "") << tensor.size(dim);
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline const char* dtype_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(dtype);
  }
}
inline const char* dtype_string(const Tensor& tensor) {
  return dtype_string(tensor.scalar_type());
}

inline std::string device_string(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& input) {
  FR_CHECK(same_device(tensor, input), op, ": ", name, " is on ", device_string(tensor),
           ", input is on ", device_string(input));
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank) {
  FR_CHECK(tensor.dim() == rank, op, ": ", name, " has ", tensor.dim(), " dimensions, must have ",
           rank);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  FR_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " is ", dtype_string(tensor),
           ", must be ", dtype_string(dtype));
}

// The dtypes there are kernels for; float64 not for all of them.
inline void check_floating(const char* op, const char* name, const Tensor& tensor,
                           bool or_double = true) {
  const ScalarType dtype = tensor.scalar_type();
  FR_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
               dtype == ScalarType::Float || (or_double && dtype == ScalarType::Double),
           op, ": ", name, " is ", dtype_string(tensor), ", must be float16, bfloat16",
           or_double ? ", float32 or float64" : " or float32");
}

// A dense (size,) tensor.
inline void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t size,
                         ScalarType dtype) {
  FR_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, ": ", name, " has shape ",
           shape_string(tensor), ", must have (", size, ",)");
  check_dtype(op, name, tensor, dtype);
  FR_CHECK(tensor.is_contiguous(), op, ": ", name, " must be dense");
}

// A tensor of the input's shape, dtype and strides.
inline void check_alike(const char* op, const char* name, const Tensor& tensor,
                        const Tensor& input) {
  FR_CHECK(tensor.sizes().vec() == input.sizes().vec(), op, ": ", name, " has shape ",
           shape_string(tensor), ", input has shape ", shape_string(input));
  check_dtype(op, name, tensor, input.scalar_type());
  for (int64_t d = 0; d < input.dim(); ++d) {
    FR_CHECK(input.size(d) == 1 || tensor.stride(d) == input.stride(d), op, ": ", name,
             " has other strides than input");
  }
}

// What eps, a variance's addend, may be.
inline void check_eps(const char* op, double eps) {
  FR_CHECK(eps >= 0, op, ": eps is ", eps, ", must not be negative");
}

// ---- numbers -----------------------------------------------------------------------------------

// No stride, padding or dilation is larger, as in fused_resnet/layers/checks.py.
constexpr int64_t kLargestStep = INT32_MAX;

inline void check_number(const char* op, const char* name, int64_t value, int64_t least,
                         int64_t most = kLargestStep) {
  FR_CHECK(least <= value && value <= most, op, ": ", name, " is ", value, ", must be at least ",
           least, " and at most ", most);
}

// The product of numbers of which none is negative.
inline int64_t checked_product(const char* op, const char* name,
                               std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  bool overflows = false;
  for (const int64_t factor : factors) {
    if (factor == 0) return 0;
    overflows |= __builtin_mul_overflow(product, factor, &product);
  }
  FR_CHECK(!overflows, op, ": ", name, " is too large for 64 bits");
  return product;
}

// One of the two dimensions that a filter of `taps` moves along.
struct FilterAxis {
  int64_t padded, filter, outputs;

  FilterAxis(const char* op, int64_t size, int64_t taps, int64_t stride, int64_t padding,
             int64_t dilation) {
    check_number(op, "stride", stride, 1);
    check_number(op, "padding", padding, 0);
    check_number(op, "dilation", dilation, 1);
    check_number(op, "a size of weight", taps, 1);
    check_number(op, "a size of input", size, 0, INT64_MAX / 2);
    padded = size + 2 * padding;
    filter = dilation * (taps - 1) + 1;
    FR_CHECK(padded >= filter, op, ": weight spans ", filter, " pixels, input ", padded,
             " with its padding");
    outputs = (padded - filter) / stride + 1;
  }
};

}  // namespace fused_resnet
