// The operators byte_blocks and byte_stem: residual blocks and a network's first convolution in
// eight bits, on tensors, by the kernels of byte_conv.cuh. A launch for the input, one for each
// convolution but projections, which run beside their block's last, and one for a stem's pool.
#include "cuda/byte_conv.cuh"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cuda/library.h"
#include "cuda/tensors.h"
#include "memory_format.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 16);  // tiles may reach beyond the last
constexpr int64_t kMostGroups = 65535;                           // CUDA's limit of gridDim.y
constexpr int64_t kMostProducts = INT32_MAX / (255 * 128);       // whose sum 32 bits hold
constexpr int kElementwiseThreads = 256;
constexpr unsigned kMostBlocks = 1 << 20;

constexpr size_t kTensors = 4;  // of a convolution: weight, the sums of its filters, scale, shift
constexpr size_t kNumbers = 11;

// A convolution as it was handed over, on an input of one size.
struct ByteLayer {
  const Tensor* weight;
  const Tensor* filter_sums;
  const Tensor* scale;
  const Tensor* shift;
  int64_t K, group_c, R, S, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int64_t C, H, W, P, Q;

  int64_t row_bytes() const { return (R * S * group_c + 15) / 16 * 16; }
  // Bytes that lie in one tap's channels, whichever group they are of.
  int piece() const { return group_c % 16 == 0 ? 16 : group_c % 4 == 0 ? 4 : 1; }
};

ByteLayer layer_of(const char* op, const Tensor& input, const Tensor* tensors,
                   const int64_t* numbers, int64_t C, int64_t H, int64_t W) {
  ByteLayer layer{tensors,    tensors + 1, tensors + 2, tensors + 3, numbers[0],
                  numbers[1], numbers[2],  numbers[3],  numbers[4],  numbers[5],
                  numbers[6], numbers[7],  numbers[8],  numbers[9],  numbers[10],
                  C,          H,           W,           0,           0};
  check_number(op, "groups", layer.groups, 1, kMostGroups);
  check_number(op, "filters", layer.K, 1);
  check_number(op, "channels of a filter", layer.group_c, 1);
  layer.P = FilterAxis(op, H, layer.R, layer.stride_h, layer.pad_h, layer.dil_h).outputs;
  layer.Q = FilterAxis(op, W, layer.S, layer.stride_w, layer.pad_w, layer.dil_w).outputs;
  FR_CHECK(layer.K % layer.groups == 0 && layer.group_c * layer.groups == C, op, ": a weight has ",
           layer.group_c, " channels and ", layer.K, " filters, its input has ", C,
           " channels (groups=", layer.groups, ")");
  FR_CHECK(checked_product(op, "a filter", {layer.R, layer.S, layer.group_c}) <= kMostProducts, op,
           ": a filter has more than ", kMostProducts, " values");
  // Of windows, as far as padding goes: what the kernel computes with in 32 bits.
  FR_CHECK(
      H + 2 * layer.pad_h < kMostPixels && W + 2 * layer.pad_w < kMostPixels && C < kMostPixels, op,
      ": a size is over ", kMostPixels);
  FR_CHECK(checked_product(op, "an output", {input.size(0), layer.P, layer.Q}) <= kMostPixels, op,
           ": an output has more than ", kMostPixels, " pixels");
  checked_product(op, "an output", {input.size(0), layer.P, layer.Q, layer.K, 8});
  const Tensor& weight = *layer.weight;
  FR_CHECK(weight.dim() == 2 && weight.size(0) == layer.K && weight.size(1) == layer.row_bytes() &&
               weight.is_contiguous() && is_aligned(weight),
           op, ": a packed weight has shape ", shape_string(weight), ", must have (", layer.K, ", ",
           layer.row_bytes(), ")");
  check_dtype(op, "a packed weight", weight, ScalarType::Char);
  check_vector(op, "the sums of filters", *layer.filter_sums, layer.K, ScalarType::Int);
  check_vector(op, "scale", *layer.scale, layer.K, ScalarType::Float);
  check_vector(op, "shift", *layer.shift, layer.K, ScalarType::Float);
  for (const Tensor* tensor : {layer.weight, layer.filter_sums, layer.scale, layer.shift}) {
    check_device(op, "a parameter", *tensor, input);
  }
  return layer;
}

