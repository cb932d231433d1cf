// The operator quantized_stem_packed of the CPU backend: a network's first convolution in eight or
// sixteen bits with batch norm, ReLU and max-pool, as `reference.quantized_stem` has it.
//
// An image's few channels make pixels of as few bytes, so that a filter row of 7 taps is one chunk
// of the reduction. With sixteen bits a channel is two bytes, the lower one first, each with zero
// point 128, and there are two weights: what the upper parts give together, and what an upper and a
// lower one do; their sums meet in the step behind them, as a block's and its projection's do.

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

constexpr const char* kOp = "quantized_stem";

// Up to so many bytes of channels a pixel has no others.
constexpr int64_t kMostNarrow = 8;

// A floating-point image's lines, quantized: bytes, or words of both parts.
class LineQuantizer {
 public:
  LineQuantizer(const ByteKernels& kernels, const Tensor& input, float inverse, int64_t zero_point,
                bool words)
      : kernels_(kernels),
        type_(byte_float_type(kOp, input.scalar_type())),
        strides_(strides_of(input)),
        item_(static_cast<int64_t>(input.element_size())),
        C_(input.size(1)),
        W_(input.size(3)),
        data_(static_cast<const char*>(input.const_data_ptr())),
        inverse_(inverse),
        zero_point_(static_cast<int32_t>(zero_point)),
        part_(words ? 2 : 1),
        values_(static_cast<size_t>(C_ * W_ * part_ + kBytePixel)),
        elements_(static_cast<size_t>(C_ * W_ * item_)) {}

  // To W pixels of so many bytes each; what is beyond the channels is undefined.
  void run(int64_t n, int64_t h, uint8_t* target, int64_t pixel) {
    const char* source = data_ + (n * strides_.n + h * strides_.h) * item_;
    if (strides_.w == 1 && C_ > 1) {
      for (int64_t c = 0; c < C_; ++c) {
        quantize(source + c * strides_.c * item_, W_, values_.data() + c * W_ * part_);
      }
      part_ == 2 ? weave<uint16_t>(target, pixel) : weave<uint8_t>(target, pixel);
      return;
    }
    if ((C_ > 1 && strides_.c != 1) || strides_.w != C_) {
      for (int64_t w = 0; w < W_; ++w) {
        gather_elements(source + w * strides_.w * item_, strides_.c, C_, item_,
                        elements_.data() + w * C_ * item_);
      }
      source = elements_.data();
    }
    const int64_t own = C_ * part_;
    quantize(source, W_ * C_, pixel == own ? target : values_.data());
    if (pixel == own) return;
    for (int64_t w = 0; w < W_; ++w) {
      std::memcpy(target + w * pixel, values_.data() + w * own, static_cast<size_t>(own));
    }
  }

 private:
  void quantize(const void* source, int64_t count, uint8_t* target) const {
    if (part_ == 2) {
      kernels_.quantize_words(type_, source, count, inverse_, reinterpret_cast<uint16_t*>(target));
    } else {
      kernels_.quantize(type_, source, count, inverse_, zero_point_, target);
    }
  }

  // From one plane a channel.
  template <class T>
  void weave(uint8_t* target, int64_t pixel) const {
    const T* planes = reinterpret_cast<const T*>(values_.data());
    for (int64_t c = 0; c < C_; ++c) {
      const T* plane = planes + c * W_;
      uint8_t* to = target + c * static_cast<int64_t>(sizeof(T));
      for (int64_t w = 0; w < W_; ++w) std::memcpy(to + w * pixel, plane + w, sizeof(T));
    }
  }

  const ByteKernels& kernels_;
  ByteFloats type_;
  Strides strides_;
  int64_t item_, C_, W_;
  const char* data_;
  float inverse_;
  int32_t zero_point_;
  int64_t part_;
  std::vector<uint8_t> values_;
  std::vector<char> elements_;
};

void quantize_images(const ByteKernels& kernels, const Tensor& input, float inverse,
                     int64_t zero_point, bool words, int64_t first, const ByteImages& to) {
  torch::stable::parallel_for(0, to.N * to.H, 16, [&](int64_t begin, int64_t end) {
    LineQuantizer lines(kernels, input, inverse, zero_point, words);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / to.H, h = line % to.H;
      lines.run(first + n, h, to.data + to.position(n, h, 0) * to.pixel(), to.pixel());
    }
  });
}

void largest(const uint8_t* a, int64_t count, uint8_t* into) {
  for (int64_t i = 0; i < count; ++i) into[i] = a[i] > into[i] ? a[i] : into[i];
}

// `from` has a halo of the pool's padding, of zeros, which no byte is less than.
void max_pool(const MaxPool& pool, const ByteImages& from, const ByteImages& to) {
  const int64_t pixel = from.pixel(), width = (from.W + 2 * from.halo_w) * pixel;
  torch::stable::parallel_for(0, to.N * to.H, 4, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> rows(static_cast<size_t>(width));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / to.H, p = line % to.H;
      for (int64_t r = 0; r < pool.kernel_h; ++r) {
        const int64_t h = p * pool.stride_h - pool.pad_h + r;
        const uint8_t* row = from.data + from.position(n, h, -from.halo_w) * pixel;
        if (r == 0) {
          std::memcpy(rows.data(), row, static_cast<size_t>(width));
        } else {
          largest(row, width, rows.data());
        }
      }
      uint8_t* target = to.data + to.position(n, p, 0) * pixel;
      for (int64_t q = 0; q < to.W; ++q, target += pixel) {
        const uint8_t* left = rows.data() + q * pool.stride_w * pixel;
        std::memcpy(target, left, static_cast<size_t>(pixel));
        for (int64_t s = 1; s < pool.kernel_w; ++s) largest(left + s * pixel, pixel, target);
      }
    }
  });
}

