// The operator hopper_conv_bn_act: what hopper/hopper_conv.cuh computes, on tensors. It allocates
// the output, describes four tensors to TMA, unless it did so before, and launches once; tensors
// that do not lie densely channels_last are copied first.
#include "cuda/hopper/hopper_conv.h"

#include <limits>
#include <optional>
#include <vector>

#include "cuda/hopper/operands.h"
#include "cuda/hopper/tiles.h"
#include "cuda/library.h"
#include "cuda/tensors.h"
#include "memory_format.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "hopper_conv_bn_act";

// What is multiplied is of another kind than what is added, for float32.
device::TensorElement operand_of(ScalarType dtype) {
  return dtype == ScalarType::Half       ? device::TensorElement::kFloat16
         : dtype == ScalarType::BFloat16 ? device::TensorElement::kBFloat16
                                         : device::TensorElement::kTf32;
}

device::TensorElement output_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? device::TensorElement::kFloat32 : operand_of(dtype);
}

Tensor hopper_conv_bn_act(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var,
                          std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                          double eps, std::optional<Tensor> bias, int64_t stride_h,
                          int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
                          int64_t dil_w, std::optional<Tensor> residual, int64_t act,
                          double act_first, double act_second, int64_t tile) {
  check_rank(kOp, "input", input, 4);
  check_rank(kOp, "weight", weight, 4);
  const ScalarType dtype = input.scalar_type();
  FR_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
           kOp, ": input is ", dtype_string(input), ", must be float16, bfloat16 or float32");
  check_dtype(kOp, "weight", weight, dtype);
  check_device(kOp, "weight", weight, input);
  check_eps(kOp, eps);
  const Activation activation = activation_of(kOp, act, act_first, act_second);
  check_number(kOp, "tile", tile, 0, kHopperTileCount - 1);
  const HopperTile& shape = kHopperTiles[tile];
  const int64_t size = shape.element_bytes, chunk = 16 / size;
  FR_CHECK((dtype == ScalarType::Float) == (size == 4), kOp, ": tile ", tile, " is of ", size,
           " bytes an element, input is ", dtype_string(input));
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  const int64_t K = weight.size(0), R = weight.size(2), S = weight.size(3);
  FR_CHECK(C > 0 && weight.size(1) == C, kOp, ": weight has shape ", shape_string(weight),
           ", input has ", C, " channels");
  FR_CHECK(C % chunk == 0 && K % chunk == 0 && K > 0 && K <= HopperTile::kMostFilters, kOp,
           ": has ", C, " channels and ", K, " filters, must have multiples of ", chunk,
           ", at most ", HopperTile::kMostFilters, " filters");
  const int64_t P = FilterAxis(kOp, H, R, stride_h, pad_h, dil_h).outputs;
  const int64_t Q = FilterAxis(kOp, W, S, stride_w, pad_w, dil_w).outputs;
  const Corners h(kOp, "h", R, stride_h, pad_h, dil_h), w(kOp, "w", S, stride_w, pad_w, dil_w);
  const int64_t M = checked_product(kOp, "the output", {N, P, Q});
  FR_CHECK(M <= kMostPixels, kOp, ": the output has ", M, " pixels, must have at most ",
           kMostPixels);
  checked_product(kOp, "the output", {M, K, 8});
  FR_CHECK(checked_product(kOp, "weight", {C, R, S}) < kMostPixels, kOp, ": weight is too large");
  if (residual) {
    check_device(kOp, "residual", *residual, input);
    check_dtype(kOp, "residual", *residual, dtype);
    FR_CHECK(residual->dim() == 4 && residual->size(0) == N && residual->size(1) == K &&
                 residual->size(2) == P && residual->size(3) == Q,
             kOp, ": residual has shape ", shape_string(*residual), ", must have the output's");
  }

  const DeviceGuard guard(input.get_device_index());
  check_hopper(kOp, input.get_device_index());
  Tensor output = empty({N, K, P, Q}, {P * Q * K, 1, Q * K, K}, dtype, input);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  if (output.numel() == 0) return in_format(output, channels_last);
  input = in_nhwc(input);
  weight = in_nhwc(weight);
  if (residual) residual = in_nhwc(*residual);

  const device::TensorElement operand = operand_of(dtype);
  const auto rows_of_pixels = [&](const void* pixels) {
    return rows_of(pixels, output_of(dtype), size, K, M, shape.rows_of_consumer());
  };
  std::optional<Tensor> mean = running_mean, var = running_var;
  const HopperConv conv{
      .input = windows_of(input, operand, h, w, HopperTile::kM),
      .weight = filters_of(weight, operand, shape.n / shape.cluster),
      .residual = rows_of_pixels(residual ? residual->const_data_ptr() : output.const_data_ptr()),
      .output = rows_of_pixels(output.mutable_data_ptr()),
      .has_residual = residual.has_value(),
      .running_mean = parameter_of("running_mean", mean, K, input),
      .running_var = parameter_of("running_var", var, K, input),
      .bn_weight = parameter_of("bn_weight", bn_weight, K, input),
      .bn_bias = parameter_of("bn_bias", bn_bias, K, input),
      .bias = parameter_of("bias", bias, K, input),
      .eps = static_cast<float>(eps),
      .floor = activation.kind == Act::kRelu ? 0.f : -std::numeric_limits<float>::infinity(),
      .M = static_cast<int>(M),
      .C = static_cast<int>(C),
      .P = static_cast<int>(P),
      .Q = static_cast<int>(Q),
      .K = static_cast<int>(K),
      .R = static_cast<int>(R),
      .S = static_cast<int>(S),
      .stride_h = static_cast<int>(stride_h),
      .stride_w = static_cast<int>(stride_w),
      .pad_h = static_cast<int>(pad_h),
      .pad_w = static_cast<int>(pad_w),
      .dil_h = static_cast<int>(dil_h),
      .dil_w = static_cast<int>(dil_w),
      .activation = activation,
  };
  const int multiprocessors = multiprocessors_of(input.get_device_index());
  const cudaStream_t stream = current_stream(input.get_device_index());
  if (dtype == ScalarType::Half) {
    launch_hopper_conv<__half>(conv, tile, multiprocessors, stream);
  } else if (dtype == ScalarType::BFloat16) {
    launch_hopper_conv<__nv_bfloat16>(conv, tile, multiprocessors, stream);
  } else {
    launch_hopper_conv<float>(conv, tile, multiprocessors, stream);
  }
  return in_format(output, channels_last);
}

// Six numbers for every instance, by index: the bytes of an element, n, stages, cluster, whether
// consumers take turns, and the bytes of shared memory it takes with the most filters there may be.
std::vector<int64_t> hopper_conv_tiles() {
  std::vector<int64_t> numbers;
  for (const HopperTile& tile : kHopperTiles) {
    numbers.insert(numbers.end(), {tile.element_bytes, tile.n, tile.stages, tile.cluster,
                                   tile.schedule == Schedule::kTakeTurns ? 1 : 0,
                                   tile.shared_bytes(HopperTile::kMostFilters)});
  }
  return numbers;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("hopper_conv_bn_act", TORCH_BOX(&fused_resnet::hopper_conv_bn_act));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("hopper_conv_tiles", TORCH_BOX(&fused_resnet::hopper_conv_tiles));
}
