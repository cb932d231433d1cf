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
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"
#include "cpu/quantized/layers.h"
#include "memory_format.h"

namespace fused_resnet::cpu {
namespace {

constexpr const char* kOp = "quantized_residual_blocks";

struct Block {
  std::vector<ByteLayer> layers;
  bool has_projection;
  float shortcut_scale;

  int64_t main() const { return static_cast<int64_t>(layers.size()) - (has_projection ? 1 : 0); }
  const ByteLayer& last() const { return layers[static_cast<size_t>(main() - 1)]; }
};

// ---- running -----------------------------------------------------------------------------------

// The pixels that a projection reads, one for each position of the last convolution's input.
void subsample(const ByteImages& from, const ByteLayer& projection, const ByteImages& like,
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
  const ByteLayer& first = block.layers[0];
  int64_t image_bytes = first.H * first.W * first.filter.C * first.filter.groups;
  for (const ByteLayer& layer : block.layers) {
    weight_bytes += layer.filter.packed_bytes();
    image_bytes += layer.P * layer.Q * layer.filter.K;
  }
  if (weight_bytes > l2_bytes()) return N;
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(threads * l2_bytes() / image_bytes, 1, N);
}

// `next` is the block behind it, or null.
void run_block(const ByteKernels& kernels, const Block& block, const Block* next,
               const ByteImages& input, int64_t zero_point, const ByteImages& output) {
  const int64_t N = input.N, at_once = images_at_once(block, N), main = block.main();
  std::vector<std::unique_ptr<Images>> hidden;
  for (int64_t i = 0; i + 1 < main; ++i) {
    const ByteLayer& layer = block.layers[i];
    const ByteLayer& reader = block.layers[i + 1];
    hidden.push_back(std::make_unique<Images>(
        kOp,
        ByteImages{nullptr, at_once, layer.filter.K, layer.P, layer.Q, reader.pad_h, reader.pad_w},
        reader.beyond()));
    hidden.back()->fill_halo(0);
  }
  const ByteLayer& last = block.last();
  const ByteLayer* projection = block.has_projection ? &block.layers.back() : nullptr;
  std::unique_ptr<Images> projected;
  for (int64_t n = 0; n < N; n += at_once) {
    const int64_t count = std::min(at_once, N - n);
    const ByteImages image = slice_images(input, n, count), result = slice_images(output, n, count);
    ByteImages source = image;
    int64_t source_zero = zero_point;
    for (int64_t i = 0; i + 1 < main; ++i) {
      const ByteImages target = slice_images(hidden[i]->view, 0, count);
      run_byte_conv(kernels, make_byte_conv(block.layers[i], source, target, source_zero),
                    &block.layers[i + 1]);
      source = target;
      source_zero = 0;
    }
    ByteConv conv = make_byte_conv(last, source, result, source_zero);
    conv.added_zero_point = static_cast<int32_t>(zero_point);
    conv.shortcut_scale = block.shortcut_scale;
    if (projection == nullptr) {
      conv.shortcut = ByteShortcut::bytes;
      conv.added = image;
    } else {
      conv.shortcut = ByteShortcut::projection;
      conv.projection = projection->filter;
      conv.projection_weight = projection->weight(zero_point);
      const bool alike = projection->stride_h == 1 && projection->stride_w == 1 &&
                         image.pitch() == source.pitch() && image.lines() == source.lines();
      if (alike) {
        conv.projected = image.data + image.position(0, 0, 0) * image.pixel();
      } else {
        if (projected == nullptr) {
          projected = std::make_unique<Images>(
              kOp, ByteImages{nullptr, at_once, image.C, source.lines(), source.pitch(), 0, 0},
              projection->beyond());
        }
        subsample(image, *projection, source, projected->view.data);
        conv.projected = projected->view.data;
      }
    }
    const bool is_end = n + at_once >= N;
    const Block* reader = is_end ? next : &block;
    run_byte_conv(kernels, conv, reader == nullptr ? nullptr : &reader->layers[0]);
  }
}

void quantize_input(const ByteKernels& kernels, const Tensor& input, float inverse,
                    int64_t zero_point, const ByteImages& to) {
  const ByteFloats type = byte_float_type(kOp, input.scalar_type());
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
          gather_elements(source, s.c, to.C, item, channels.data());
          from = channels.data();
        }
        kernels.quantize(type, from, to.C, inverse, zero, target);
      }
    }
  });
}

