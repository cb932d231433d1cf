// Starting a kernel.
#pragma once

#include <tuple>

#include "cuda/library.h"

#ifdef FUSED_RESNET_ON_HOST
#include "cuda_on_host/execution.h"
#else
#include <mutex>
#include <set>
#include <utility>
#endif

namespace fused_resnet::device {

struct Grid {
  dim3 blocks;
  unsigned threads;         // of each block
  size_t shared_bytes = 0;  // dynamic shared memory of each block
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks of a cluster, side by side in x
};

#ifdef FUSED_RESNET_ON_HOST

// Runs the kernel to its end.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  auto thread = [&] { std::apply(kernel, values); };
  on_host::run_grid({grid.blocks, grid.threads, grid.shared_bytes, grid.cluster}, thread);
}

#else

// Lets a kernel use all the shared memory a block can have, on the current device, and asks for as
// much of each multiprocessor's cache to be shared memory as can be: by itself the driver may leave
// room for fewer blocks than fit.
inline void ask_for_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > raised;
  int device = 0, most = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (raised.count({kernel, device})) return;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
  raised.insert({kernel, device});
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 0) ask_for_shared_memory(function);
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  const auto start = [&](auto&... value) {
    void* pointers[] = {&value...};
    if (grid.cluster == 1) {
      return cudaLaunchKernel(function, grid.blocks, grid.threads, pointers, grid.shared_bytes,
                              grid.stream);
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {grid.cluster, 1, 1};
    const cudaLaunchConfig_t config{grid.blocks, dim3(grid.threads), grid.shared_bytes,
                                    grid.stream, &attribute,         1};
    return cudaLaunchKernelExC(&config, function, pointers);
  };
  STD_CUDA_CHECK(std::apply(start, values));
}

#endif

}  // namespace fused_resnet::device
