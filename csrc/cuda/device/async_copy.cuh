// cp.async: copies from global to shared memory that pass through no register and are waited for
// by group.
#pragma once

#include "cuda/device/shared_memory.cuh"

namespace fused_resnet::device {

#ifdef FUSED_RESNET_ON_HOST

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid,
                on_host::Place place = on_host::Place::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  on_host::copy_async(shared, global, kBytes, valid, place);
}

inline void copy_async_16(void* shared, const void* global, bool valid,
                          on_host::Place place = on_host::Place::current()) {
  on_host::copy_async(shared, global, 16, valid, place);
}

inline void commit_copies() {
  on_host::commit_copies();
}

template <int N>
void wait_for_copies() {
  on_host::wait_for_copies(N);
}

#else

// Copies kBytes; writes zeros and does not read `global` where not valid. Both addresses are
// multiples of kBytes. 16 bytes bypass the L1 cache.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t target = shared_address(shared);
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global),
                 "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  copy_async<16>(shared, global, valid);
}

// Ends the group of this thread's copies since the last call; it may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the N youngest groups of this thread are still under way. What other threads
// copied is there only after a barrier that follows.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

}  // namespace fused_resnet::device
