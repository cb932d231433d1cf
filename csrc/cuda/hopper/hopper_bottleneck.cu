// The operator hopper_bottleneck: what hopper/hopper_bottleneck.cuh computes, on tensors. It
// allocates both outputs, describes seven tensors to TMA, unless it did so before, and launches
// once; tensors that do not lie densely channels_last are copied first.
#include "cuda/hopper/hopper_bottleneck.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/hopper/bottleneck_tiles.h"
#include "cuda/hopper/operands.h"
#include "cuda/library.h"
#include "cuda/tensors.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "hopper_bottleneck";

// A convolution and its norm as they were handed over, kept while the kernel is launched.
struct LayerOfBottleneck {
  const char* name;
  std::optional<Tensor> weight, running_mean, running_var, bn_weight, bn_bias;
  double eps;
  std::optional<Tensor> bias;

  // Checks the weight, (K, C, R, S).
  void check(const Tensor& input, int64_t C) const {
    check_rank(kOp, name, *weight, 4);
    check_device(kOp, name, *weight, input);
    check_dtype(kOp, name, *weight, input.scalar_type());
    FR_CHECK(weight->size(1) == C, kOp, ": ", name, " has shape ", shape_string(*weight),
             ", its input has ", C, " channels");
    check_eps(kOp, eps);
    FR_CHECK(running_mean && running_var, kOp, ": the norm of ", name, " has no statistics");
  }

  void check_pointwise() const {
    FR_CHECK(weight->size(2) == 1 && weight->size(3) == 1, kOp, ": ", name, " has shape ",
             shape_string(*weight), ", must be of a 1x1 convolution");
  }

  BottleneckNorm norm(const Tensor& input) {
    const int64_t K = weight->size(0);
    return {parameter_of("running_mean", running_mean, K, input),
            parameter_of("running_var", running_var, K, input),
            parameter_of("bn_weight", bn_weight, K, input),
            parameter_of("bn_bias", bn_bias, K, input),
            parameter_of("bias", bias, K, input),
            static_cast<float>(eps)};
  }
};

