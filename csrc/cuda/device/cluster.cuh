// Thread block clusters, of compute capability 9.0 and later: blocks that run at the same time and
// read each other's shared memory. `Grid::cluster` (cuda/device/launch.cuh) says of how many.
#pragma once

#include "cuda/device/shared_memory.cuh"

namespace fused_resnet::device {

// As many as every GPU that has clusters can run together.
inline constexpr unsigned kMostBlocksOfCluster = 8;

#ifdef FUSED_RESNET_ON_HOST

inline constexpr bool kHasClusters = true;

inline unsigned rank_in_cluster() {
  return on_host::rank_in_cluster();
}

inline void synchronize_cluster(on_host::Place place = on_host::Place::current()) {
  on_host::synchronize_cluster(place);
}

inline void leave_cluster(on_host::Place place = on_host::Place::current()) {
  on_host::synchronize_cluster(place);
}

inline float load_from_block(const float* shared, unsigned rank,
                             on_host::Place place = on_host::Place::current()) {
  float value;
  on_host::load_from_block(&value, shared, rank, sizeof(value), place);
  return value;
}

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasClusters = false;
#else
inline constexpr bool kHasClusters = true;
#endif

// This block's place in its cluster.
__device__ __forceinline__ unsigned rank_in_cluster() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster, which see then what any of them wrote.
__device__ __forceinline__ void synchronize_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Waits likewise, but not for what was written: the last thing that a block does whose shared
// memory others read, which has to be there until they have.
__device__ __forceinline__ void leave_cluster() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

// What lies in another block's shared memory where `shared` is in this one's.
__device__ __forceinline__ float load_from_block(const float* shared, unsigned rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [address];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}

#endif

}  // namespace fused_resnet::device
