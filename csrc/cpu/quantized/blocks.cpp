// The operator quantized_residual_blocks_packed of the CPU backend: residual blocks in eight bits,
// one on the output of the other, as conv.h and `reference.quantized_residual_blocks` have them.
//
// Between blocks and between their convolutions activations are bytes with the halo that their
// reader wants (ByteImages), so that nothing is gathered. Only the ends are floating-point.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/buffer_pool.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"
#include "cpu/isa.h"
#include "cpu/quantized/conv.h"
#include "memory_format.h"

namespace fused_resnet::cpu {
namespace {

constexpr const char* kOp = "quantized_residual_blocks";
constexpr int64_t kNumbers = 11;  // K, C, R, S, stride, padding and dilation, two each, groups

// The kernels that run here, the fastest first.
std::vector<const ByteKernels*> available_kernels() {
  std::vector<const ByteKernels*> kernels;
#if defined(__x86_64__)
  if (has_int8_tiles()) kernels.push_back(&kBytesAmx);
#endif
  if (tile_unit() == TileUnit::emulated) kernels.push_back(&kBytesAmxEmulated);
#if defined(__x86_64__)
  if (has_vnni()) kernels.push_back(&kBytesAvx512Vnni);
  if (cpu_isa() == Isa::avx512) kernels.push_back(&kBytesAvx512);
  if (cpu_isa() >= Isa::avx2) kernels.push_back(&kBytesAvx2);
#endif
  kernels.push_back(&kBytesBaseline);
  if (tile_unit() != TileUnit::emulated) kernels.push_back(&kBytesAmxEmulated);
  return kernels;
}

const ByteKernels& kernels_named(const std::string& name) {
  static const std::vector<const ByteKernels*> available = available_kernels();
  if (name.empty()) return *available[0];
  for (const ByteKernels* kernels : available) {
    if (kernels->name == name) return *kernels;
  }
  FR_CHECK(false, kOp, ": there are no kernels '", name, "' here");
}

std::string quantized_kernels() {
  std::string names;
  for (const ByteKernels* kernels : available_kernels()) {
    if (!names.empty()) names += ',';
    names += kernels->name;
  }
  return names;
}

// ---- weights -----------------------------------------------------------------------------------

ByteFilter make_filter(const char* op, int64_t K, int64_t C, int64_t R, int64_t S,
                       int64_t dilation_w, int64_t groups) {
  for (const int64_t size : {K, C, R, S}) check_number(op, "weight's size", size, 1, 1 << 24);
  check_number(op, "groups", groups, 1, K);
  FR_CHECK(K % groups == 0, op, ": groups is ", groups, ", it must divide weight's ", K,
           " output channels");
  const int64_t reduction = checked_product(op, "weight", {C, R, S, 255, 128});
  FR_CHECK(reduction <= INT32_MAX, op, ": weight has ", C * R * S,
           " values a filter, too many for sums of 32 bits");
  checked_product(op, "weight", {K + kByteBlockK, R, S, C * groups + kByteChunk, 8});
  return {K, C, R, S, groups, groups == 1 && dilation_w == 1};
}

Tensor pack_quantized_conv(Tensor weight, Tensor scale, Tensor shift, int64_t dilation_w,
                           int64_t groups) {
  constexpr const char* op = "pack_quantized_conv";
  check_rank(op, "weight", weight, 4);
  FR_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8");
  const ByteFilter filter = make_filter(op, weight.size(0), weight.size(1), weight.size(2),
                                        weight.size(3), dilation_w, groups);
  const int64_t bytes = filter.packed_bytes();
  void* memory = weight_allocate(static_cast<size_t>(bytes));
  Tensor packed = torch::stable::from_blob(
      memory, {bytes}, {1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Char, weight_release);
  for (const auto& [vector, name] : {std::pair{scale, "scale"}, std::pair{shift, "shift"}}) {
    FR_CHECK(vector.dim() == 1 && vector.size(0) == filter.K &&
                 vector.scalar_type() == ScalarType::Float,
             op, ": ", name, " must be float32 (", filter.K, ",)");
  }
  int8_t* tiles = static_cast<int8_t*>(memory);
  std::memset(memory, 0, static_cast<size_t>(bytes));
  float* vectors = reinterpret_cast<float*>(tiles + filter.vectors());
  int32_t* sums = reinterpret_cast<int32_t*>(vectors + 2 * filter.padded_k());
  const int8_t* source = static_cast<const int8_t*>(weight.const_data_ptr());
  const float* scales = static_cast<const float*>(scale.const_data_ptr());
  const float* shifts = static_cast<const float*>(shift.const_data_ptr());
  const Strides stride = strides_of(weight);
  torch::stable::parallel_for(0, filter.K, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      int32_t sum = 0;
      for (int64_t c = 0; c < filter.C; ++c) {
        for (int64_t r = 0; r < filter.R; ++r) {
          for (int64_t s = 0; s < filter.S; ++s) {
            const int8_t value = source[k * stride.n + c * stride.c + r * stride.h + s * stride.w];
            tiles[filter.place(k, c, r, s)] = value;
            sum += value;
          }
        }
      }
      sums[k] = sum;
      vectors[k] = scales[k * scale.stride(0)];
      vectors[filter.padded_k() + k] = shifts[k * shift.stride(0)];
    }
  });
  return packed;
}

// ---- images ------------------------------------------------------------------------------------

// Images with memory of the pool.
class Images {
 public:
  // `beyond`: bytes that tiles may read behind the last pixel.
  Images(int64_t N, int64_t C, int64_t H, int64_t W, int64_t halo_h, int64_t halo_w, int64_t beyond)
      : view{nullptr, N, C, H, W, halo_h, halo_w} {
    const int64_t pixels = checked_product(
        kOp, "an activation",
        {std::max<int64_t>(1, N), H + 2 * halo_h, W + 2 * halo_w, C + kBytePixel, 4});
    static_cast<void>(pixels);
    memory_ = pool_allocate(static_cast<size_t>(view.pixels() * view.pixel() + beyond));
    view.data = static_cast<uint8_t*>(memory_);
  }
  ~Images() { pool_release(memory_); }
  Images(const Images&) = delete;
  Images& operator=(const Images&) = delete;

