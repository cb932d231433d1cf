// What the CPU and the CUDA implementation of scale_shift_act share: the argument checks, the
// output and the loops over it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"

namespace fused_resnet {

// Whether `activation` is "relu"; throws unless every argument is what the schema's users are
// promised: input (N, C, *) in fp16, bf16, fp32 or fp64, scale and shift (C,) in fp32 (fp64 for
// fp64), residual like input with any strides and maybe fewer channels, all on one device.
inline bool check_scale_shift_act(const Tensor& input, const Tensor& scale, const Tensor& shift,
                                  const std::optional<Tensor>& residual,
                                  const std::string& activation) {
  if (input.dim() < 2) {
    fail("scale_shift_act: input has shape ", shape_string(input), ", must be (N, C, *)");
  }
  check_floating("scale_shift_act", "input", input);
  const ScalarType dtype = input.scalar_type();
  const bool is_double = dtype == ScalarType::Double;
  const auto check_parameter = [&](const char* name, const Tensor& parameter) {
    if (parameter.dim() != 1 || parameter.size(0) != input.size(1)) {
      fail("scale_shift_act: ", name, " has shape ", shape_string(parameter), ", input has ",
           input.size(1), " channels");
    }
    if (parameter.scalar_type() != (is_double ? ScalarType::Double : ScalarType::Float)) {
      fail("scale_shift_act: ", name, " is ", dtype_string(parameter), ", must be ",
           is_double ? "float64" : "float32", " for ", dtype_string(input), " input");
    }
    check_device("scale_shift_act", name, parameter, input);
  };
  check_parameter("scale", scale);
  check_parameter("shift", shift);
  if (residual) {
    std::vector<int64_t> shape = input.sizes().vec();
    if (residual->dim() == input.dim() && residual->size(1) > 0 && residual->size(1) < shape[1]) {
      shape[1] = residual->size(1);
    }
    if (residual->sizes().vec() != shape) {
      fail("scale_shift_act: residual has shape ", shape_string(*residual), ", input has shape ",
           shape_string(input));
    }
    if (residual->scalar_type() != dtype) {
      fail("scale_shift_act: residual is ", dtype_string(*residual), ", input is ",
           dtype_string(input));
    }
    check_device("scale_shift_act", "residual", *residual, input);
  }
  if (activation != "relu" && activation != "none") {
    fail("scale_shift_act: activation is \"", activation, "\", must be \"relu\" or \"none\"");
  }
  return activation == "relu";
}

// The channels of a residual among those of the input, which has zeros for it before and behind.
struct ResidualChannels {
  int64_t begin, end;

  ResidualChannels(int64_t channels, const std::optional<Tensor>& residual)
      : begin(residual ? (channels - residual->size(1)) / 2 : 0),
        end(residual ? begin + residual->size(1) : 0) {}

  bool are_all(int64_t channels) const { return end - begin == channels; }
};

// Dimensions of more than one element, outermost in memory first.
inline std::vector<int64_t> memory_order(const Tensor& tensor) {
  std::vector<int64_t> order;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) != 1) order.push_back(dim);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });
  return order;
}

inline bool is_non_overlapping_and_dense(const Tensor& tensor) {
  const std::vector<int64_t> order = memory_order(tensor);
  int64_t expected = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    if (tensor.stride(*dim) != expected) return false;
    expected *= tensor.size(*dim);
  }
  return true;
}

// What torch.empty_like(input) returns, without a trip through the dispatcher in the common case.
inline Tensor empty_output(const Tensor& input) {
  if (!is_non_overlapping_and_dense(input)) return torch::stable::empty_like(input);
  int32_t dtype, device_type;
  AtenTensorHandle output;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(input.dim(), input.sizes().data(),
                                                  input.strides().data(), dtype, device_type,
                                                  input.get_device_index(), &output));
  return Tensor(output);
}

// Scale or shift with stride 1.
inline Tensor dense_parameter(const Tensor& parameter) {
  return parameter.is_contiguous() ? parameter : torch::stable::contiguous(parameter);
}

// One loop over the output and the step, in elements, that each tensor takes with it.
struct Loop {
  int64_t size, input, residual, output;
  bool is_channel;
};

// A residual's step along a dimension. Where it has one channel of several the stride may be any
// number.
inline int64_t step_of(const Tensor& residual, int64_t dim) {
  return residual.size(dim) == 1 ? 0 : residual.stride(dim);
}

// The fewest loops that visit the output in memory order: dimensions that every tensor steps
// through as through one are joined, the channels stay by themselves. At least one loop, outermost
// first. Without a residual its steps are the output's.
inline std::vector<Loop> make_loops(const Tensor& input, const std::optional<Tensor>& residual,
                                    const Tensor& output) {
  std::vector<Loop> loops;
  for (const int64_t dim : memory_order(output)) {
    const Loop loop{output.size(dim), input.stride(dim),
                    residual ? step_of(*residual, dim) : output.stride(dim), output.stride(dim),
                    dim == 1};
    if (!loops.empty()) {
      Loop& outer = loops.back();
      const auto continues = [&](int64_t Loop::* step) {
        return outer.*step == loop.*step * loop.size;
      };
      if (!outer.is_channel && !loop.is_channel && continues(&Loop::input) &&
          continues(&Loop::residual) && continues(&Loop::output)) {
        outer = {outer.size * loop.size, loop.input, loop.residual, loop.output, false};
        continue;
      }
    }
    loops.push_back(loop);
  }
  if (loops.empty()) loops.push_back({1, 1, 1, 1, true});
  return loops;
}

}  // namespace fused_resnet
