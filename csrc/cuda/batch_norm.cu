// The operators around batch_norm.cuh's kernels. Tensors are float16, bfloat16 or float32 and dense
// with the channels innermost, all in the input's strides but a residual of fewer channels, which
// may have any; statistics and parameters are dense, (C,) and float32. Whatever else there is,
// fused_resnet/backends/cuda.py converts or runs elsewhere.
//
// Accesses are of 16 bytes where the channels fill such and every tensor begins at one; else of one
// element.
#include "cuda/batch_norm.cuh"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/device/launch.cuh"
#include "cuda/library.h"
#include "cuda/narrow_residual_of.h"
#include "scale_shift_act.h"

namespace fused_resnet {
namespace {

using device::kElementsIn16Bytes;

constexpr int64_t kMostChannels = INT32_MAX - (1 << 16);  // a slab may reach beyond

bool has_innermost_channels(const Tensor& tensor) {
  return (tensor.size(1) == 1 || tensor.stride(1) == 1) && is_non_overlapping_and_dense(tensor);
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// The tensors of one call: checked as they come, with what they allow.
class Operands {
 public:
  Operands(const char* name, const Tensor& input)
      : name_(name), input_(input), aligned_(is_aligned(input.const_data_ptr())) {
    const ScalarType dtype = input.scalar_type();
    STD_TORCH_CHECK(
        dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
        name, ": input must be float16, bfloat16 or float32");
    STD_TORCH_CHECK(input.dim() >= 2 && has_innermost_channels(input), name,
                    ": input must be dense with its channels innermost");
    STD_TORCH_CHECK(input.numel() > 0, name, ": input is empty");
    STD_TORCH_CHECK(input.size(1) <= kMostChannels, name, ": input has ", input.size(1),
                    " channels");
  }

  void add(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() == input_.scalar_type() &&
                        tensor.sizes().vec() == input_.sizes().vec(),
                    name_, ": a tensor has another shape or dtype than input");
    for (int64_t d = 0; d < input_.dim(); ++d) {
      STD_TORCH_CHECK(input_.size(d) == 1 || tensor.stride(d) == input_.stride(d), name_,
                      ": a tensor has other strides than input");
    }
    aligned_ = aligned_ && is_aligned(tensor.const_data_ptr());
  }
  void add(const std::optional<Tensor>& tensor) {
    if (tensor) add(*tensor);
  }

  // A residual of fewer channels, in any strides: its kernel numbers pixels in 32 bits.
  void check_narrow(const Tensor& residual) const {
    std::vector<int64_t> shape = input_.sizes().vec();
    shape[1] = std::clamp<int64_t>(residual.size(1), 1, shape[1]);
    STD_TORCH_CHECK(residual.scalar_type() == input_.scalar_type() &&
                        residual.sizes().vec() == shape && residual.dim() <= 4,
                    name_, ": residual has another shape or dtype than input, not just fewer ",
                    "channels");
    STD_TORCH_CHECK(has_pixels_in_order(input_) && input_.numel() / input_.size(1) <= UINT32_MAX,
                    name_, ": input must be channels_last, of less than 2^32 pixels");
  }

  // A bit for each value.
  void check_bits(const Tensor& mask) const {
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                        mask.numel() == input_.numel() / Partition::kBitsInByte,
                    name_, ": a mask must have a bit for each value of input, in bytes (uint8)");
    STD_TORCH_CHECK(input_.size(1) % Partition::kBitsInByte == 0, name_,
                    ": with a mask, input must have a multiple of 8 channels, not ",
                    input_.size(1));
  }

  // The activation's output, or its mask.
  void add_signs(const std::optional<Tensor>& signs) {
    if (signs && signs->scalar_type() == ScalarType::Byte) {
      check_bits(*signs);
    } else {
      add(signs);
    }
  }

  const float* vector(const Tensor& vector) const {
    STD_TORCH_CHECK(vector.is_contiguous() && vector.numel() == input_.size(1) &&
                        vector.scalar_type() == ScalarType::Float,
                    name_, ": statistics and parameters must be dense, (C,) and float32");
    return static_cast<const float*>(vector.const_data_ptr());
  }
  const float* vector(const std::optional<Tensor>& tensor) const {
    return tensor ? vector(*tensor) : nullptr;
  }