std::tuple<Tensor, Tensor> hopper_bottleneck(
    Tensor input, Tensor shortcut, Tensor weight, Tensor running_mean, Tensor running_var,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
    std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
    int64_t dil_h, int64_t dil_w, Tensor expand_weight, Tensor expand_running_mean,
    Tensor expand_running_var, std::optional<Tensor> expand_bn_weight,
    std::optional<Tensor> expand_bn_bias, double expand_eps, std::optional<Tensor> expand_bias,
    std::optional<Tensor> next_weight, std::optional<Tensor> next_running_mean,
    std::optional<Tensor> next_running_var, std::optional<Tensor> next_bn_weight,
    std::optional<Tensor> next_bn_bias, double next_eps, std::optional<Tensor> next_bias,
    int64_t tile) {
  check_rank(kOp, "input", input, 4);
  check_rank(kOp, "shortcut", shortcut, 4);
  const ScalarType dtype = input.scalar_type();
  FR_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, kOp, ": input is ",
           dtype_string(input), ", must be float16 or bfloat16");
  check_number(kOp, "tile", tile, 0, kBottleneckTileCount - 1);
  const BottleneckTile& shape = kBottleneckTiles[tile];
  const int64_t width = shape.width;
  LayerOfBottleneck window{"weight",  weight,  running_mean, running_var,
                           bn_weight, bn_bias, eps,          bias};
  LayerOfBottleneck expand{"expand_weight",    expand_weight,    expand_running_mean,
                           expand_running_var, expand_bn_weight, expand_bn_bias,
                           expand_eps,         expand_bias};
  LayerOfBottleneck reduce{"next_weight",  next_weight,  next_running_mean, next_running_var,
                           next_bn_weight, next_bn_bias, next_eps,          next_bias};
  const int64_t N = input.size(0), H = input.size(2), W = input.size(3);
  FR_CHECK(input.size(1) == width, kOp, ": input has ", input.size(1), " channels, tile ", tile,
           " is of ", width);
  window.check(input, width);
  FR_CHECK(weight.size(0) == width, kOp, ": weight has shape ", shape_string(weight), ", tile ",
           tile, " is of ", width, " filters");
  expand.check(input, width);
  expand.check_pointwise();
  const int64_t K = expand_weight.size(0);
  FR_CHECK(K > 0 && K % shape.slice == 0 && K <= BottleneckTile::kMostOutputs, kOp,
           ": expand_weight has ", K, " filters, tile ", tile, " must have a multiple of ",
           shape.slice, ", at most ", BottleneckTile::kMostOutputs);
  int64_t next_width = 0;
  if (next_weight) {
    reduce.check(input, K);
    reduce.check_pointwise();
    next_width = next_weight->size(0);
    FR_CHECK(next_width > 0 && next_width % 8 == 0 && next_width <= shape.next, kOp,
             ": next_weight has ", next_width, " filters, tile ", tile,
             " must have a multiple of 8, at most ", shape.next);
  }
  const int64_t R = weight.size(2), S = weight.size(3);
  const int64_t P = FilterAxis(kOp, H, R, stride_h, pad_h, dil_h).outputs;
  const int64_t Q = FilterAxis(kOp, W, S, stride_w, pad_w, dil_w).outputs;
  const Corners h(kOp, "h", R, stride_h, pad_h, dil_h), w(kOp, "w", S, stride_w, pad_w, dil_w);
  const int64_t M = checked_product(kOp, "the output", {N, P, Q});
  FR_CHECK(M <= kMostPixels, kOp, ": the output has ", M, " pixels, must have at most ",
           kMostPixels);
  checked_product(kOp, "the output", {M, K, 8});
  FR_CHECK(checked_product(kOp, "weight", {width, R, S}) < kMostPixels, kOp,
           ": weight is too large");
  check_device(kOp, "shortcut", shortcut, input);
  check_dtype(kOp, "shortcut", shortcut, dtype);
  FR_CHECK(shortcut.size(0) == N && shortcut.size(1) == K && shortcut.size(2) == P &&
               shortcut.size(3) == Q,
           kOp, ": shortcut has shape ", shape_string(shortcut), ", must have the output's, (", N,
           ", ", K, ", ", P, ", ", Q, ")");

  const int device = input.get_device_index();
  const DeviceGuard guard(device);
  check_hopper(kOp, device);
  const auto pixels_of = [&](int64_t channels) {
    return empty({N, channels, P, Q}, {P * Q * channels, 1, Q * channels, channels}, dtype, input);
  };
  const Tensor output = pixels_of(K), next = pixels_of(next_width);
  if (output.numel() == 0) return {output, next};
  input = in_nhwc(input);
  shortcut = in_nhwc(shortcut);
  for (LayerOfBottleneck* layer : {&window, &expand, &reduce}) {
    if (layer->weight) layer->weight = in_nhwc(*layer->weight);
  }

  const device::TensorElement element = dtype == ScalarType::Half
                                            ? device::TensorElement::kFloat16
                                            : device::TensorElement::kBFloat16;
  const auto rows = [&](const Tensor& pixels) {
    return rows_of(pixels.const_data_ptr(), element, 2, pixels.size(1), M, BottleneckTile::kRows);
  };
  const auto filters = [&](const Tensor& layer, int all) {
    return filters_of(layer, element, all / shape.cluster);
  };
  const bool has_next = next_width > 0;
  const HopperBottleneck block{
      .input = windows_of(input, element, h, w, BottleneckTile::kM),
      .weight = filters(*window.weight, shape.width),
      .expand = filters(*expand.weight, shape.slice),
      .reduce = has_next ? filters(*reduce.weight, shape.next) : device::TensorMap{},
      .shortcut = rows(shortcut),
      .output = rows(output),
      .next = has_next ? rows(next) : device::TensorMap{},
      .norm = window.norm(input),
      .expand_norm = expand.norm(input),
      .reduce_norm = has_next ? reduce.norm(input) : BottleneckNorm{},
      .M = static_cast<int>(M),
      .P = static_cast<int>(P),
      .Q = static_cast<int>(Q),
      .K = static_cast<int>(K),
      .R = static_cast<int>(R),
      .S = static_cast<int>(S),
      .next_width = static_cast<int>(next_width),
      .stride_h = static_cast<int>(stride_h),
      .stride_w = static_cast<int>(stride_w),
      .pad_h = static_cast<int>(pad_h),
      .pad_w = static_cast<int>(pad_w),
      .dil_h = static_cast<int>(dil_h),
      .dil_w = static_cast<int>(dil_w),
  };
  const int multiprocessors = multiprocessors_of(device);
  const cudaStream_t stream = current_stream(device);
  if (dtype == ScalarType::Half) {
    launch_hopper_bottleneck<__half>(block, static_cast<int>(tile), multiprocessors, stream);
  } else {
    launch_hopper_bottleneck<__nv_bfloat16>(block, static_cast<int>(tile), multiprocessors, stream);
  }
  return {output, next};
}

// Six numbers for every instance, by index: width, the most channels of what follows, slice,
// stages, cluster, and the bytes of shared memory it takes with the most outputs there may be.
std::vector<int64_t> hopper_bottleneck_tiles() {
  std::vector<int64_t> numbers;
  for (const BottleneckTile& tile : kBottleneckTiles) {
    numbers.insert(numbers.end(), {tile.width, tile.next, tile.slice, tile.stages, tile.cluster,
                                   tile.shared_bytes(BottleneckTile::kMostOutputs)});
  }
  return numbers;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("hopper_bottleneck", TORCH_BOX(&fused_resnet::hopper_bottleneck));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("hopper_bottleneck_tiles", TORCH_BOX(&fused_resnet::hopper_bottleneck_tiles));
}
