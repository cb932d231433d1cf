// Memory accesses of up to 16 bytes and conversions between what is stored and what is computed
// with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#ifdef FUSED_RESNET_ON_HOST
#include "cuda_on_host/execution.h"
#endif

namespace fused_resnet::device {

// N elements that are loaded or stored as one.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  static_assert(N * sizeof(T) <= 16, "no access is wider than 16 bytes");
  T values[N];
};

template <typename T>
inline constexpr int kElementsIn16Bytes = 16 / sizeof(T);

#ifdef FUSED_RESNET_ON_HOST

template <typename T, int N>
Vector<T, N> load(const T* source, on_host::Place place = on_host::Place::current()) {
  Vector<T, N> loaded;
  on_host::load(&loaded, source, sizeof(loaded), place);
  return loaded;
}

template <typename T, int N>
Vector<T, N> load_streaming(const T* source, on_host::Place place = on_host::Place::current()) {
  return load<T, N>(source, place);
}

template <typename T, int N>
void store(T* target, const Vector<T, N>& values,
           on_host::Place place = on_host::Place::current()) {
  on_host::store(target, &values, sizeof(values), place);
}

#else

// From global or shared memory.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* source) {
  return *reinterpret_cast<const Vector<T, N>*>(source);
}

// Loads what this kernel reads once and nothing writes while it runs, without displacing what the
// L1 cache holds for others.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_streaming(const T* source) {
  if constexpr (sizeof(Vector<T, N>) == 16) {
    Vector<T, N> loaded;
    uint4 bits;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(source));
    memcpy(&loaded, &bits, sizeof(loaded));
    return loaded;
  } else {
    return load<T, N>(source);
  }
}

// To global or shared memory.
template <typename T, int N>
__device__ __forceinline__ void store(T* target, const Vector<T, N>& values) {
  *reinterpret_cast<Vector<T, N>*>(target) = values;
}

#endif

// float64 is computed with as it is, everything else as float32.
template <typename T>
struct Arithmetic {
  using Type = float;
};
template <>
struct Arithmetic<double> {
  using Type = double;
};
template <typename T>
using ArithmeticType = typename Arithmetic<T>::Type;

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T narrow(ArithmeticType<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// A NaN stays one, which max(x, floor) would lose.
template <typename A>
__device__ __forceinline__ A at_least(A floor, A x) {
  return x < floor ? floor : x;
}

}  // namespace fused_resnet::device
