// What TMA is told of a tensor, once and on the host: where it lies, and what is copied at a time.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#ifdef FUSED_RESNET_ON_HOST
#include "cuda_on_host/execution.h"
#else
#include <cuda.h>
#endif

#include "cuda/library.h"

namespace fused_resnet::device {

// A CUtensorMap. Kernels take it as a __grid_constant__ parameter, never by copy.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Of kTf32, float32 in memory, loads round to tf32 on the way: to nearest, ties to even, infinity
// and NaN left alone.
enum class TensorElement { kByte, kFloat16, kBFloat16, kFloat32, kTf32 };

// How 16-byte chunks are permuted in shared memory: not at all, or within lines of 128 bytes by
// which of eight lines it is, counted from a multiple of 1024.
enum class Swizzle { kNone, k128Bytes };

// A tensor of up to four dimensions, the innermost first and dense; `strides` are those of the
// others, in bytes, multiples of 16. The address is one too.
struct TensorOf {
  const void* address;
  TensorElement element;
  int rank;
  std::array<int64_t, 4> sizes;
  std::array<int64_t, 3> strides;

  bool operator==(const TensorOf&) const = default;
};

// Boxes of `box` elements.
struct Tiles {
  TensorOf tensor;
  std::array<int, 4> box;
  Swizzle swizzle;

  bool operator==(const Tiles&) const = default;
};

// Of an image (C, W, H, N): `pixels` windows by `channels` at a time. The first taps of all windows
// are the pixels from `lower` (w, h) to `upper` beyond the image's last, `stride` apart, row after
// row and image after image: for a convolution lower is -padding and upper
// padding - dilation (taps - 1).
struct Im2col {
  TensorOf tensor;
  std::array<int, 2> lower, upper, stride;
  int channels, pixels;
  Swizzle swizzle;

  bool operator==(const Im2col&) const = default;
};

#ifdef FUSED_RESNET_ON_HOST

inline TensorMap map_of(const Tiles& tiles) {
  TensorMap map;
  on_host::encode_map(&map, tiles);
  return map;
}

inline TensorMap map_of(const Im2col& im2col) {
  TensorMap map;
  on_host::encode_map(&map, im2col);
  return map;
}

#else

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// A function of the driver, which nothing else links against.
template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
#else
  STD_CUDA_CHECK(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result));
#endif
  STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && found, "the CUDA driver has no ", name);
  return reinterpret_cast<Function*>(found);
}

inline CUtensorMapDataType data_type(TensorElement element) {
  switch (element) {
    case TensorElement::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TensorElement::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TensorElement::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case TensorElement::kTf32:
      return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

inline CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
}

// Sizes and strides as the driver takes them.
struct DriverTensor {
  explicit DriverTensor(const TensorOf& tensor) {
    for (int i = 0; i < tensor.rank; ++i) sizes[i] = tensor.sizes[i];
    for (int i = 0; i + 1 < tensor.rank; ++i) strides[i] = tensor.strides[i];
  }
  std::array<cuuint64_t, 4> sizes{};
  std::array<cuuint64_t, 3> strides{};
};

inline void check_encoded(CUresult result, const char* what) {
  STD_TORCH_CHECK(result == CUDA_SUCCESS, what, " failed with CUresult ", static_cast<int>(result));
}

inline TensorMap map_of(const Tiles& tiles) {
  static const auto encode =
      driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const DriverTensor tensor(tiles.tensor);
  std::array<cuuint32_t, 4> box{}, steps{1, 1, 1, 1};
  for (int i = 0; i < tiles.tensor.rank; ++i) box[i] = tiles.box[i];
  TensorMap map;
  check_encoded(encode(reinterpret_cast<CUtensorMap*>(&map), data_type(tiles.tensor.element),
                       tiles.tensor.rank, const_cast<void*>(tiles.tensor.address),
                       tensor.sizes.data(), tensor.strides.data(), box.data(), steps.data(),
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(tiles.swizzle),
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                "cuTensorMapEncodeTiled");
  return map;
}

inline TensorMap map_of(const Im2col& im2col) {
  static const auto encode =
      driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const DriverTensor tensor(im2col.tensor);
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(im2col.stride[0]),
                              static_cast<cuuint32_t>(im2col.stride[1]), 1};
  TensorMap map;
  check_encoded(
      encode(reinterpret_cast<CUtensorMap*>(&map), data_type(im2col.tensor.element),
             im2col.tensor.rank, const_cast<void*>(im2col.tensor.address), tensor.sizes.data(),
             tensor.strides.data(), im2col.lower.data(), im2col.upper.data(), im2col.channels,
             im2col.pixels, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(im2col.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeIm2col");
  return map;
}

#endif

}  // namespace fused_resnet::device