// Bytes (N, H, W, C) on the device, and the bytes that stand for what is outside of them.
struct ByteImages {
  Tensor values;
  const uint8_t* outside;
  int64_t C, H, W;
  int zero_point;

  const uint8_t* data() const { return static_cast<const uint8_t*>(values.const_data_ptr()); }
};

Tensor bytes_of(int64_t count, const Tensor& like) {
  return empty({count}, {1}, ScalarType::Byte, like);
}

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kElementwiseThreads - 1) / kElementwiseThreads;
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMostBlocks));
}

template <typename F>
auto for_type(ScalarType dtype, const F& run) {
  switch (dtype) {
    case ScalarType::Half:
      return run(__half{});
    case ScalarType::BFloat16:
      return run(__nv_bfloat16{});
    default:
      return run(float{});
  }
}

// The input in bytes, pixels of C, or of pixel_bytes where that is more. Behind its values lie what
// is outside of it, 16 bytes, and zeros, what is outside of later activations.
ByteImages store(const Tensor& input, double step, int64_t zero_point, bool words,
                 int64_t pixel_bytes, cudaStream_t stream) {
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  const int64_t pixels = N * H * W, count = (pixels * pixel_bytes + 15) / 16 * 16;
  Tensor values = bytes_of(count + 32, input);
  uint8_t* const data = static_cast<uint8_t*>(values.mutable_data_ptr());
  StoredInput stored{
      .input = input.const_data_ptr(),
      .output = data,
      .outside = data + count,
      .inverse = static_cast<float>(1 / step),
      .zero_point = static_cast<int>(zero_point),
      .pixels = pixels,
      .C = static_cast<int>(C),
      .H = static_cast<int>(H),
      .W = static_cast<int>(W),
      .pixel_bytes = static_cast<int>(pixel_bytes),
      .stride_n = input.stride(0),
      .stride_c = input.stride(1),
      .stride_h = input.stride(2),
      .stride_w = input.stride(3),
      .channels_fastest = input.stride(1) <= input.stride(3),
  };
  for_type(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kChunk = 16 / sizeof(T);
    const bool whole = has_aligned_pixels(input, kChunk) && C % kChunk == 0 && C > 1 &&
                       pixel_bytes == C * (words ? 2 : 1);
    stored.channels_fastest |= whole;
    const int64_t channels = pixel_bytes / (words ? 2 : 1), width = whole ? kChunk : 4;
    const device::Grid grid{blocks_for(pixels * ((channels + width - 1) / width)),
                            kElementwiseThreads, 0, stream};
    if (words) {
      device::launch(store_bytes<T, true, false>, grid, stored);
    } else if (whole) {
      device::launch(store_bytes<T, false, true>, grid, stored);
    } else {
      device::launch(store_bytes<T, false, false>, grid, stored);
    }
  });
  return {values, data + count, pixel_bytes, H, W, static_cast<int>(zero_point)};
}

ByteOperand operand_of(const ByteLayer& layer, const ByteImages& input) {
  return {
      .input = input.data(),
      .outside = input.outside,
      .weight = static_cast<const int8_t*>(layer.weight->const_data_ptr()),
      .filter_sums = static_cast<const int*>(layer.filter_sums->const_data_ptr()),
      .scale = static_cast<const float*>(layer.scale->const_data_ptr()),
      .zero_point = input.zero_point,
      .H = static_cast<int>(layer.H),
      .W = static_cast<int>(layer.W),
      .C = static_cast<int>(layer.C),
      .R = static_cast<int>(layer.R),
      .S = static_cast<int>(layer.S),
      .group_c = static_cast<int>(layer.group_c),
      .row_bytes = static_cast<int>(layer.row_bytes()),
      .stride_h = static_cast<int>(layer.stride_h),
      .stride_w = static_cast<int>(layer.stride_w),
      .pad_h = static_cast<int>(layer.pad_h),
      .pad_w = static_cast<int>(layer.pad_w),
      .dil_h = static_cast<int>(layer.dil_h),
      .dil_w = static_cast<int>(layer.dil_w),
  };
}