  Norm norm(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, double eps) const {
    return {vector(mean), vector(var), vector(weight), vector(bias), static_cast<float>(eps)};
  }

  // Calls run(T(), N, partition) with the element type and how many of them an access has.
  template <typename Run>
  void dispatch(int most_blocks, const Run& run) const {
    switch (input_.scalar_type()) {
      case ScalarType::Half:
        return dispatch_in<__half>(most_blocks, run);
      case ScalarType::BFloat16:
        return dispatch_in<__nv_bfloat16>(most_blocks, run);
      default:
        return dispatch_in<float>(most_blocks, run);
    }
  }

 private:
  template <typename T, typename Run>
  void dispatch_in(int most_blocks, const Run& run) const {
    constexpr int kElements = kElementsIn16Bytes<T>;
    const int64_t channels = input_.size(1), rows = input_.numel() / channels;
    if (aligned_ && channels % kElements == 0) {
      run(T(), std::integral_constant<int, kElements>{},
          partition_of(rows, channels, kElements, most_blocks));
    } else {
      run(T(), std::integral_constant<int, 1>{}, partition_of(rows, channels, 1, most_blocks));
    }
  }

  const char* name_;
  const Tensor& input_;
  bool aligned_;
};

// `count` numbers for the device `like` is on.
Tensor floats(int64_t count, const Tensor& like) {
  const int64_t stride = 1;
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_float32(),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

float* data(const Tensor& floats) {
  return static_cast<float*>(floats.mutable_data_ptr());
}

template <typename T>
const T* elements(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

const void* signs_of(const std::optional<Tensor>& signs) {
  return signs ? signs->const_data_ptr() : nullptr;
}

template <typename T>
T* mutable_elements(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

unsigned combining_blocks(const Partition& p) {
  return static_cast<unsigned>((p.channels + kCombinedChannels - 1) / kCombinedChannels);
}

Mask mask_of(bool relu, const std::optional<Tensor>& output) {
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

std::tuple<Tensor, Tensor> statistics(Tensor input) {
  const Operands operands("batch_norm_statistics", input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  const Tensor mean = floats(input.size(1), input), var = floats(input.size(1), input);
  operands.dispatch(kBlocksOfSums, [&](auto zero, auto elements_at_once, const Partition& p) {
    using T = decltype(zero);
    constexpr int N = elements_at_once;
    const Tensor partials = floats((int64_t{2} * p.row_blocks + 1) * p.channels, input);
    device::launch(batch_norm_statistics<T, N>,
                   {p.blocks(), kThreads, kBytesToCombine<2 * N + 1>, stream}, elements<T>(input),
                   data(partials), p);
    device::launch(batch_norm_combine_statistics,
                   {combining_blocks(p), kThreads, kBytesToCombine<3>, stream}, data(partials),
                   data(mean), data(var), p);
  });
  return {mean, var};
}

Tensor normalize(Tensor input, Tensor mean, Tensor var, std::optional<Tensor> weight,
                 std::optional<Tensor> bias, double eps, std::optional<Tensor> residual, bool relu,
                 std::optional<Tensor> mask) {
  Operands operands("batch_norm_normalize", input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  const Tensor output = empty_output(input);
  const bool is_narrow = residual && residual->size(1) != input.size(1);
  if (is_narrow) {
    operands.check_narrow(*residual);
  } else {
    operands.add(residual);
  }
  operands.add(output);
  if (mask) operands.check_bits(*mask);
  uint8_t* const bits = mutable_elements<uint8_t>(mask);
  const Norm norm = operands.norm(mean, var, weight, bias, eps);
  const float floor = relu ? 0.f : -std::numeric_limits<float>::infinity();
  operands.dispatch(kBlocksOfElements, [&](auto zero, auto elements_at_once, const Partition& p) {
    using T = decltype(zero);
    constexpr int N = elements_at_once;
    const device::Grid grid{p.blocks(), kThreads, kBytesOfVectors<2, N>, stream};
    const auto launch = [&](auto kernel, auto residual_of_channels) {
      device::launch(kernel, grid, elements<T>(input), residual_of_channels,
                     mutable_elements<T>(output), bits, norm, floor, p);
    };
    if (is_narrow) {
      const NarrowResidual pixels = narrow_residual_of(*residual, p.channels, N, N);
      launch(
          mask ? batch_norm_normalize<T, N, true, true> : batch_norm_normalize<T, N, true, false>,
          pixels);
    } else {
      launch(
          mask ? batch_norm_normalize<T, N, false, true> : batch_norm_normalize<T, N, false, false>,
          elements<T>(residual));
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> gradient_sums(Tensor grad, Tensor input,
                                                 std::optional<Tensor> output, Tensor mean,
                                                 Tensor var, std::optional<Tensor> weight,
                                                 std::optional<Tensor> bias, double eps, bool relu,
                                                 std::optional<Tensor> masked) {
  Operands operands("batch_norm_gradient_sums", input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  operands.add(grad);
  operands.add_signs(output);
  operands.add(masked);
  const Norm norm = operands.norm(mean, var, weight, bias, eps);
  const int64_t channels = input.size(1);
  const Tensor total = floats(channels, input), dot = floats(channels, input);
  const Tensor grad_weight = floats(channels, input);
  operands.dispatch(kBlocksOfSums, [&](auto zero, auto elements_at_once, const Partition& p) {
    using T = decltype(zero);
    constexpr int N = elements_at_once;
    const Tensor partials = floats(int64_t{2} * p.row_blocks * p.channels, input);
    for_mask(mask_of(relu, output), [&](auto mask) {
      device::launch(batch_norm_gradient_sums<T, N, mask>,
                     {p.blocks(), kThreads, kBytesToCombine<2 * N> + kBytesOfVectors<3, N>, stream},
                     elements<T>(grad), elements<T>(input), signs_of(output),
                     mutable_elements<T>(masked), norm, data(partials), p);
    });
    device::launch(batch_norm_combine_sums,
                   {combining_blocks(p), kThreads, kBytesToCombine<2>, stream}, data(partials),
                   data(total), data(dot), data(grad_weight), norm, p);
  });
  return {total, dot, grad_weight};
}

void input_gradient(Tensor grad, Tensor input, std::optional<Tensor> output, Tensor mean,
                    Tensor var, std::optional<Tensor> weight, std::optional<Tensor> bias,
                    double eps, bool relu, std::optional<Tensor> total, std::optional<Tensor> dot,
                    double count, std::optional<Tensor> masked, Tensor grad_input) {
  Operands operands("batch_norm_input_gradient", input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  operands.add(grad);
  operands.add_signs(output);
  operands.add(masked);
  operands.add(grad_input);
  const Norm norm = operands.norm(mean, var, weight, bias, eps);
  const float *total_data = operands.vector(total), *dot_data = operands.vector(dot);
  STD_TORCH_CHECK((total_data == nullptr) == (dot_data == nullptr),
                  "batch_norm_input_gradient: total and dot are both there or neither");
  operands.dispatch(kBlocksOfElements, [&](auto zero, auto elements_at_once, const Partition& p) {
    using T = decltype(zero);
    constexpr int N = elements_at_once;
    for_mask(mask_of(relu, output), [&](auto mask) {
      device::launch(batch_norm_input_gradient<T, N, mask>,
                     {p.blocks(), kThreads, kBytesOfVectors<5, N>, stream}, elements<T>(grad),
                     elements<T>(input), signs_of(output), total_data, dot_data, count,
                     mutable_elements<T>(masked), mutable_elements<T>(grad_input), norm, p);
    });
  });
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("batch_norm_statistics", TORCH_BOX(&fused_resnet::statistics));
  m.impl("batch_norm_normalize", TORCH_BOX(&fused_resnet::normalize));
  m.impl("batch_norm_gradient_sums", TORCH_BOX(&fused_resnet::gradient_sums));
  m.impl("batch_norm_input_gradient", TORCH_BOX(&fused_resnet::input_gradient));
}
