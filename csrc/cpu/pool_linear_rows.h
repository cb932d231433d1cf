// The loops of pool_linear and the tables of them (cpu/isa.h).
#pragma once

#include <stdint.h>

#include "cpu/vectors.h"

namespace fused_resnet {

// An image whose channels, or the pixels of a line, follow each other; strides in elements.
struct PooledImage {
  int64_t H, W, stride_c, stride_h, stride_w;
};

// Images that are multiplied with a row of weights together.
constexpr int64_t kMostImages = 4;

struct PoolLinearRows {
  // mean[c] = the mean over the image's pixels, rounded to an element, for `channels` channels.
  void (*mean)(const void* input, const PooledImage& image, int64_t channels, float* mean);
  // out[n * out_row] = sum_c x[n * C + c] * weight[c] + bias for `count` <= kMostImages images.
  // `bias` may be null.
  void (*linear)(const float* x, int64_t count, int64_t C, const void* weight, const void* bias,
                 void* out, int64_t out_row);
};

struct PoolLinearKernels {
  PoolLinearRows float16, bfloat16, float32;
};

extern const PoolLinearKernels pool_linear_avx2;
extern const PoolLinearKernels pool_linear_avx512;

namespace {

// The sum of a vector's values, halves added to each other.
template <class V>
float total(typename V::Register x) {
  float values[V::width];
  V::store_parameter(values, x);
  for (int64_t lanes = V::width / 2; lanes > 0; lanes /= 2) {
    for (int64_t lane = 0; lane < lanes; ++lane) values[lane] += values[lane + lanes];
  }
  return values[0];
}

template <class V>
float rounded(float x) {
  typename V::Element element;
  V::store(&element, V::broadcast(x), 1);
  float value[V::width];
  V::store_parameter(value, V::load(&element, 1));
  return value[0];
}

// A line of pixels is summed by itself first: fewer roundings are of large sums.
template <class V>
void mean_of_pixels(const void* input, const PooledImage& image, int64_t channels, float* mean) {
  const auto* from = static_cast<const typename V::Element*>(input);
  const float pixels = static_cast<float>(image.H * image.W);
  if (image.stride_c != 1) {
    for (int64_t c = 0; c < channels; ++c) {
      typename V::Register sum = V::broadcast(0);
      for (int64_t h = 0; h < image.H; ++h) {
        const auto* line = from + c * image.stride_c + h * image.stride_h;
        for_each_vector<V>(image.W, [&](int64_t w, auto... rest) {
          sum = V::add(sum, V::load(line + w, rest...));
        });
      }
      mean[c] = rounded<V>(total<V>(sum) / pixels);
    }
    return;
  }
  for_each_vector<V>(channels, [&](int64_t c, auto... rest) {
    typename V::Register sum = V::broadcast(0);
    for (int64_t h = 0; h < image.H; ++h) {
      const auto* line = from + c + h * image.stride_h;
      typename V::Register line_sum = V::broadcast(0);
      for (int64_t w = 0; w < image.W; ++w) {
        line_sum = V::add(line_sum, V::load(line + w * image.stride_w, rest...));
      }
      sum = V::add(sum, line_sum);
    }
    typename V::Element elements[V::width];
    V::store(elements, sum / V::broadcast(pixels));
    V::store_parameter(mean + c, V::load(elements), rest...);
  });
}

template <class V, int64_t kImages>
void linear_images(const float* x, int64_t C, const typename V::Element* weight, float bias,
                   typename V::Element* out, int64_t out_row) {
  constexpr int64_t kSums = 4;
  typename V::Register sums[kImages][kSums];
  for (auto& image : sums) {
    for (auto& sum : image) sum = V::broadcast(0);
  }
  int64_t c = 0;
  for (; c + kSums * V::width <= C; c += kSums * V::width) {
    for (int64_t i = 0; i < kSums; ++i) {
      const int64_t at = c + i * V::width;
      const typename V::Register w = V::load(weight + at);
      for (int64_t n = 0; n < kImages; ++n) {
        sums[n][i] = V::multiply_add(V::load_parameter(x + n * C + at), w, sums[n][i]);
      }
    }
  }
  for_each_vector<V>(C - c, [&](int64_t i, auto... rest) {
    const typename V::Register w = V::load(weight + c + i, rest...);
    for (int64_t n = 0; n < kImages; ++n) {
      const auto pixel = V::load_parameter(x + n * C + c + i, rest...);
      sums[n][0] = V::multiply_add(pixel, w, sums[n][0]);
    }
  });
  for (int64_t n = 0; n < kImages; ++n) {
    const auto sum = V::add(V::add(sums[n][0], sums[n][1]), V::add(sums[n][2], sums[n][3]));
    V::store(out + n * out_row, V::broadcast(total<V>(sum) + bias), 1);
  }
}

template <class V>
void linear_row(const float* x, int64_t count, int64_t C, const void* weight, const void* bias,
                void* out, int64_t out_row) {
  using Element = typename V::Element;
  using Loop = void (*)(const float*, int64_t, const Element*, float, Element*, int64_t);
  static constexpr Loop loops[kMostImages] = {linear_images<V, 1>, linear_images<V, 2>,
                                              linear_images<V, 3>, linear_images<V, 4>};
  float value[V::width] = {};
  if (bias != nullptr) V::store_parameter(value, V::load(static_cast<const Element*>(bias), 1));
  loops[count - 1](x, C, static_cast<const Element*>(weight), value[0], static_cast<Element*>(out),
                   out_row);
}

template <class V>
constexpr PoolLinearRows pool_linear_rows = {mean_of_pixels<V>, linear_row<V>};

}  // namespace
}  // namespace fused_resnet