  void fill_halo(int value) {
    const size_t pixel = static_cast<size_t>(view.pixel());
    const auto fill = [&](int64_t position, int64_t pixels) {
      std::memset(view.data + position * view.pixel(), value, static_cast<size_t>(pixels) * pixel);
    };
    const int64_t N = view.N, H = view.H, W = view.W;
    if (view.halo_h > 0) {
      for (int64_t n = 0; n <= N; ++n)
        fill(n * view.lines() * view.pitch(), view.halo_h * view.pitch());
    }
    if (view.halo_w > 0) {
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t h = 0; h < H; ++h) fill(view.position(n, h, -view.halo_w), view.halo_w);
      }
      fill(view.pixels() - view.halo_w, view.halo_w);
    }
    static_cast<void>(W);
  }

  ByteImages view;

 private:
  void* memory_;
};

// Some images of a batch.
ByteImages slice(ByteImages images, int64_t begin, int64_t count) {
  images.data += begin * images.lines() * images.pitch() * images.pixel();
  images.N = count;
  return images;
}

struct Layer {
  ByteFilter filter;
  const Tensor* packed;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int64_t H, W, P, Q;

  // What tiles of 16 pixels may read behind the last.
  int64_t beyond() const {
    return (kByteRows + 1) * stride_w * filter.pixel() + filter.chunks() * kByteChunk;
  }
  bool is_pointwise() const {
    return filter.R == 1 && filter.S == 1 && pad_h == 0 && pad_w == 0 && filter.groups == 1;
  }
};

Layer make_layer(const Tensor& packed, const int64_t* n, int64_t channels, int64_t H, int64_t W) {
  Layer layer{make_filter(kOp, n[0], n[1], n[2], n[3], n[9], n[10]),
              &packed,
              n[4],
              n[5],
              n[6],
              n[7],
              n[8],
              n[9],
              H,
              W,
              0,
              0};
  FR_CHECK(layer.filter.C * layer.filter.groups == channels, kOp, ": weight has ", layer.filter.C,
           " input channels a group, input has ", channels, " (groups=", layer.filter.groups, ")");
  FR_CHECK(packed.dim() == 1 && packed.scalar_type() == ScalarType::Char &&
               packed.numel() == layer.filter.packed_bytes() && packed.stride(0) == 1,
           kOp, ": packed has ", packed.numel(), " elements, the weight needs ",
           layer.filter.packed_bytes());
  const auto outputs = [](int64_t size, int64_t taps, int64_t& stride, int64_t pad, int64_t dil) {
    const FilterAxis axis(kOp, size, taps, stride, pad, dil);
    stride = std::min(stride, axis.padded);
    return axis.outputs;
  };
  layer.P = outputs(H, layer.filter.R, layer.stride_h, layer.pad_h, layer.dil_h);
  layer.Q = outputs(W, layer.filter.S, layer.stride_w, layer.pad_w, layer.dil_w);
  return layer;
}

