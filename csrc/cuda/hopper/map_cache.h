// Tensor maps that were encoded before, so that a layer which runs again on the same tensors asks
// the driver for none.
//
// What a map says depends on its description alone, the address included: whatever lies at that
// address now, the map is right, and nothing can go stale.
#pragma once

#include <bit>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "cuda/device/tensor_map.h"

namespace fused_resnet {

struct DescriptionHash {
  size_t operator()(const device::Tiles& tiles) const {
    uint64_t hash = of(tiles.tensor, tiles.swizzle);
    for (const int side : tiles.box) mix(hash, side);
    return hash;
  }

  size_t operator()(const device::Im2col& im2col) const {
    uint64_t hash = of(im2col.tensor, im2col.swizzle);
    for (const auto& pair : {im2col.lower, im2col.upper, im2col.stride}) {
      for (const int number : pair) mix(hash, number);
    }
    mix(hash, im2col.channels);
    mix(hash, im2col.pixels);
    return hash;
  }

 private:
  static void mix(uint64_t& hash, uint64_t word) {
    hash = (std::rotl(hash, 23) ^ word) * 0x9e3779b97f4a7c15u;
  }

  static uint64_t of(const device::TensorOf& tensor, device::Swizzle swizzle) {
    uint64_t hash = reinterpret_cast<uintptr_t>(tensor.address);
    mix(hash, static_cast<uint64_t>(tensor.element) << 8 | static_cast<uint64_t>(swizzle));
    mix(hash, tensor.rank);
    for (const int64_t size : tensor.sizes) mix(hash, size);
    for (const int64_t stride : tensor.strides) mix(hash, stride);
    return hash ^ hash >> 32;
  }
};

template <typename Description>
class MapCache {
 public:
  device::TensorMap map_of(const Description& description) {
    const std::lock_guard lock(mutex_);
    const auto found = maps_.find(description);
    if (found != maps_.end()) return found->second;
    // Of tensors that come and go, most are never asked for again.
    if (maps_.size() >= kMost) maps_.clear();
    return maps_.emplace(description, device::map_of(description)).first->second;
  }

 private:
  // Those of several networks: a layer has one of its image and three of the other kind.
  static constexpr size_t kMost = 2048;

  std::mutex mutex_;
  std::unordered_map<Description, device::TensorMap, DescriptionHash> maps_;
};

template <typename Description>
device::TensorMap cached_map_of(const Description& description) {
  static MapCache<Description> cache;
  return cache.map_of(description);
}

}  // namespace fused_resnet