int64_t blocks_of(const ByteTile& tile, int64_t M, int64_t group_k, int64_t groups) {
  return (M + tile.m - 1) / tile.m * ((group_k + tile.n - 1) / tile.n) * groups;
}

// The first instance that keeps every multiprocessor busy, of those with the least filters that
// nobody asked for; where none does, the one with the most blocks. `wanted` where that can run.
int tile_for(const ByteConv& conv, int piece, bool projects, int groups, int wanted) {
  const auto runs = [&](int index) {
    return kByteTiles[index].piece == piece && (!projects || kByteTiles[index].projects);
  };
  if (wanted >= 0 && runs(wanted)) return wanted;
  int processors = 0;
  STD_CUDA_CHECK(cudaGetDevice(&processors));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, processors));
  const auto padded = [&](int index) {
    const int n = kByteTiles[index].n;
    return (conv.group_k + n - 1) / n * n;
  };
  int least = INT32_MAX;
  for (int i = 0; i < kByteTileCount; ++i) {
    if (runs(i)) least = std::min(least, padded(i));
  }
  int chosen = -1;
  for (int i = 0; i < kByteTileCount; ++i) {
    // Of filters that fill no tile, an eighth more is computed for nothing before one is too wide.
    if (!runs(i) || padded(i) > least + least / 8) continue;
    chosen = i;
    if (blocks_of(kByteTiles[i], conv.M, conv.group_k, groups) >= processors) break;
  }
  return chosen;
}

template <int kIndex, bool kProjects>
void launch_instance(const ByteConv& conv, int groups, cudaStream_t stream) {
  constexpr ByteTile kTile = kByteTiles[kIndex];
  const unsigned rows = (conv.M + kTile.m - 1) / kTile.m;
  const unsigned columns = (conv.group_k + kTile.n - 1) / kTile.n;
  const device::Grid grid{dim3(rows * columns, groups), kTile.threads(), kTile.shared_bytes(),
                          stream};
  device::launch(byte_conv<kIndex, kProjects>, grid, conv);
}

void launch(const ByteConv& conv, int index, bool projects, int groups, cudaStream_t stream) {
  const auto launch_at = [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    const auto launch_one = [&]<int kIndex>(std::integral_constant<int, kIndex>) {
      if (!projects) return launch_instance<kIndex, false>(conv, groups, stream);
      if constexpr (kByteTiles[kIndex].projects) {
        launch_instance<kIndex, true>(conv, groups, stream);
      }
    };
    ((kIndices == index ? launch_one(std::integral_constant<int, kIndices>{}) : void()), ...);
  };
  launch_at(std::make_integer_sequence<int, kByteTileCount>{});
}

// What is done with the output of a convolution.
struct End {
  void* output;
  ByteOutput type;
  double step;
};

ByteOutput output_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return ByteOutput::kFloat16;
    case ScalarType::BFloat16:
      return ByteOutput::kBFloat16;
    default:
      return ByteOutput::kFloat32;
  }
}

// What a convolution's output has added to it: bytes of a block's input, or a projection of these.
struct Shortcut {
  const ByteImages* images;
  const ByteLayer* projection;
  double scale;
};