struct Block {
  std::vector<Layer> layers;
  bool has_projection;
  float shortcut_scale;

  int64_t main() const { return static_cast<int64_t>(layers.size()) - (has_projection ? 1 : 0); }
  const Layer& last() const { return layers[static_cast<size_t>(main() - 1)]; }
};

// ---- running -----------------------------------------------------------------------------------

void run_conv(const ByteKernels& kernels, ByteConv conv) {
  const int64_t tiles = conv.tiles(), blocks = conv.filter.blocks();
  int64_t block_bytes = conv.filter.block_bytes();
  if (conv.shortcut == ByteShortcut::projection) block_bytes += conv.projection.block_bytes();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t input_bytes = conv.in.N * conv.in.H * conv.in.W * conv.in.pixel();
  // Whatever is more is what the threads divide.
  int64_t block_tasks = blocks * block_bytes > input_bytes ? std::min(threads, blocks) : 1;
  const int64_t pairs = bytes_div_up(tiles, 2);
  const int64_t tile_tasks = std::min(pairs, bytes_div_up(threads, block_tasks));
  conv.keeps_weight = bytes_div_up(blocks, block_tasks) * block_bytes <= l2_bytes() / 2;
  torch::stable::parallel_for(0, tile_tasks * block_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % tile_tasks, b = i / tile_tasks;
      const ByteTask task = {2 * (pairs * t / tile_tasks),
                             std::min(tiles, 2 * (pairs * (t + 1) / tile_tasks)),
                             blocks * b / block_tasks, blocks * (b + 1) / block_tasks};
      kernels.run(conv, task);
    }
  });
}

ByteConv make_conv(const Layer& layer, const ByteImages& in, const ByteImages& out,
                   int64_t zero_point) {
  ByteConv conv{};
  conv.in = in;
  conv.out = out;
  conv.filter = layer.filter;
  conv.weight = byte_weight(layer.packed->const_data_ptr(), layer.filter, zero_point);
  conv.P = layer.P;
  conv.Q = layer.Q;
  conv.stride_h = layer.stride_h;
  conv.stride_w = layer.stride_w;
  conv.dil_h = layer.dil_h;
  conv.dil_w = layer.dil_w;
  conv.origin = in.position(0, -layer.pad_h, -layer.pad_w);
  return conv;
}

// The pixels that a projection reads, one for each position of the last convolution's input.
void subsample(const ByteImages& from, const Layer& projection, const ByteImages& like,
               uint8_t* to) {
  const int64_t pixel = from.pixel();
  torch::stable::parallel_for(0, from.N * projection.P, 4, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / projection.P, p = line % projection.P;
      uint8_t* target = to + (n * like.lines() + p) * like.pitch() * pixel;
      const uint8_t* source = from.data + from.position(n, p * projection.stride_h, 0) * pixel;
      for (int64_t q = 0; q < projection.Q; ++q) {
        std::memcpy(target + q * pixel, source + q * projection.stride_w * pixel,
                    static_cast<size_t>(pixel));
      }
    }
  });
}

// Images to take through a block together: as many as have their activations in the threads'
// second-level caches, unless its weights are larger than these.
int64_t images_at_once(const Block& block, int64_t N) {
  int64_t weight_bytes = 0;
  const Layer& first = block.layers[0];
  int64_t image_bytes = first.H * first.W * first.filter.C * first.filter.groups;
  for (const Layer& layer : block.layers) {
    weight_bytes += layer.filter.packed_bytes();
    image_bytes += layer.P * layer.Q * layer.filter.K;
  }
  if (weight_bytes > l2_bytes()) return N;
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(threads * l2_bytes() / image_bytes, 1, N);
}

