// Convolutions of bytes on tensors: their packed weights, the images between them, and how one is
// run on torch's threads. Shared by the operators of blocks.cpp and stem.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "checks.h"
#include "cpu/buffer_pool.h"
#include "cpu/inference_plan.h"
#include "cpu/quantized/conv.h"

namespace fused_resnet::cpu {

// Of an operator's `numbers` for a convolution: K, C, R, S, stride, padding and dilation, two each,
// groups.
constexpr int64_t kByteNumbers = 11;

// The kernels of this name; of "", the fastest that run here.
const ByteKernels& byte_kernels(const char* op, const std::string& name);

// Images with memory of the pool.
class Images {
 public:
  // `beyond`: bytes that tiles may read behind the last pixel.
  Images(const char* op, ByteImages images, int64_t beyond);
  ~Images() { pool_release(memory_); }
  Images(const Images&) = delete;
  Images& operator=(const Images&) = delete;

  void fill_halo(int value);

  ByteImages view;

 private:
  void* memory_;
};

// Some images of a batch.
ByteImages slice_images(ByteImages images, int64_t begin, int64_t count);

// A convolution on inputs of one size.
struct ByteLayer {
  ByteFilter filter;
  const torch::stable::Tensor* packed;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int64_t H, W, P, Q;
  ByteLayout layout;  // of `packed`

  ByteWeight weight(int64_t zero_point) const {
    return byte_weight(packed->const_data_ptr(), filter, layout, zero_point);
  }
  // What tiles of 16 pixels may read behind the last.
  int64_t beyond() const {
    return (kByteRows + 1) * stride_w * filter.pixel() + filter.chunks() * kByteChunk;
  }
  bool is_pointwise() const {
    return filter.R == 1 && filter.S == 1 && pad_h == 0 && pad_w == 0 && filter.groups == 1;
  }
};

// What reads an image's bytes: how far it looks beyond the edges, and behind the last pixel.
struct ByteReader {
  int64_t halo_h, halo_w, beyond;
};

// A step of a plan whose output can be had in bytes with zero point 0.
class ByteStep : public PlanStep {
 public:
  virtual std::unique_ptr<Images> run_bytes(const torch::stable::Tensor& input,
                                            const ByteReader& reader) const = 0;
  virtual double step_of_bytes() const = 0;
};

// For kernels that take weights in this layout. `numbers`: see kByteNumbers. `unit`: of the input's
// pixels, see ByteImages.
ByteLayer make_byte_layer(const char* op, const torch::stable::Tensor& packed, ByteLayout layout,
                          const int64_t* numbers, int64_t channels, int64_t H, int64_t W,
                          int64_t unit = kBytePixel);

// Zeros that live as long as the tensor of bytes.
torch::stable::Tensor packed_memory(int64_t bytes);

// Whether it is, as far as reading it is safe, a packed weight of this filter.
void check_packed(const char* op, const torch::stable::Tensor& packed, ByteLayout layout,
                  const ByteFilter& filter);

ByteConv make_byte_conv(const ByteLayer& layer, const ByteImages& in, const ByteImages& out,
                        int64_t zero_point);

// Runs it on torch's threads; `next` is what runs behind it on its output, if that is known.
void run_byte_conv(const ByteKernels& kernels, ByteConv conv, const ByteLayer* next = nullptr);

ByteFloats byte_float_type(const char* op, torch::headeronly::ScalarType dtype);

// The elements of a line of a floating-point tensor, channels innermost.
void gather_elements(const char* source, int64_t stride, int64_t count, int64_t item, void* target);

void dequantize_output(const ByteKernels& kernels, const ByteImages& from, float step,
                       torch::stable::Tensor& output);

}  // namespace fused_resnet::cpu
