// The operators around batch_norm_cluster.cuh's kernels, on what batch_norm_operands.cuh says, of
// which these take only what can be accessed in 16 bytes, with residuals of all channels.
#include "cuda/batch_norm_cluster.cuh"

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/batch_norm_operands.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/library.h"

namespace fused_resnet {
namespace {

constexpr int kLeastMajor = 9;  // of the compute capability

int attribute_of(cudaDeviceAttr attribute, const Tensor& tensor) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

// The partition of an input for kernels that keep `tensors` tensors like it; none where these do
// not fit, or there are no clusters.
std::optional<ClusterPartition> partition_of(const Tensor& input, int tensors) {
  if (attribute_of(cudaDevAttrComputeCapabilityMajor, input) < kLeastMajor) return std::nullopt;
  const int64_t channels = input.size(1), rows = input.numel() / channels;
  const int elements = input.scalar_type() == ScalarType::Float ? 4 : 8;
  return cluster_partition_of(rows, channels, elements, tensors,
                              attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, input));
}

bool fits_cluster(Tensor input, int64_t tensors) {
  constexpr const char* kName = "batch_norm_fits_cluster";
  check_floating(kName, "input", input, false);
  FR_CHECK(input.dim() >= 2 && input.numel() > 0, kName, ": input must have rows and channels");
  check_number(kName, "tensors", tensors, 1, 2);
  return partition_of(input, static_cast<int>(tensors)).has_value();
}

ClusterPartition checked_partition(const char* name, const Operands& operands, const Tensor& input,
                                   int tensors) {
  const auto found = partition_of(input, tensors);
  FR_CHECK(found.has_value(), name, ": input does not fit in a cluster's shared memory");
  FR_CHECK(operands.has_wide_accesses(), name,
           ": channels must fill accesses of 16 bytes, and tensors begin at such");
  return *found;
}

device::Grid grid_of(const ClusterPartition& p, int tensors, cudaStream_t stream) {
  return {p.blocks(), ClusterPartition::kThreads, static_cast<size_t>(p.shared_bytes(tensors)),
          stream, ClusterPartition::kBlocks};
}

std::tuple<Tensor, Tensor, Tensor> in_one_launch(Tensor input, std::optional<Tensor> weight,
                                                 std::optional<Tensor> bias, double eps,
                                                 std::optional<Tensor> residual, bool relu,
                                                 std::optional<Tensor> mask) {
  constexpr const char* kName = "batch_norm_in_one_launch";
  constexpr int kTensors = 1;
  Operands operands(kName, input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  const Tensor output = empty_output(input);
  operands.add("residual", residual);
  operands.add("output", output);
  if (mask) operands.check_bits(*mask);
  const ClusterPartition p = checked_partition(kName, operands, input, kTensors);
  const Tensor mean = floats(input.size(1), input), var = floats(input.size(1), input);
  const Norm norm = operands.norm(mean, var, weight, bias, eps);
  const float floor = relu ? 0.f : -std::numeric_limits<float>::infinity();
  operands.dispatch([&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kElementsIn16Bytes<T>;
    device::launch(
        mask ? batch_norm_in_one_launch<T, N, true> : batch_norm_in_one_launch<T, N, false>,
        grid_of(p, kTensors, stream), elements<T>(input), elements<T>(residual),
        mutable_elements<T>(output), mutable_elements<uint8_t>(mask), data(mean), data(var), norm,
        floor, p);
  });
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> backward_in_one_launch(Tensor grad, Tensor input,
                                                          std::optional<Tensor> output, Tensor mean,
                                                          Tensor var, std::optional<Tensor> weight,
                                                          std::optional<Tensor> bias, double eps,
                                                          bool relu, std::optional<Tensor> masked,
                                                          Tensor grad_input) {
  constexpr const char* kName = "batch_norm_backward_in_one_launch";
  constexpr int kTensors = 2;
  Operands operands(kName, input);
  const DeviceGuard guard(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  operands.add("grad", grad);
  operands.add_signs(output);
  operands.add("masked", masked);
  operands.add("grad_input", grad_input);
  const ClusterPartition p = checked_partition(kName, operands, input, kTensors);
  const Norm norm = operands.norm(mean, var, weight, bias, eps);
  const int64_t channels = input.size(1);
  const Tensor total = floats(channels, input), dot = floats(channels, input);
  const Tensor grad_weight = floats(channels, input);
  operands.dispatch([&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kElementsIn16Bytes<T>;
    for_mask(mask_of(relu, output), [&](auto mask) {
      device::launch(batch_norm_backward_in_one_launch<T, N, mask>, grid_of(p, kTensors, stream),
                     elements<T>(grad), elements<T>(input), signs_of(output),
                     mutable_elements<T>(masked), mutable_elements<T>(grad_input), data(total),
                     data(dot), data(grad_weight), norm, p);
    });
  });
  return {total, dot, grad_weight};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("batch_norm_fits_cluster", TORCH_BOX(&fused_resnet::fits_cluster));
  m.impl("batch_norm_in_one_launch", TORCH_BOX(&fused_resnet::in_one_launch));
  m.impl("batch_norm_backward_in_one_launch", TORCH_BOX(&fused_resnet::backward_in_one_launch));
}