void run_block(const ByteKernels& kernels, const Block& block, const ByteImages& input,
               int64_t zero_point, const ByteImages& output) {
  const int64_t N = input.N, at_once = images_at_once(block, N), main = block.main();
  std::vector<std::unique_ptr<Images>> hidden;
  for (int64_t i = 0; i + 1 < main; ++i) {
    const Layer& layer = block.layers[i];
    const Layer& reader = block.layers[i + 1];
    hidden.push_back(std::make_unique<Images>(at_once, layer.filter.K, layer.P, layer.Q,
                                              reader.pad_h, reader.pad_w, reader.beyond()));
    hidden.back()->fill_halo(0);
  }
  const Layer& last = block.last();
  const Layer* projection = block.has_projection ? &block.layers.back() : nullptr;
  std::unique_ptr<Images> projected;
  for (int64_t n = 0; n < N; n += at_once) {
    const int64_t count = std::min(at_once, N - n);
    const ByteImages image = slice(input, n, count), result = slice(output, n, count);
    ByteImages source = image;
    int64_t source_zero = zero_point;
    for (int64_t i = 0; i + 1 < main; ++i) {
      const ByteImages target = slice(hidden[i]->view, 0, count);
      run_conv(kernels, make_conv(block.layers[i], source, target, source_zero));
      source = target;
      source_zero = 0;
    }
    ByteConv conv = make_conv(last, source, result, source_zero);
    conv.added_zero_point = static_cast<int32_t>(zero_point);
    conv.shortcut_scale = block.shortcut_scale;
    if (projection == nullptr) {
      conv.shortcut = ByteShortcut::bytes;
      conv.added = image;
    } else {
      conv.shortcut = ByteShortcut::projection;
      conv.projection = projection->filter;
      conv.projection_weight =
          byte_weight(projection->packed->const_data_ptr(), projection->filter, zero_point);
      const bool alike = projection->stride_h == 1 && projection->stride_w == 1 &&
                         image.pitch() == source.pitch() && image.lines() == source.lines();
      if (alike) {
        conv.projected = image.data + image.position(0, 0, 0) * image.pixel();
      } else {
        if (projected == nullptr) {
          projected = std::make_unique<Images>(at_once, image.C, source.lines(), source.pitch(), 0,
                                               0, projection->beyond());
        }
        subsample(image, *projection, source, projected->view.data);
        conv.projected = projected->view.data;
      }
    }
    run_conv(kernels, conv);
  }
}

// ---- the ends ----------------------------------------------------------------------------------

ByteFloats float_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ByteFloats::float32;
    case ScalarType::Half:
      return ByteFloats::float16;
    case ScalarType::BFloat16:
      return ByteFloats::bfloat16;
    default:
      FR_CHECK(false, kOp, ": input must be float32, float16 or bfloat16");
  }
}

template <class T>
void gather(const char* source, int64_t stride, int64_t count, void* target) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<T*>(target) + i, source + i * stride * static_cast<int64_t>(sizeof(T)),
                sizeof(T));
  }
}

template <class T>
void scatter(const void* source, int64_t stride, int64_t count, char* target) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(target + i * stride * static_cast<int64_t>(sizeof(T)),
                static_cast<const T*>(source) + i, sizeof(T));
  }
}

void quantize_input(const ByteKernels& kernels, const Tensor& input, float inverse,
                    int64_t zero_point, const ByteImages& to) {
  const ByteFloats type = float_type(input.scalar_type());
  const Strides s = strides_of(input);
  const int64_t item = static_cast<int64_t>(input.element_size()), pixel = to.pixel();
  const char* data = static_cast<const char*>(input.const_data_ptr());
  const int32_t zero = static_cast<int32_t>(zero_point);
  torch::stable::parallel_for(0, to.N * to.H, 4, [&](int64_t begin, int64_t end) {
    std::vector<char> channels(static_cast<size_t>(to.C * item));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / to.H, h = line % to.H;
      const char* source = data + (n * s.n + h * s.h) * item;
      uint8_t* target = to.data + to.position(n, h, 0) * pixel;
      if (s.c == 1 && s.w == to.C && pixel == to.C) {
        kernels.quantize(type, source, to.W * to.C, inverse, zero, target);
        continue;
      }
      for (int64_t w = 0; w < to.W; ++w, source += s.w * item, target += pixel) {
        const void* from = source;
        if (s.c != 1) {
          (item == 4 ? gather<float> : gather<uint16_t>)(source, s.c, to.C, channels.data());
          from = channels.data();
        }
        kernels.quantize(type, from, to.C, inverse, zero, target);
      }
    }
  });
}