// A stem on images of one size, its weights packed.
class ByteStem : public ByteStep {
 public:
  ByteStem(const Tensor& input, Tensor packed, std::optional<Tensor> packed_low,
           const std::vector<int64_t>& numbers, const std::vector<int64_t>& pool, double step,
           int64_t zero_point, double output_step, const std::string& kernels_name)
      : packed_(std::move(packed)),
        packed_low_(std::move(packed_low)),
        kernels_(byte_kernels(kOp, kernels_name)),
        channels_(input.size(1) * (words() ? 2 : 1)),
        unit_(channels_ <= kMostNarrow ? channels_ : kBytePixel),
        layer_(make_byte_layer(kOp, packed_, kernels_.layout, numbers.data(), channels_,
                               input.size(2), input.size(3), unit_)),
        pool_(make_pool(pool, layer_.P, layer_.Q)),
        inverse_(static_cast<float>(1 / step)),
        zero_point_(zero_point),
        output_step_(output_step) {
    FR_CHECK(layer_.filter.groups == 1, kOp, ": groups is ", layer_.filter.groups, ", must be 1");
    if (words()) {
      check_packed("quantized_stem: the lower weight", *packed_low_, kernels_.layout,
                   layer_.filter);
    }
  }

  Tensor run(const Tensor& input) const override {
    const int64_t N = input.size(0), K = layer_.filter.K;
    Tensor output =
        empty_activation(N, K, pool_.P, pool_.Q, input.scalar_type(), is_channels_last(input));
    if (N == 0) return output;
    const std::unique_ptr<Images> pooled = run_bytes(input, {0, 0, 0});
    dequantize_output(kernels_, pooled->view, static_cast<float>(output_step_), output);
    return output;
  }

  double step_of_bytes() const override { return output_step_; }

  std::unique_ptr<Images> run_bytes(const Tensor& input, const ByteReader& reader) const override {
    const int64_t N = input.size(0), K = layer_.filter.K;
    // As many images at a time as leave what is pooled in the threads' second-level caches.
    const int64_t hidden_bytes = layer_.P * layer_.Q * bytes_round_up(K, kBytePixel);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t at_once = std::clamp<int64_t>(threads * l2_bytes() / (2 * hidden_bytes), 1, N);
    const int64_t zero = words() ? 128 : zero_point_;
    Images image(
        kOp, {nullptr, at_once, channels_, layer_.H, layer_.W, layer_.pad_h, layer_.pad_w, unit_},
        layer_.beyond());
    image.fill_halo(static_cast<int>(zero));
    Images hidden(kOp, {nullptr, at_once, K, layer_.P, layer_.Q, pool_.pad_h, pool_.pad_w}, 0);
    hidden.fill_halo(0);
    auto pooled = std::make_unique<Images>(
        kOp, ByteImages{nullptr, N, K, pool_.P, pool_.Q, reader.halo_h, reader.halo_w},
        reader.beyond);
    pooled->fill_halo(0);
    for (int64_t n = 0; n < N; n += at_once) {
      const int64_t count = std::min(at_once, N - n);
      const ByteImages from = slice_images(image.view, 0, count);
      const ByteImages between = slice_images(hidden.view, 0, count);
      quantize_images(kernels_, input, inverse_, zero_point_, words(), n, from);
      ByteConv conv = make_byte_conv(layer_, from, between, zero);
      if (words()) {
        conv.shortcut = ByteShortcut::projection;
        conv.doubled = true;
        conv.projection = layer_.filter;
        conv.projection_weight =
            byte_weight(packed_low_->const_data_ptr(), layer_.filter, kernels_.layout, zero);
      }
      run_byte_conv(kernels_, conv);
      max_pool(pool_, between, slice_images(pooled->view, n, count));
    }
    return pooled;
  }

 private:
  // Whether there are sixteen bits.
  bool words() const { return packed_low_.has_value(); }

  const Tensor packed_;
  const std::optional<Tensor> packed_low_;
  const ByteKernels& kernels_;
  const int64_t channels_, unit_;
  const ByteLayer layer_;
  const MaxPool pool_;
  const float inverse_;
  const int64_t zero_point_;
  const double output_step_;
};

// `packed`: the weight, with sixteen bits that of the upper parts, which has two input channels for
// each of the image's; then `packed_low`. `numbers`: the convolution's, see kByteNumbers; `pool`:
// kernel, stride and padding, two each.
Tensor quantized_stem_packed(Tensor input, Tensor packed, std::optional<Tensor> packed_low,
                             std::vector<int64_t> numbers, std::vector<int64_t> pool, double step,
                             int64_t zero_point, double output_step, std::string kernels_name) {
  check_rank(kOp, "input", input, 4);
  byte_float_type(kOp, input.scalar_type());
  check_number(kOp, "zero_point", zero_point, 0, 255);
  for (const double value : {step, output_step}) {
    FR_CHECK(std::isfinite(value) && value > 0, kOp, ": a step is ", value,
             ", must be finite and above zero");
  }
  FR_CHECK(numbers.size() == kByteNumbers && pool.size() == 6, kOp, ": ", numbers.size(),
           " numbers and ", pool.size(), " of the pool, must be ", kByteNumbers, " and 6");
  auto stem = std::make_unique<ByteStem>(input, std::move(packed), std::move(packed_low), numbers,
                                         pool, step, zero_point, output_step, kernels_name);
  Tensor output = stem->run(input);
  if (PlanRecording* recording = plan_recording()) {
    recording->add(input, output, std::move(stem));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("quantized_stem_packed", TORCH_BOX(&quantized_stem_packed));
}

}  // namespace fused_resnet::cpu
