// What the kernels for Hopper share: registers, places in a ring of stages, and what is added to
// sums.
#pragma once

#include "cuda/device/vector.cuh"

namespace fused_resnet {

// Registers of a thread: 168 of each at the launch, of which the loader's go to the consumers.
constexpr int kLoaderRegisters = 40;
constexpr int kConsumerRegisters = 232;

// Two neighbouring outputs before their activation, of which `residual` holds what is added.
template <typename T>
__device__ __forceinline__ void add_norm(float* y, const float* sums, const float* scale,
                                         const float* shift, const device::Vector<T, 2>& residual,
                                         bool has_residual) {
  const auto factors = device::load<float, 2>(scale);
  const auto terms = device::load<float, 2>(shift);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    y[e] = sums[e] * factors.values[e] + terms.values[e];
    if (has_residual) y[e] += device::widen(residual.values[e]);
  }
}

// A place in the ring of stages, and which time around it is.
template <int kStages>
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance(int steps = 1) {
    stage += steps;
    parity ^= stage / kStages & 1;
    stage %= kStages;
  }
};

}  // namespace fused_resnet
