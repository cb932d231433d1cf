// The operator residual_blocks_packed of the CPU backend: BasicBlocks or Bottlenecks, each on the
// output of the one before. A block is
//
//   h[0] = input,  h[i] = relu(bn_i(conv_i(h[i-1])))  for all convolutions but the last,
//   out  = relu(bn(conv(h)) + shortcut),  shortcut = input, or bn(conv(input)) for a projection,
//
// or every step-th pixel of the input, its channels between channels of zeros.
//
// One call instead of three or four a block; and where a block's weights fit the second-level
// cache, its convolutions run one after the other on as few images as keep h in that cache too, so
// that of the activations only input and output pass through memory. A projection is written to the
// output's memory, and the last convolution adds it from there, element by element before it
// overwrites it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/buffer_pool.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"

namespace fused_resnet::cpu {
namespace {

constexpr size_t kTensorsPerLayer = 7, kNumbersPerLayer = 7;

// A tensor without elements stands for one that is absent.
std::optional<Tensor> present(const Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : std::optional<Tensor>(tensor);
}

std::vector<ConvLayer> make_layers(const std::vector<Tensor>& tensors,
                                   const std::vector<int64_t>& numbers,
                                   const std::vector<double>& eps) {
  const size_t count = eps.size();
  FR_CHECK(tensors.size() == count * kTensorsPerLayer && numbers.size() == count * kNumbersPerLayer,
           "residual_blocks: ", tensors.size(), " tensors and ", numbers.size(), " numbers for ",
           count, " convolutions");
  std::vector<ConvLayer> layers;
  layers.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor* t = &tensors[i * kTensorsPerLayer];
    const int64_t* n = &numbers[i * kNumbersPerLayer];
    layers.push_back({t[0], t[1], t[2], t[3], present(t[4]), present(t[5]), present(t[6]), eps[i],
                      n[0], n[1], n[2], n[3], n[4], n[5], n[6]});
  }
  return layers;
}

// Memory of the pool for the time of a call.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(pool_allocate(static_cast<size_t>(bytes))) {}
  ~Buffer() { pool_release(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

int64_t activation_bytes(const Conv& conv, int64_t item) {
  return conv.K * conv.P * conv.Q * item;
}

// Images to take through all convolutions together: as many as have their input and inner
// activations in the threads' second-level caches, and at least one. Where the weights are much
// larger than those caches they are what should be read once, and all images go together.
int64_t images_at_once(const Conv& first, const std::vector<PreparedLayer>& layers, int64_t inner,
                       int64_t item) {
  int64_t weight_bytes = 0, image_bytes = first.C * first.H * first.W * item;
  for (const PreparedLayer& layer : layers) {
    weight_bytes += reduction(layer.conv) * layer.conv.K * layer.conv.isa->item;
  }
  for (int64_t i = 0; i < inner; ++i) image_bytes += activation_bytes(layers[i].conv, item);
  if (weight_bytes > 4 * l2_bytes()) return first.N;
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(threads * l2_bytes() / std::max<int64_t>(image_bytes, 1), 1, first.N);
}

// The weight a layer reads first, for the one before it to bring into the cache.
struct NextWeight {
  const void* data = nullptr;
  int64_t bytes = 0;

  NextWeight() = default;
  explicit NextWeight(const ConvLayer& layer)
      : data(layer.packed.const_data_ptr()),
        bytes(layer.packed.numel() * static_cast<int64_t>(layer.packed.element_size())) {}
};

// A block on inputs of one size.
struct PreparedBlock {
  std::vector<PreparedLayer> layers;
  bool has_projection, channels_last;
  int64_t step_h, step_w;  // from a pixel of the shortcut to the next
  int64_t N, C, H, W;      // of its output

  // Its convolution on the input of the last one and the shortcut.
  int64_t last() const { return static_cast<int64_t>(layers.size()) - (has_projection ? 2 : 1); }
};

// Its shortcut is 0: the input; 1: a projection, the last of its layers; negative: the input's
// pixels at such steps.
PreparedBlock prepare_block(const ConvLayer* layers, int64_t count, int64_t shortcut, int64_t N,
                            int64_t C, int64_t H, int64_t W, bool channels_last, ScalarType dtype) {
  check_number("residual_blocks", "a shortcut", shortcut, -kLargestStep, 1);
  PreparedBlock block{{}, shortcut == 1, channels_last, 1, 1, N, C, H, W};
  FR_CHECK(count >= (block.has_projection ? 2 : 1), "residual_blocks: ", count,
           " convolutions are too few for a block");
  block.layers.reserve(static_cast<size_t>(count));
  const int64_t last = count - (block.has_projection ? 2 : 1);
  for (int64_t i = 0; i <= last; ++i) {
    block.layers.emplace_back(layers[i], N, block.C, block.H, block.W, dtype, false);
    const Conv& conv = block.layers.back().conv;
    block.C = conv.K, block.H = conv.P, block.W = conv.Q;
    block.channels_last |= is_channels_last(layers[i].weight);
  }
  if (block.has_projection) {
    block.layers.emplace_back(layers[last + 1], N, C, H, W, dtype, false);
    const Conv& conv = block.layers.back().conv;
    C = conv.K, H = conv.P, W = conv.Q;
  }
  // No step is larger than the image.
  block.step_h = std::clamp<int64_t>(-shortcut, 1, std::max<int64_t>(H, 1));
  block.step_w = std::clamp<int64_t>(-shortcut, 1, std::max<int64_t>(W, 1));
  if (shortcut < 0) {
    C = std::max(C, block.C);
    H = div_up(H, block.step_h);
    W = div_up(W, block.step_w);
  }
  FR_CHECK(C == block.C && H == block.H && W == block.W, "residual_blocks: the shortcut is ", C,
           " x ", H, " x ", W, ", the last convolution's output is ", block.C, " x ", block.H,
           " x ", block.W);
  return block;
}

// `next_block` is the weight of what follows it.
Tensor run_block(const Tensor& input, const PreparedBlock& block, const ConvLayer* layers,
                 const NextWeight& next_block) {
  const auto dtype = input.scalar_type();
  const auto& [prepared, has_projection, channels_last, step_h, step_w, N, C, H, W] = block;
  const int64_t last = block.last(), item = static_cast<int64_t>(input.element_size());
  Tensor output = empty_activation(N, C, H, W, dtype, channels_last);
  if (N == 0) return output;
  const int64_t at_once = images_at_once(prepared[0].conv, prepared, last, item);
  // Two buffers in turn: a convolution reads one and writes the other.
  int64_t hidden_bytes[2] = {1, 1};
  for (int64_t i = 0; i < last; ++i) {
    hidden_bytes[i % 2] =
        std::max(hidden_bytes[i % 2], at_once * activation_bytes(prepared[i].conv, item));
  }
  const Buffer hidden[2] = {Buffer(hidden_bytes[0]), Buffer(hidden_bytes[1])};
  const Strides in = strides_of(input), out = strides_of(output);

  for (int64_t n = 0; n < N; n += at_once) {
    const char* image = static_cast<const char*>(input.const_data_ptr()) + n * in.n * item;
    char* result = static_cast<char*>(output.mutable_data_ptr()) + n * out.n * item;
    const void* source = image;
    Strides source_strides = in;
    auto run = [&](Conv conv, const void* from, const Strides& from_strides, void* to,
                   const Strides& to_strides, const NextWeight& next) {
      conv.N = std::min(at_once, N - n);
      conv.input = from;
      conv.in = from_strides;
      conv.output = to;
      conv.out = to_strides;
      conv.next_weight = next.data;
      conv.next_weight_bytes = next.bytes;
      run_conv(conv);
    };
    for (int64_t i = 0; i < last; ++i) {
      Conv conv = prepared[i].conv;
      conv.act = {Act::kRelu, 0, 0};
      const Strides strides = dense_strides(conv.K, conv.P, conv.Q, true);
      const ConvLayer& next = layers[has_projection && i + 1 == last ? last + 1 : i + 1];
      run(conv, source, source_strides, hidden[i % 2].get(), strides, NextWeight(next));
      source = hidden[i % 2].get();
      source_strides = strides;
    }
    if (has_projection) {
      run(prepared.back().conv, image, in, result, out, NextWeight(layers[last]));
    }
    Conv conv = prepared[last].conv;
    conv.act = {Act::kRelu, 0, 0};
    conv.residual = has_projection ? result : image;
    conv.res_channels = has_projection ? conv.K : input.size(1);
    conv.res_skip = (conv.K - conv.res_channels) / 2;
    conv.res = has_projection ? out : Strides{in.n, in.c, step_h * in.h, step_w * in.w};
    run(conv, source, source_strides, result, out,
        n + at_once < N ? NextWeight(layers[0]) : next_block);
  }
  return output;
}

// Blocks on an input of one size. As a step of a plan its layers are lent ones.
class Blocks : public PlanStep {
 public:
  Blocks(const Tensor& input, std::vector<ConvLayer> layers,
         const std::vector<int64_t>& layer_counts, const std::vector<int64_t>& shortcuts)
      : layers_(std::move(layers)) {
    // All of them before the first one runs: the code for it, and the tensors' own fields, would be
    // out of the caches again after each block.
    blocks_.reserve(layer_counts.size());
    bool channels_last = is_channels_last(input);
    int64_t C = input.size(1), H = input.size(2), W = input.size(3);
    size_t first = 0;
    for (size_t i = 0; i < layer_counts.size(); ++i) {
      FR_CHECK(
          layer_counts[i] > 0 && layer_counts[i] <= static_cast<int64_t>(layers_.size() - first),
          "residual_blocks: block ", i, " has ", layer_counts[i], " convolutions, ",
          layers_.size() - first, " are left");
      blocks_.push_back(prepare_block(&layers_[first], layer_counts[i], shortcuts[i], input.size(0),
                                      C, H, W, channels_last, input.scalar_type()));
      const PreparedBlock& block = blocks_.back();
      channels_last = block.channels_last, C = block.C, H = block.H, W = block.W;
      first += static_cast<size_t>(layer_counts[i]);
      for (const PreparedLayer& layer : block.layers) prepared_.push_back(&layer);
    }
    FR_CHECK(first == layers_.size(), "residual_blocks: ", layers_.size(), " convolutions, ", first,
             " of them in blocks");
  }

  const std::vector<ConvLayer>& layers() const { return layers_; }

  int64_t checks() const override { return static_cast<int64_t>(layers_.size()); }
  bool is_current(int64_t i) const override {
    const auto layer = static_cast<size_t>(i);
    return seems_current(layers_[layer]) && prepared_[layer]->has_norm_of(layers_[layer]);
  }

  Tensor run(const Tensor& input) const override {
    Tensor output = input;
    size_t first = 0;
    for (const PreparedBlock& block : blocks_) {
      const size_t behind = first + block.layers.size();
      output = run_block(output, block, &layers_[first],
                         behind < layers_.size() ? NextWeight(layers_[behind]) : NextWeight());
      first = behind;
    }
    return output;
  }

 private:
  const std::vector<ConvLayer> layers_;
  std::vector<PreparedBlock> blocks_;
  std::vector<const PreparedLayer*> prepared_;
};

// `tensors` holds for every convolution weight, packed weight, running_mean, running_var,
// bn_weight, bn_bias and bias; `numbers` stride, padding and dilation, each (h, w), and groups.
// `layer_counts` says how many belong to each block, `shortcuts` what run_block() does.
std::optional<Tensor> residual_blocks_packed(Tensor input, std::vector<Tensor> tensors,
                                             std::vector<int64_t> numbers, std::vector<double> eps,
                                             std::vector<int64_t> layer_counts,
                                             std::vector<int64_t> shortcuts) {
  check_rank("residual_blocks", "input", input, 4);
  FR_CHECK(!layer_counts.empty(), "residual_blocks: layer_counts must not be empty");
  FR_CHECK(layer_counts.size() == shortcuts.size(), "residual_blocks: ", layer_counts.size(),
           " layer counts, ", shortcuts.size(), " shortcuts");
  const Blocks blocks(input, make_layers(tensors, numbers, eps), layer_counts, shortcuts);
  std::atomic<bool> current{true};
  torch::stable::parallel_for(0, blocks.checks(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!seems_current(blocks.layers()[static_cast<size_t>(i)])) current = false;
    }
  });
  if (!current) return std::nullopt;
  Tensor output = blocks.run(input);
  if (PlanRecording* recording = plan_recording()) {
    std::vector<ConvLayer> layers;
    for (const ConvLayer& layer : blocks.layers()) layers.push_back(lent(*recording, layer));
    recording->add(input, output,
                   std::make_unique<Blocks>(input, std::move(layers), layer_counts, shortcuts));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("residual_blocks_packed", TORCH_BOX(&residual_blocks_packed));
}

}  // namespace fused_resnet::cpu
