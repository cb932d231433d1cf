// The operators around batch_norm.cuh's kernels, on what batch_norm_operands.cuh says.
//
// Accesses are of 16 bytes where the channels fill such and every tensor begins at one; else of one
// element.
#include "cuda/batch_norm.cuh"

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/batch_norm_operands.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/library.h"
#include "cuda/narrow_residual_of.h"

namespace fused_resnet {
namespace {

unsigned combining_blocks(const Partition& p) {
  return static_cast<unsigned>((p.channels + kCombinedChannels - 1) / kCombinedChannels);
}

std::tuple<Tensor, Tensor> statistics(Tensor input) {
  const Operands operands("batch_norm_statistics", input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  const Tensor mean = floats(input.size(1), input), var = floats(input.size(1), input);
  operands.dispatch(kBlocksOfSums, [&](auto zero, auto elements_at_once, const Partition& p) {
    using T = decltype(zero);
    constexpr int N = elements_at_once;
    const Tensor partials = floats((int64_t{3} * p.row_blocks + 1) * p.channels, input);
    device::launch(batch_norm_statistics<T, N>,
                   {p.blocks(), kThreads, kBytesToCombine<3 * N + 1>, stream}, elements<T>(input),
                   data(partials), p);
    device::launch(batch_norm_combine_statistics,
                   {combining_blocks(p), kThreads, kBytesToCombine<4>, stream}, data(partials),
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
  const bool is_narrow =
      residual && residual->dim() == input.dim() && residual->size(1) != input.size(1);
  if (is_narrow) {
    operands.check_narrow(*residual);
  } else {
    operands.add("residual", residual);
  }
  operands.add("output", output);
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
  operands.add("grad", grad);
  operands.add_signs(output);
  operands.add("masked", masked);
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
  operands.add("grad", grad);
  operands.add_signs(output);
  operands.add("masked", masked);
  operands.add("grad_input", grad_input);
  const Norm norm = operands.norm(mean, var, weight, bias, eps);
  FR_CHECK(count > 0, "batch_norm_input_gradient: count is ", count, ", must be positive");
  const float *total_data = operands.vector("total", total),
              *dot_data = operands.vector("dot", dot);
  FR_CHECK((total_data == nullptr) == (dot_data == nullptr),
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
