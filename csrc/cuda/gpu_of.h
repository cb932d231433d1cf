// A device as csrc/cuda/conv_heuristics.h knows one.
#pragma once

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>

#include "cuda/conv_heuristics.h"
#include "cuda/library.h"

namespace fused_resnet {

// Asked of the driver once a device.
inline Gpu gpu_of(int device) {
  static std::mutex mutex;
  static std::array<std::optional<Gpu>, 64> known;
  const std::lock_guard lock(mutex);
  std::optional<Gpu>& gpu = known.at(std::max(0, device));
  if (!gpu) {
    gpu.emplace();
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, std::max(0, device)));
    };
    ask(gpu->multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(gpu->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(gpu->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    int clock, memory_clock, bits;
    ask(clock, cudaDevAttrClockRate);
    ask(memory_clock, cudaDevAttrMemoryClockRate);
    ask(bits, cudaDevAttrGlobalMemoryBusWidth);
    // Two transfers a cycle, of which nine in ten are reached. Some drivers report no clock: then
    // it is what an A100 and an H100 have.
    const double bytes = clock > 0 ? 0.9 * 2.0 * memory_clock * (bits / 8) / clock : 0;
    gpu->memory_bytes_per_cycle = bytes >= 1 ? static_cast<int>(bytes) : 12 * gpu->multiprocessors;
  }
  return *gpu;
}

}  // namespace fused_resnet
