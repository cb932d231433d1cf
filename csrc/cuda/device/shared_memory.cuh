// The block's dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef FUSED_RESNET_ON_HOST
#include "cuda_on_host/execution.h"
#endif

namespace fused_resnet::device {

// As many bytes as the launch asked for, aligned to 128.
__device__ __forceinline__ char* shared_memory() {
#ifdef FUSED_RESNET_ON_HOST
  return on_host::shared_memory();
#else
  extern __shared__ __align__(128) char dynamic_shared_memory[];
  return dynamic_shared_memory;
#endif
}

// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
#ifdef FUSED_RESNET_ON_HOST
  return on_host::shared_address(shared);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#endif
}

// The first place from `shared` on whose address is a multiple of kBytes, a power of two.
template <int kBytes>
__device__ __forceinline__ char* aligned(char* shared) {
  return shared + (-shared_address(shared) & (kBytes - 1));
}

}  // namespace fused_resnet::device