void dequantize_output(const ByteKernels& kernels, const ByteImages& from, float step,
                       Tensor& output) {
  const ByteFloats type = float_type(output.scalar_type());
  const Strides s = strides_of(output);
  const int64_t item = static_cast<int64_t>(output.element_size()), pixel = from.pixel();
  char* data = static_cast<char*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, from.N * from.H, 4, [&](int64_t begin, int64_t end) {
    std::vector<char> channels(static_cast<size_t>(from.C * item));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / from.H, h = line % from.H;
      char* target = data + (n * s.n + h * s.h) * item;
      const uint8_t* source = from.data + from.position(n, h, 0) * pixel;
      if (s.c == 1 && s.w == from.C && pixel == from.C) {
        kernels.dequantize(type, source, from.W * from.C, step, target);
        continue;
      }
      for (int64_t w = 0; w < from.W; ++w, source += pixel, target += s.w * item) {
        if (s.c == 1) {
          kernels.dequantize(type, source, from.C, step, target);
          continue;
        }
        kernels.dequantize(type, source, from.C, step, channels.data());
        (item == 4 ? scatter<float> : scatter<uint16_t>)(channels.data(), s.c, from.C, target);
      }
    }
  });
}

std::vector<Block> make_blocks(const Tensor& input, const std::vector<Tensor>& packed,
                               const std::vector<int64_t>& numbers,
                               const std::vector<int64_t>& layer_counts,
                               const std::vector<int64_t>& projections,
                               const std::vector<double>& shortcut_scales) {
  FR_CHECK(!layer_counts.empty() && layer_counts.size() == projections.size() &&
               layer_counts.size() == shortcut_scales.size(),
           kOp, ": ", layer_counts.size(), " layer counts, ", projections.size(), " projections, ",
           shortcut_scales.size(), " shortcut scales");
  FR_CHECK(numbers.size() == packed.size() * kNumbers, kOp, ": ", packed.size(), " weights and ",
           numbers.size(), " numbers");
  std::vector<Block> blocks;
  int64_t C = input.size(1), H = input.size(2), W = input.size(3);
  size_t next = 0;
  for (size_t i = 0; i < layer_counts.size(); ++i) {
    Block block{{}, projections[i] != 0, static_cast<float>(shortcut_scales[i])};
    const int64_t main = layer_counts[i] - (block.has_projection ? 1 : 0);
    FR_CHECK(main >= 1 && layer_counts[i] <= static_cast<int64_t>(packed.size() - next), kOp,
             ": block ", i, " has ", layer_counts[i], " convolutions, ", packed.size() - next,
             " are left");
    int64_t c = C, h = H, w = W;
    for (int64_t j = 0; j < main; ++j, ++next) {
      block.layers.push_back(make_layer(packed[next], &numbers[next * kNumbers], c, h, w));
      const Layer& layer = block.layers.back();
      c = layer.filter.K, h = layer.P, w = layer.Q;
    }
    int64_t shortcut_c = C, shortcut_h = H, shortcut_w = W;
    if (block.has_projection) {
      block.layers.push_back(make_layer(packed[next], &numbers[next * kNumbers], C, H, W));
      const Layer& layer = block.layers.back();
      shortcut_c = layer.filter.K, shortcut_h = layer.P, shortcut_w = layer.Q;
      ++next;
    }
    FR_CHECK(shortcut_c == c && shortcut_h == h && shortcut_w == w, kOp, ": the shortcut is ",
             shortcut_c, " x ", shortcut_h, " x ", shortcut_w,
             ", the last convolution's output is ", c, " x ", h, " x ", w);
    C = c, H = h, W = w;
    blocks.push_back(std::move(block));
  }
  FR_CHECK(next == packed.size(), kOp, ": ", packed.size(), " convolutions, ", next,
           " of them in blocks");
  return blocks;
}