void convolve(const ByteLayer& layer, const ByteImages& input, int64_t N,
              const std::optional<Shortcut>& shortcut, const End& end, int wanted,
              cudaStream_t stream) {
  ByteConv conv{
      .main = operand_of(layer, input),
      .projection = {},
      .shift = static_cast<const float*>(layer.shift->const_data_ptr()),
      .shortcut = nullptr,
      .shortcut_scale = 0,
      .shortcut_zero_point = 0,
      .output = end.output,
      .type = end.type,
      .output_step = static_cast<float>(end.step),
      .M = static_cast<int>(N * layer.P * layer.Q),
      .P = static_cast<int>(layer.P),
      .Q = static_cast<int>(layer.Q),
      .K = static_cast<int>(layer.K),
      .group_k = static_cast<int>(layer.K / layer.groups),
      .vector_output = layer.K / layer.groups % 16 == 0,
  };
  int piece = layer.piece();
  const bool projects = shortcut && shortcut->projection != nullptr;
  if (projects) {
    conv.projection = operand_of(*shortcut->projection, *shortcut->images);
    piece = std::min(piece, shortcut->projection->piece());
  } else if (shortcut) {
    conv.shortcut = shortcut->images->data();
    conv.shortcut_scale = static_cast<float>(shortcut->scale);
    conv.shortcut_zero_point = shortcut->images->zero_point;
  }
  const int groups = static_cast<int>(layer.groups);
  launch(conv, tile_for(conv, piece, projects, groups, wanted), projects, groups, stream);
}

// A block of the operator's arguments.
struct Block {
  std::vector<ByteLayer> layers;  // the last of them the projection, where there is one
  bool has_projection;
  double shortcut_scale;

  size_t main() const { return layers.size() - has_projection; }
};

void check_quantization(const char* op, double step, int64_t zero_point, double output_step) {
  check_number(op, "zero_point", zero_point, 0, 255);
  for (const double value : {step, output_step}) {
    FR_CHECK(std::isfinite(value) && value > 0, op, ": a step is ", value,
             ", must be finite and above zero");
  }
}

