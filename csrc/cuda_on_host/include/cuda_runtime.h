// The part of CUDA's language and runtime that the kernels use, for a host compiler: what the
// compiler knows by itself when it is nvcc, carried out by csrc/cuda_on_host/execution.cpp.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_on_host/execution.h"

#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

// Of the thread that runs.
extern thread_local uint3 threadIdx;
extern thread_local uint3 blockIdx;
extern thread_local dim3 blockDim;
extern thread_local dim3 gridDim;
inline constexpr int warpSize = 32;

// Barriers of a block.
inline void __syncthreads(
    fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  fused_resnet::on_host::synchronize_block(false, place);
}
inline int __syncthreads_or(
    int predicate, fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  return fused_resnet::on_host::synchronize_block(predicate != 0, place) > 0;
}
inline int __syncthreads_and(
    int predicate, fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  return fused_resnet::on_host::synchronize_block(predicate == 0, place) == 0;
}
inline int __syncthreads_count(
    int predicate, fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  return fused_resnet::on_host::synchronize_block(predicate != 0, place);
}

// Collectives of the lanes in `mask`.
inline void __syncwarp(unsigned mask = 0xffffffffu, fused_resnet::on_host::Place place =
                                                        fused_resnet::on_host::Place::current()) {
  fused_resnet::on_host::synchronize_warp(mask, place);
}
inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  return fused_resnet::on_host::ballot(mask, predicate != 0, place);
}
inline int __any_sync(
    unsigned mask, int predicate,
    fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  return fused_resnet::on_host::ballot(mask, predicate != 0, place) != 0;
}
inline int __all_sync(
    unsigned mask, int predicate,
    fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  return fused_resnet::on_host::ballot(mask, predicate != 0, place) == mask;
}

namespace fused_resnet::on_host {

template <typename T>
T shuffle_value(unsigned mask, T value, int source_lane, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source_lane, place);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// `source` where it lies in the calling lane's segment of `width` lanes, else the lane itself.
inline int within_segment(int source, int width) {
  const int lane = threadIdx.x % warpSize, first = lane / width * width;
  return source >= first && source < first + width ? source : lane;
}

}  // namespace fused_resnet::on_host

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  const int first = threadIdx.x % warpSize / width * width;
  const int lane = first + static_cast<int>(static_cast<unsigned>(source) % width);
  return fused_resnet::on_host::shuffle_value(mask, value, lane, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  // Unlike the others, a lane of an earlier segment can be read.
  const int lane = threadIdx.x % warpSize, source = lane ^ bits;
  const bool ahead = source >= lane / width * width + width;
  return fused_resnet::on_host::shuffle_value(mask, value, ahead ? lane : source, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  const int source = static_cast<int>(threadIdx.x % warpSize + delta);
  return fused_resnet::on_host::shuffle_value(
      mask, value, fused_resnet::on_host::within_segment(source, width), place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  const int source = static_cast<int>(threadIdx.x % warpSize - delta);
  return fused_resnet::on_host::shuffle_value(
      mask, value, fused_resnet::on_host::within_segment(source, width), place);
}

// Threads of a block take turns, so plain arithmetic is atomic.
template <typename T>
__attribute__((no_sanitize_thread)) T
atomicAdd(T* target, std::type_identity_t<T> value,
          fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  static_assert(std::is_integral_v<T>, "sums of floating-point atomics depend on the order");
  fused_resnet::on_host::check_atomic(target, sizeof(T), place);
  const T before = *target;
  *target = before + value;
  return before;
}
template <typename T>
__attribute__((no_sanitize_thread)) T
atomicExch(T* target, std::type_identity_t<T> value,
           fused_resnet::on_host::Place place = fused_resnet::on_host::Place::current()) {
  fused_resnet::on_host::check_atomic(target, sizeof(T), place);
  const T before = *target;
  *target = value;
  return before;
}
inline void __threadfence() {
  fused_resnet::on_host::fence_global_memory();
}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* source) {
  return *source;
}
template <typename T>
T __ldcg(const T* source) {
  return *source;
}
template <typename T>
void __stcg(T* target, T value) {
  *target = value;
}

using std::max;
using std::min;

inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
// Compiled with -ffp-contract=off, so that no product is joined with a sum.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

// The runtime. Everything is in order on one stream, and nothing is asynchronous.
using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrClockRate,
  cudaDevAttrMemoryClockRate,
  cudaDevAttrGlobalMemoryBusWidth,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = fused_resnet::on_host::device_attribute(attribute);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  memset(target, value, bytes);
  return cudaSuccess;
}

namespace fused_resnet::on_host {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw_error("a CUDA function failed");
}

}  // namespace fused_resnet::on_host
