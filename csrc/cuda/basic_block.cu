// The operator basic_block_tiled: what basic_block.cuh computes, on tensors. With channels_last
// tensors it allocates the output, launches once and converts nothing; others are copied first.
#include "cuda/basic_block.cuh"

#include <limits>
#include <optional>
#include <vector>

#include "cuda/library.h"
#include "cuda/tensors.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // CUDA's limit of gridDim.x

Tensor filters_of(Tensor weight, const Tensor& input) {
  constexpr int64_t C = BasicBlockTile::kChannels;
  FR_CHECK(weight.dim() == 4 && weight.size(0) == C && weight.size(1) == C && weight.size(2) == 3 &&
               weight.size(3) == 3 && weight.scalar_type() == input.scalar_type(),
           "basic_block: weights must be (", C, ", ", C, ", 3, 3), of the input's dtype");
  check_device("basic_block", "weight", weight, input);
  return is_aligned(weight) && is_dense_channels_last(weight) ? weight : aligned_copy(weight);
}

Tensor basic_block_tiled(Tensor input, Tensor weight1, Tensor running_mean1, Tensor running_var1,
                         std::optional<Tensor> bn_weight1, std::optional<Tensor> bn_bias1,
                         double eps1, std::optional<Tensor> bias1, Tensor weight2,
                         Tensor running_mean2, Tensor running_var2,
                         std::optional<Tensor> bn_weight2, std::optional<Tensor> bn_bias2,
                         double eps2, std::optional<Tensor> bias2, int64_t tile) {
  const ScalarType dtype = input.scalar_type();
  constexpr int64_t C = BasicBlockTile::kChannels;
  FR_CHECK(input.dim() == 4 && input.size(1) == C, "basic_block: input must be (N, ", C, ", H, W)");
  FR_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
           "basic_block: input must be float16 or bfloat16");
  FR_CHECK(tile >= 0 && tile < kBasicBlockTileCount, "basic_block: tile is ", tile,
           ", must be at least 0 and below ", kBasicBlockTileCount);
  const int64_t N = input.size(0), H = input.size(2), W = input.size(3);
  check_number("basic_block", "input's height", H, 0);
  check_number("basic_block", "input's width", W, 0);
  const BasicBlockTile& shape = kBasicBlockTiles[tile];
  const int64_t tiles_h = (H + shape.rows - 1) / shape.rows;
  const int64_t tiles_w = (W + shape.kColumns - 1) / shape.kColumns;
  FR_CHECK(tiles_h * tiles_w <= kMostBlocks &&
               checked_product("basic_block", "input", {N, tiles_h, tiles_w}) <= kMostBlocks,
           "basic_block: the input takes more than ", kMostBlocks, " tiles");
  weight1 = filters_of(weight1, input);
  weight2 = filters_of(weight2, input);

  const DeviceGuard guard(input.get_device_index());
  Tensor output = empty({N, C, H, W}, {H * W * C, 1, W * C, C}, dtype, input);
  if (output.numel() == 0) return output;
  if (!has_aligned_pixels(input, 16 / 2)) input = aligned_copy(input);

  std::optional<Tensor> mean1 = running_mean1, var1 = running_var1;
  std::optional<Tensor> mean2 = running_mean2, var2 = running_var2;
  const auto layer_of = [&](const Tensor& weight, std::optional<Tensor>& mean,
                            std::optional<Tensor>& var, std::optional<Tensor>& bn_weight,
                            std::optional<Tensor>& bn_bias, std::optional<Tensor>& bias,
                            double eps) {
    check_eps("basic_block", eps);
    return BasicBlockLayer{
        .weight = weight.const_data_ptr(),
        .running_mean = parameter_of("running_mean", mean, C, input),
        .running_var = parameter_of("running_var", var, C, input),
        .bn_weight = parameter_of("bn_weight", bn_weight, C, input),
        .bn_bias = parameter_of("bn_bias", bn_bias, C, input),
        .bias = parameter_of("bias", bias, C, input),
        .eps = static_cast<float>(eps),
    };
  };
  const BasicBlock block{
      .input = input.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .layers = {layer_of(weight1, mean1, var1, bn_weight1, bn_bias1, bias1, eps1),
                 layer_of(weight2, mean2, var2, bn_weight2, bn_bias2, bias2, eps2)},
      .H = static_cast<int>(H),
      .W = static_cast<int>(W),
      .tiles_h = static_cast<int>(tiles_h),
      .tiles_w = static_cast<int>(tiles_w),
      .input_n = input.stride(0),
      .input_h = input.stride(2),
      .input_w = input.stride(3),
  };
  const cudaStream_t stream = current_stream(input.get_device_index());
  if (dtype == ScalarType::Half) {
    launch_basic_block<__half>(block, N, static_cast<int>(tile), stream);
  } else {
    launch_basic_block<__nv_bfloat16>(block, N, static_cast<int>(tile), stream);
  }
  return output;
}

// Four numbers for every instance, by index: rows, columns, warps, stages.
std::vector<int64_t> basic_block_tiles() {
  std::vector<int64_t> numbers;
  for (const BasicBlockTile& tile : kBasicBlockTiles) {
    numbers.insert(numbers.end(), {tile.rows, tile.kColumns, tile.warps, tile.stages});
  }
  return numbers;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("basic_block_tiled", TORCH_BOX(&fused_resnet::basic_block_tiled));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("basic_block_tiles", TORCH_BOX(&fused_resnet::basic_block_tiles));
}