Tensor byte_blocks(Tensor input, std::vector<Tensor> tensors, std::vector<int64_t> numbers,
                   std::vector<int64_t> layer_counts, std::vector<int64_t> projections,
                   std::vector<double> shortcut_scales, double step, int64_t zero_point,
                   double output_step, int64_t tile) {
  constexpr const char* op = "byte_blocks";
  check_rank(op, "input", input, 4);
  check_floating(op, "input", input, false);
  check_quantization(op, step, zero_point, output_step);
  check_number(op, "tile", tile, -1, kByteTileCount - 1);
  const size_t count = tensors.size() / kTensors;
  FR_CHECK(tensors.size() == count * kTensors && numbers.size() == count * kNumbers, op, ": ",
           tensors.size(), " tensors and ", numbers.size(), " numbers");
  FR_CHECK(!layer_counts.empty() && layer_counts.size() == projections.size() &&
               layer_counts.size() == shortcut_scales.size(),
           op, ": ", layer_counts.size(), " layer counts, ", projections.size(), " projections, ",
           shortcut_scales.size(), " shortcut scales");
  const int64_t N = input.size(0);
  checked_product(op, "input", {N, input.size(1), input.size(2), input.size(3), 4});
  FR_CHECK(checked_product(op, "input", {N, input.size(2), input.size(3)}) <= kMostPixels, op,
           ": input has more than ", kMostPixels, " pixels");
  std::vector<Block> blocks;
  int64_t C = input.size(1), H = input.size(2), W = input.size(3);
  size_t next = 0;
  for (size_t i = 0; i < layer_counts.size(); ++i) {
    Block block{{}, projections[i] != 0, shortcut_scales[i]};
    FR_CHECK(layer_counts[i] >= 1 + block.has_projection &&
                 layer_counts[i] <= static_cast<int64_t>(count - next),
             op, ": block ", i, " has ", layer_counts[i], " convolutions, ", count - next,
             " are left");
    int64_t c = C, h = H, w = W;
    for (int64_t j = 0; j < layer_counts[i]; ++j, ++next) {
      const bool projects = block.has_projection && j + 1 == layer_counts[i];
      block.layers.push_back(layer_of(op, input, &tensors[next * kTensors],
                                      &numbers[next * kNumbers], projects ? C : c, projects ? H : h,
                                      projects ? W : w));
      if (!projects)
        c = block.layers.back().K, h = block.layers.back().P, w = block.layers.back().Q;
    }
    const ByteLayer& last = block.layers.back();
    FR_CHECK(block.has_projection ? last.K == c && last.P == h && last.Q == w
                                  : C == c && H == h && W == w,
             op, ": the shortcut of block ", i, " is not of its output's size, ", c, " x ", h,
             " x ", w);
    // Of a projection in other groups, a block of threads would have filters of several.
    FR_CHECK(!block.has_projection || last.groups == block.layers[block.main() - 1].groups, op,
             ": the projection of block ", i, " has other groups than its last convolution");
    C = c, H = h, W = w;
    blocks.push_back(std::move(block));
  }
  FR_CHECK(next == count, op, ": ", count, " convolutions, ", next, " of them in blocks");

  const DeviceGuard guard(input.get_device_index());
  const bool channels_last = is_channels_last(input);
  Tensor output = empty({N, C, H, W}, {H * W * C, 1, W * C, C}, input.scalar_type(), input);
  if (output.numel() == 0) return in_format(output, channels_last);
  const cudaStream_t stream = current_stream(input.get_device_index());
  const int wanted = static_cast<int>(tile);
  ByteImages images = store(input, step, zero_point, false, input.size(1), stream);
  const Tensor first = images.values;  // holds what is outside of all
  const uint8_t* const zeros = images.outside + 16;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    ByteImages values = images;
    for (size_t j = 0; j < block.main(); ++j) {
      const ByteLayer& layer = block.layers[j];
      std::optional<Shortcut> shortcut;
      if (j + 1 == block.main()) {
        shortcut = {&images, block.has_projection ? &block.layers.back() : nullptr,
                    block.shortcut_scale};
      }
      if (shortcut && i + 1 == blocks.size()) {
        const End end{output.mutable_data_ptr(), output_type(input.scalar_type()), output_step};
        convolve(layer, values, N, shortcut, end, wanted, stream);
        break;
      }
      Tensor made = bytes_of(N * layer.P * layer.Q * layer.K, input);
      const End end{made.mutable_data_ptr(), ByteOutput::kBytes, 1};
      convolve(layer, values, N, shortcut, end, wanted, stream);
      values = {made, zeros, layer.K, layer.P, layer.Q, 0};
    }
    images = values;
  }
  return in_format(output, channels_last);
}

