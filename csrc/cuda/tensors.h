// Tensors as the operators of csrc/cuda hand them to their kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "activations.h"
#include "checks.h"
#include "cuda/conv_bn_act.h"
#include "cuda/library.h"
#include "cuda/recording.h"

namespace fused_resnet {

// An operator's three numbers that say its activation.
inline Activation activation_of(const char* op, int64_t act, double first, double second) {
  check_number(op, "the activation's number", act, 0, static_cast<int64_t>(Act::kGeluTanh));
  return {static_cast<Act>(act), static_cast<float>(first), static_cast<float>(second)};
}

using torch::headeronly::MemoryFormat;

inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Whether the channels of every pixel can be loaded in chunks of 16 bytes.
inline bool has_aligned_pixels(const Tensor& tensor, int64_t chunk) {
  if (!is_aligned(tensor) || (tensor.size(1) > 1 && tensor.stride(1) != 1)) return false;
  for (const int64_t dim : {0, 2, 3}) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) % chunk != 0) return false;
  }
  return true;
}

// Whether a tensor's elements lie as (N, H, W, C) without gaps.
inline bool is_dense_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// A dense channels_last copy, which begins at an aligned address.
inline Tensor aligned_copy(const Tensor& tensor) {
  leave_no_plan();
  const Tensor copy = torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
  return is_aligned(copy) && copy.const_data_ptr() != tensor.const_data_ptr()
             ? copy
             : torch::stable::clone(copy);
}

inline Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    ScalarType dtype, const Tensor& like) {
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), shim_dtype, device_type,
                                                  like.get_device_index(), &handle));
  Tensor tensor(handle);
  if (recording != nullptr) {
    recording->add_memory(tensor.const_data_ptr(), tensor.numel() * tensor.element_size());
  }
  return tensor;
}

// An output that was made channels_last, in the format that it is to have.
inline Tensor in_format(const Tensor& output, bool channels_last) {
  if (channels_last) return output;
  leave_no_plan();
  return torch::stable::contiguous(output);
}

// A parameter of K numbers, copied if they are not next to each other.
inline Parameter parameter_of(const char* name, std::optional<Tensor>& tensor, int64_t K,
                              const Tensor& input) {
  if (!tensor) return {nullptr, Parameter::Type::kFloat32};
  FR_CHECK(tensor->dim() == 1 && tensor->size(0) == K, "conv_bn_act: ", name, " must have ", K,
           " elements");
  check_device("conv_bn_act", name, *tensor, input);
  if (!tensor->is_contiguous()) {
    leave_no_plan();
    tensor = torch::stable::contiguous(*tensor);
  }
  switch (tensor->scalar_type()) {
    case ScalarType::Float:
      return {tensor->const_data_ptr(), Parameter::Type::kFloat32};
    case ScalarType::Half:
      return {tensor->const_data_ptr(), Parameter::Type::kFloat16};
    case ScalarType::BFloat16:
      return {tensor->const_data_ptr(), Parameter::Type::kBFloat16};
    case ScalarType::Double:
      return {tensor->const_data_ptr(), Parameter::Type::kFloat64};
    default:
      fail("conv_bn_act: ", name, " is ", dtype_string(*tensor), ", must be floating");
  }
}

}  // namespace fused_resnet