std::vector<Block> make_blocks(const Tensor& input, const std::vector<Tensor>& packed,
                               ByteLayout layout, const std::vector<int64_t>& numbers,
                               const std::vector<int64_t>& layer_counts,
                               const std::vector<int64_t>& projections,
                               const std::vector<double>& shortcut_scales) {
  FR_CHECK(!layer_counts.empty() && layer_counts.size() == projections.size() &&
               layer_counts.size() == shortcut_scales.size(),
           kOp, ": ", layer_counts.size(), " layer counts, ", projections.size(), " projections, ",
           shortcut_scales.size(), " shortcut scales");
  FR_CHECK(numbers.size() == packed.size() * kByteNumbers, kOp, ": ", packed.size(),
           " weights and ", numbers.size(), " numbers");
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
      block.layers.push_back(
          make_byte_layer(kOp, packed[next], layout, &numbers[next * kByteNumbers], c, h, w));
      const ByteLayer& layer = block.layers.back();
      c = layer.filter.K, h = layer.P, w = layer.Q;
    }
    int64_t shortcut_c = C, shortcut_h = H, shortcut_w = W;
    if (block.has_projection) {
      block.layers.push_back(
          make_byte_layer(kOp, packed[next], layout, &numbers[next * kByteNumbers], C, H, W));
      const ByteLayer& layer = block.layers.back();
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
        kernels_(byte_kernels(kOp, kernels_name)),
        blocks_(make_blocks(input, packed_, kernels_.layout, numbers, layer_counts, projections,
                            shortcut_scales)),
        step_(step),
        zero_point_(zero_point),
        output_step_(output_step) {}

  // Whether no projection is more than a 1x1, and no last convolution beside one is strided.
  bool are_covered() const {
    for (const Block& block : blocks_) {
      if (!block.has_projection) continue;
      const ByteLayer& last = block.last();
      if (!block.layers.back().is_pointwise() || last.stride_h != 1 || last.stride_w != 1) {
        return false;
      }
    }
    return true;
  }

  Tensor run(const Tensor& input) const override {
    if (input.size(0) == 0) return empty_output(input);
    std::unique_ptr<Images> first = images_for(blocks_[0], input.size(0));
    first->fill_halo(static_cast<int>(zero_point_));
    quantize_input(kernels_, input, static_cast<float>(1 / step_), zero_point_, first->view);
    return run_all(std::move(first), input);
  }

  // A step's bytes are what quantizing its float32 tensor would give, where both have these steps.
  std::optional<Tensor> run_behind(const PlanStep& before, const Tensor& input) const override {
    const auto* stem = dynamic_cast<const ByteStep*>(&before);
    if (stem == nullptr || stem->step_of_bytes() != step_ || zero_point_ != 0 ||
        input.size(0) == 0 || input.scalar_type() != ScalarType::Float) {
      return std::nullopt;
    }
    const ByteLayer& first = blocks_[0].layers[0];
    // Otherwise the tensor between them lies in more than one way.
    if (first.filter.C * first.filter.groups == 1 || first.H * first.W == 1) return std::nullopt;
    return run_all(stem->run_bytes(input, reader_of(blocks_[0])), input);
  }

 private:
  // A block's first convolution, with its padding, and its shortcut.
  static ByteReader reader_of(const Block& block) {
    const ByteLayer& first = block.layers[0];
    return {first.pad_h, first.pad_w, std::max(first.beyond(), block.layers.back().beyond())};
  }

  static std::unique_ptr<Images> images_for(const Block& block, int64_t N) {
    const ByteLayer& first = block.layers[0];
    const ByteReader reader = reader_of(block);
    return std::make_unique<Images>(kOp,
                                    ByteImages{nullptr, N, first.filter.C * first.filter.groups,
                                               first.H, first.W, reader.halo_h, reader.halo_w},
                                    reader.beyond);
  }

  // Laid out as `input`.
  Tensor empty_output(const Tensor& input) const {
    const ByteLayer& end = blocks_.back().last();
    return empty_activation(input.size(0), end.filter.K, end.P, end.Q, input.scalar_type(),
                            is_channels_last(input));
  }

  Tensor run_all(std::unique_ptr<Images> current, const Tensor& input) const {
    const int64_t N = input.size(0);
    Tensor output = empty_output(input);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const ByteLayer& last = blocks_[i].last();
      std::unique_ptr<Images> next =
          i + 1 < blocks_.size()
              ? images_for(blocks_[i + 1], N)
              : std::make_unique<Images>(
                    kOp, ByteImages{nullptr, N, last.filter.K, last.P, last.Q, 0, 0}, 0);
      next->fill_halo(0);
      const Block* behind = i + 1 < blocks_.size() ? &blocks_[i + 1] : nullptr;
      run_block(kernels_, blocks_[i], behind, current->view, i == 0 ? zero_point_ : 0, next->view);
      current = std::move(next);
    }
    dequantize_output(kernels_, current->view, static_cast<float>(output_step_), output);
    return output;
  }

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
  byte_float_type(kOp, input.scalar_type());
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
  m.impl("quantized_residual_blocks_packed", TORCH_BOX(&quantized_residual_blocks_packed));
}

}  // namespace fused_resnet::cpu
