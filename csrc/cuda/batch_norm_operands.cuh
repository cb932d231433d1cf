// What the operators of batch norm check and convert before a launch. Tensors are float16, bfloat16
// or float32 and dense with the channels innermost, all in the input's strides but a residual of
// fewer channels, which may have any; statistics and parameters are dense, (C,) and float32.
// Whatever else there is, fused_resnet/backends/cuda.py converts or runs elsewhere.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/batch_norm.h"
#include "cuda/device/vector.cuh"
#include "cuda/library.h"
#include "cuda/narrow_residual_of.h"
#include "scale_shift_act.h"

namespace fused_resnet {

using device::kElementsIn16Bytes;

inline constexpr int64_t kMostChannels = INT32_MAX - (1 << 16);  // a slab may reach beyond

inline bool has_innermost_channels(const Tensor& tensor) {
  return (tensor.size(1) == 1 || tensor.stride(1) == 1) && is_non_overlapping_and_dense(tensor);
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// The tensors of one call: checked as they come, with what they allow.
class Operands {
 public:
  Operands(const char* name, const Tensor& input)
      : name_(name), input_(input), aligned_(is_aligned(input.const_data_ptr())) {
    check_floating(name, "input", input, false);
    FR_CHECK(input.dim() >= 2 && has_innermost_channels(input), name,
             ": input must be dense with its channels innermost");
    FR_CHECK(input.numel() > 0, name, ": input is empty");
    FR_CHECK(input.size(1) <= kMostChannels, name, ": input has ", input.size(1), " channels");
  }

  void add(const char* what, const Tensor& tensor) {
    check_device(name_, what, tensor, input_);
    check_alike(name_, what, tensor, input_);
    aligned_ = aligned_ && is_aligned(tensor.const_data_ptr());
  }
  void add(const char* what, const std::optional<Tensor>& tensor) {
    if (tensor) add(what, *tensor);
  }

  // A residual of fewer channels, in any strides: its kernel numbers pixels in 32 bits.
  void check_narrow(const Tensor& residual) const {
    check_device(name_, "residual", residual, input_);
    std::vector<int64_t> shape = input_.sizes().vec();
    if (residual.dim() > 1) shape[1] = std::clamp<int64_t>(residual.size(1), 1, shape[1]);
    FR_CHECK(residual.scalar_type() == input_.scalar_type() && residual.sizes().vec() == shape &&
                 residual.dim() <= 4,
             name_, ": residual has another shape or dtype than input, not just fewer ",
             "channels");
    FR_CHECK(has_pixels_in_order(input_) && input_.numel() / input_.size(1) <= UINT32_MAX, name_,
             ": input must be channels_last, of less than 2^32 pixels");
  }

  // A bit for each value.
  void check_bits(const Tensor& mask) const {
    check_device(name_, "mask", mask, input_);
    FR_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                 mask.numel() == input_.numel() / Partition::kBitsInByte,
             name_, ": a mask must have a bit for each value of input, in bytes (uint8)");
    FR_CHECK(input_.size(1) % Partition::kBitsInByte == 0, name_,
             ": with a mask, input must have a multiple of 8 channels, not ", input_.size(1));
  }

  // The activation's output, or its mask.
  void add_signs(const std::optional<Tensor>& signs) {
    if (signs && signs->scalar_type() == ScalarType::Byte) {
      check_bits(*signs);
    } else {
      add("output", signs);
    }
  }

  const float* vector(const char* what, const Tensor& vector) const {
    check_device(name_, what, vector, input_);
    check_vector(name_, what, vector, input_.size(1), ScalarType::Float);
    return static_cast<const float*>(vector.const_data_ptr());
  }
  const float* vector(const char* what, const std::optional<Tensor>& tensor) const {
    return tensor ? vector(what, *tensor) : nullptr;
  }

  Norm norm(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, double eps) const {
    check_eps(name_, eps);
    return {vector("mean", mean), vector("var", var), vector("weight", weight),
            vector("bias", bias), static_cast<float>(eps)};
  }

  // Whether accesses of 16 bytes can be all there are.
  bool has_wide_accesses() const {
    const int64_t size = input_.scalar_type() == ScalarType::Float ? 4 : 2;
    return aligned_ && input_.size(1) * size % 16 == 0;
  }

  // Calls run(T()) with the element type.
  template <typename Run>
  void dispatch(const Run& run) const {
    switch (input_.scalar_type()) {
      case ScalarType::Half:
        return run(__half());
      case ScalarType::BFloat16:
        return run(__nv_bfloat16());
      default:
        return run(float());
    }
  }

  // Calls run(T(), N, partition) with the element type and how many of them an access has.
  template <typename Run>
  void dispatch(int most_blocks, const Run& run) const {
    dispatch([&](auto zero) {
      using T = decltype(zero);
      constexpr int kElements = kElementsIn16Bytes<T>;
      const int64_t channels = input_.size(1), rows = input_.numel() / channels;
      if (has_wide_accesses()) {
        run(zero, std::integral_constant<int, kElements>{},
            partition_of(rows, channels, kElements, most_blocks));
      } else {
        run(zero, std::integral_constant<int, 1>{}, partition_of(rows, channels, 1, most_blocks));
      }
    });
  }

 private:
  const char* name_;
  const Tensor& input_;
  bool aligned_;
};

// `count` numbers for the device `like` is on.
inline Tensor floats(int64_t count, const Tensor& like) {
  const int64_t stride = 1;
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_float32(),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline float* data(const Tensor& floats) {
  return static_cast<float*>(floats.mutable_data_ptr());
}

template <typename T>
const T* elements(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline const void* signs_of(const std::optional<Tensor>& signs) {
  return signs ? signs->const_data_ptr() : nullptr;
}

template <typename T>
T* mutable_elements(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

inline Mask mask_of(bool relu, const std::optional<Tensor>& output) {
  if (!relu) return Mask::kEverywhere;
  if (!output) return Mask::kRecomputed;
  return output->scalar_type() == ScalarType::Byte ? Mask::kBits : Mask::kOutput;
}

// Calls run(mask) with the mask as a constant.
template <typename Run>
void for_mask(Mask mask, const Run& run) {
  switch (mask) {
    case Mask::kEverywhere:
      return run(std::integral_constant<Mask, Mask::kEverywhere>{});
    case Mask::kRecomputed:
      return run(std::integral_constant<Mask, Mask::kRecomputed>{});
    case Mask::kOutput:
      return run(std::integral_constant<Mask, Mask::kOutput>{});
    case Mask::kBits:
      return run(std::integral_constant<Mask, Mask::kBits>{});
  }
}

}  // namespace fused_resnet