// Blocks on an input of one size, their weights packed.
class ByteBlocks : public PlanStep {
 public:
  ByteBlocks(const Tensor& input, std::vector<Tensor> packed, const std::vector<int64_t>& numbers,
             const std::vector<int64_t>& layer_counts, const std::vector<int64_t>& projections,
             const std::vector<double>& shortcut_scales, double step, int64_t zero_point,
             double output_step, const std::string& kernels_name)
      : packed_(std::move(packed)),
        kernels_(kernels_named(kernels_name)),
        blocks_(make_blocks(input, packed_, numbers, layer_counts, projections, shortcut_scales)),
        step_(step),
        zero_point_(zero_point),
        output_step_(output_step) {}

  // Whether no projection is more than a 1x1, and no last convolution beside one is strided.
  bool are_covered() const {
    for (const Block& block : blocks_) {
      if (!block.has_projection) continue;
      const Layer& last = block.last();
      if (!block.layers.back().is_pointwise() || last.stride_h != 1 || last.stride_w != 1) {
        return false;
      }
    }
    return true;
  }

  Tensor run(const Tensor& input) const override {
    const Layer& end = blocks_.back().last();
    const int64_t N = input.size(0);
    Tensor output = empty_activation(N, end.filter.K, end.P, end.Q, input.scalar_type(),
                                     is_channels_last(input));
    if (N == 0) return output;

    // What a block reads: its first convolution, with its padding, and its shortcut.
    const auto images_for = [&](const Block& reader) {
      const Layer& first = reader.layers[0];
      const int64_t beyond = std::max(first.beyond(), reader.layers.back().beyond());
      return std::make_unique<Images>(N, first.filter.C * first.filter.groups, first.H, first.W,
                                      first.pad_h, first.pad_w, beyond);
    };
    std::unique_ptr<Images> current = images_for(blocks_[0]);
    current->fill_halo(static_cast<int>(zero_point_));
    quantize_input(kernels_, input, static_cast<float>(1 / step_), zero_point_, current->view);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const Layer& last = blocks_[i].last();
      std::unique_ptr<Images> next =
          i + 1 < blocks_.size()
              ? images_for(blocks_[i + 1])
              : std::make_unique<Images>(N, last.filter.K, last.P, last.Q, 0, 0, 0);
      next->fill_halo(0);
      run_block(kernels_, blocks_[i], current->view, i == 0 ? zero_point_ : 0, next->view);
      current = std::move(next);
    }
    dequantize_output(kernels_, current->view, static_cast<float>(output_step_), output);
    return output;
  }

 private:
  const std::vector<Tensor> packed_;
  const ByteKernels& kernels_;
  const std::vector<Block> blocks_;
  const double step_;
  const int64_t zero_point_;
  const double output_step_;
};

// The blocks; nothing where they are not covered. `numbers` holds for every convolution K, C, R, S,
// stride, padding, dilation and groups.
std::optional<Tensor> quantized_residual_blocks_packed(
    Tensor input, std::vector<Tensor> packed, std::vector<int64_t> numbers,
    std::vector<int64_t> layer_counts, std::vector<int64_t> projections,
    std::vector<double> shortcut_scales, double step, int64_t zero_point, double output_step,
    std::string kernels_name) {
  check_rank(kOp, "input", input, 4);
  check_number(kOp, "zero_point", zero_point, 0, 255);
  for (const double value : {step, output_step}) {
    FR_CHECK(std::isfinite(value) && value > 0, kOp, ": a step is ", value,
             ", must be finite and above zero");
  }
  float_type(input.scalar_type());
  auto blocks =
      std::make_unique<ByteBlocks>(input, std::move(packed), numbers, layer_counts, projections,
                                   shortcut_scales, step, zero_point, output_step, kernels_name);
  if (!blocks->are_covered()) return std::nullopt;
  Tensor output = blocks->run(input);
  if (PlanRecording* recording = plan_recording()) {
    recording->add(input, output, std::move(blocks));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("pack_quantized_conv", TORCH_BOX(&pack_quantized_conv));
  m.impl("quantized_residual_blocks_packed", TORCH_BOX(&quantized_residual_blocks_packed));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("quantized_kernels", TORCH_BOX(&quantized_kernels));
}

}  // namespace fused_resnet::cpu