// A stem's `low` convolution is the second half of `tensors`, in sixteen bits.
Tensor byte_stem(Tensor input, std::vector<Tensor> tensors, std::vector<int64_t> numbers,
                 std::vector<int64_t> pool, double step, int64_t zero_point, double output_step,
                 int64_t tile) {
  constexpr const char* op = "byte_stem";
  check_rank(op, "input", input, 4);
  check_floating(op, "input", input, false);
  check_quantization(op, step, zero_point, output_step);
  check_number(op, "tile", tile, -1, kByteTileCount - 1);
  const bool words = tensors.size() == 2 * kTensors;
  FR_CHECK((words || tensors.size() == kTensors) && numbers.size() == kNumbers && pool.size() == 6,
           op, ": ", tensors.size(), " tensors, ", numbers.size(), " numbers, ", pool.size(),
           " numbers of the pool");
  FR_CHECK(!words || zero_point == 128, op, ": zero_point is ", zero_point,
           ", must be 128 in sixteen bits");
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  checked_product(op, "input", {N, C, H, W, 8});
  FR_CHECK(checked_product(op, "input", {N, H, W}) <= kMostPixels && C <= kMostProducts, op,
           ": input has more than ", kMostPixels, " pixels or ", kMostProducts, " channels");
  // Whole pieces of four bytes a pixel, the weight having zeros for what is no channel's.
  const int64_t pixel_bytes = ((words ? 2 : 1) * C + 3) / 4 * 4;
  const ByteLayer main = layer_of(op, input, &tensors[0], &numbers[0], pixel_bytes, H, W);
  FR_CHECK(main.groups == 1, op, ": groups is ", main.groups, ", must be 1");
  std::optional<ByteLayer> low;
  if (words) low = layer_of(op, input, &tensors[kTensors], &numbers[0], pixel_bytes, H, W);
  for (const int i : {4, 5}) {
    FR_CHECK(0 <= pool[i] && pool[i] <= pool[i - 4] / 2, op, ": the pool's padding is ", pool[i],
             ", must be at most half its window of ", pool[i - 4]);
  }
  const FilterAxis down(op, main.P, pool[0], pool[2], pool[4], 1);
  const FilterAxis across(op, main.Q, pool[1], pool[3], pool[5], 1);
  const int64_t P = down.outputs, Q = across.outputs, K = main.K;

  const DeviceGuard guard(input.get_device_index());
  const bool channels_last = is_channels_last(input);
  Tensor output = empty({N, K, P, Q}, {P * Q * K, 1, Q * K, K}, input.scalar_type(), input);
  if (output.numel() == 0) return in_format(output, channels_last);
  const cudaStream_t stream = current_stream(input.get_device_index());
  const ByteImages images = store(input, step, zero_point, words, pixel_bytes, stream);
  const bool pools = pool != std::vector<int64_t>{1, 1, 1, 1, 0, 0};
  std::optional<Shortcut> shortcut;
  if (low) shortcut = {&images, &*low, 0};
  if (!pools) {
    const End end{output.mutable_data_ptr(), output_type(input.scalar_type()), output_step};
    convolve(main, images, N, shortcut, end, static_cast<int>(tile), stream);
    return in_format(output, channels_last);
  }
  Tensor made = bytes_of(N * main.P * main.Q * K, input);
  const End end{made.mutable_data_ptr(), ByteOutput::kBytes, 1};
  convolve(main, images, N, shortcut, end, static_cast<int>(tile), stream);
  const BytePool windows{
      .input = static_cast<const uint8_t*>(made.const_data_ptr()),
      .output = output.mutable_data_ptr(),
      .step = static_cast<float>(output_step),
      .pixels = N * P * Q,
      .H = static_cast<int>(main.P),
      .W = static_cast<int>(main.Q),
      .K = static_cast<int>(K),
      .P = static_cast<int>(P),
      .Q = static_cast<int>(Q),
      .R = static_cast<int>(pool[0]),
      .S = static_cast<int>(pool[1]),
      .stride_h = static_cast<int>(pool[2]),
      .stride_w = static_cast<int>(pool[3]),
      .pad_h = static_cast<int>(pool[4]),
      .pad_w = static_cast<int>(pool[5]),
  };
  for_type(input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int kChannels = 16 / sizeof(T);
    const bool whole = K % kChannels == 0;
    const device::Grid grid{blocks_for(N * P * Q * (whole ? K / kChannels : K)),
                            kElementwiseThreads, 0, stream};
    device::launch(whole ? pool_bytes<T, kChannels> : pool_bytes<T, 1>, grid, windows);
  });
  return in_format(output, channels_last);
}

// Seven numbers for every instance, by index: piece, m, n, depth, warps, stages, and whether it
// projects.
std::vector<int64_t> byte_conv_tiles() {
  std::vector<int64_t> numbers;
  for (const ByteTile& tile : kByteTiles) {
    numbers.insert(numbers.end(), {tile.piece, tile.m, tile.n, tile.depth,
                                   tile.warps_m * tile.warps_n, tile.stages, tile.projects});
  }
  return numbers;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("byte_blocks", TORCH_BOX(&fused_resnet::byte_blocks));
  m.impl("byte_stem", TORCH_BOX(&fused_resnet::byte_stem));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("byte_conv_tiles", TORCH_BOX(&fused_resnet::byte_conv_tiles));
}
