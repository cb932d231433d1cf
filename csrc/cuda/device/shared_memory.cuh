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

#ifndef FUSED_RESNET_ON_HOST
// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

}  // namespace fused_resnet::device
