// Tensors as the operators for Hopper describe them to TMA, and what it cannot address.
#pragma once

#include "cuda/hopper/map_cache.h"
#include "cuda/library.h"
#include "cuda/tensors.h"

namespace fused_resnet {

constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 16);  // tiles may reach beyond M
// Of im2col maps of four dimensions.
constexpr int64_t kMostStride = 8, kMostOffset = 255, kLeastCorner = -128, kMostCorner = 127;

// Of one axis: where the first taps of the windows lie, as an im2col map says it.
struct Corners {
  Corners(const char* op, const char* axis, int64_t taps, int64_t stride, int64_t padding,
          int64_t dilation)
      : lower(static_cast<int>(-padding)),
        upper(static_cast<int>(padding - dilation * (taps - 1))),
        stride(static_cast<int>(stride)) {
    FR_CHECK(stride <= kMostStride && dilation * (taps - 1) <= kMostOffset &&
                 -padding >= kLeastCorner && padding - dilation * (taps - 1) >= kLeastCorner &&
                 padding <= kMostCorner,
             op, ": ", axis, " has ", taps, " taps, stride ", stride, ", padding ", padding,
             " and dilation ", dilation, ", which TMA cannot address");
  }
  int lower, upper, stride;
};

inline void check_hopper(const char* op, int device) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  FR_CHECK(major == 9 && minor == 0, op, ": needs compute capability 9.0, the GPU has ", major, ".",
           minor);
}

inline int multiprocessors_of(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

inline Tensor in_nhwc(const Tensor& tensor) {
  return is_dense_channels_last(tensor) && is_aligned(tensor) ? tensor : aligned_copy(tensor);
}

// An image as (C, W, H, N), of which `pixels` windows are loaded at a time, and 128 bytes of the
// channels of each. The image is one of in_nhwc.
inline device::TensorMap windows_of(const Tensor& image, device::TensorElement element,
                                    const Corners& h, const Corners& w, int pixels) {
  const int64_t size = image.element_size();
  const int64_t N = image.size(0), C = image.size(1), H = image.size(2), W = image.size(3);
  return cached_map_of(device::Im2col{{image.const_data_ptr(),
                                       element,
                                       4,
                                       {C, W, H, N},
                                       {C * size, W * C * size, H * W * C * size}},
                                      {w.lower, h.lower},
                                      {w.upper, h.upper},
                                      {w.stride, h.stride},
                                      static_cast<int>(128 / size),
                                      pixels,
                                      device::Swizzle::k128Bytes});
}

// Filters as (C, R S, K), of which `filters` are loaded at a time, 128 bytes of one tap of each.
inline device::TensorMap filters_of(const Tensor& weight, device::TensorElement element,
                                    int filters) {
  const int64_t size = weight.element_size();
  const int64_t K = weight.size(0), C = weight.size(1), taps = weight.size(2) * weight.size(3);
  return cached_map_of(device::Tiles{
      {weight.const_data_ptr(), element, 3, {C, taps, K}, {C * size, taps * C * size}},
      {static_cast<int>(128 / size), 1, filters},
      device::Swizzle::k128Bytes});
}

// Pixels as (K, M), of which `rows` are loaded or stored at a time, 128 bytes of each.
inline device::TensorMap rows_of(const void* pixels, device::TensorElement element, int64_t size,
                                 int64_t K, int64_t M, int rows) {
  return cached_map_of(device::Tiles{{pixels, element, 2, {K, M}, {K * size}},
                                     {static_cast<int>(128 / size), rows},
                                     device::Swizzle::k128Bytes});
}

}  // namespace fused_resnet
