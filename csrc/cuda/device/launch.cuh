// Starting a kernel.
#pragma once

#include <tuple>

#include "cuda/library.h"
#include "cuda/recording.h"

#ifdef FUSED_RESNET_ON_HOST
#include "cuda_on_host/execution.h"
#include "cuda_on_host/launches.h"
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

// Runs a kernel that `launch` has run before, with parameters at these addresses, to its end.
inline void start(const void* function, const Grid& grid, void** parameters) {
  on_host::start(function, {grid.blocks, grid.threads, grid.shared_bytes, grid.cluster},
                 parameters);
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

// Starts a kernel with parameters at these addresses. What it may use of shared memory `launch` has
// asked for.
inline void start(const void* function, const Grid& grid, void** parameters) {
  if (grid.cluster == 1) {
    STD_CUDA_CHECK(cudaLaunchKernel(function, grid.blocks, grid.threads, parameters,
                                    grid.shared_bytes, grid.stream));
    return;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {grid.cluster, 1, 1};
  const cudaLaunchConfig_t config{grid.blocks, dim3(grid.threads), grid.shared_bytes,
                                  grid.stream, &attribute,         1};
  STD_CUDA_CHECK(cudaLaunchKernelExC(&config, function, parameters));
}

#endif

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
#ifdef FUSED_RESNET_ON_HOST
  on_host::remember(kernel);
#else
  if (grid.shared_bytes > 0) ask_for_shared_memory(function);
#endif
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  std::apply(
      [&](auto&... value) {
        if (recording != nullptr) {
          recording->add_launch(function,
                                {{grid.blocks.x, grid.blocks.y, grid.blocks.z},
                                 grid.threads,
                                 grid.shared_bytes,
                                 grid.cluster},
                                {{&value, sizeof(value), Addresses<Parameters>::kOffsets,
                                  Addresses<Parameters>::kKnown}...});
        }
        const void* pointers[] = {&value...};
        start(function, grid, const_cast<void**>(pointers));
      },
      values);
}

}  // namespace fused_resnet::device
