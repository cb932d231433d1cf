// What the files in csrc/cuda need from torch and from CUDA on the host side of a launch. The same
// files, compiled by a host compiler (FUSED_RESNET_ON_HOST), run their kernels on CPU tensors and
// register under another name: csrc/cuda_on_host.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

// For STABLE_TORCH_LIBRARY_IMPL.
#ifdef FUSED_RESNET_ON_HOST
#define FUSED_RESNET_LIBRARY fused_resnet_on_host
#define FUSED_RESNET_DEVICE CPU
#else
#define FUSED_RESNET_LIBRARY fused_resnet
#define FUSED_RESNET_DEVICE CUDA
#endif

#ifdef FUSED_RESNET_ON_HOST
#undef STD_CUDA_CHECK  // torch's asks libc10_cuda what an error means
#define STD_CUDA_CHECK(expression) ::fused_resnet::on_host::check(expression)
#endif

namespace fused_resnet {

#ifdef FUSED_RESNET_ON_HOST

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(int32_t) {
  return nullptr;
}

#else

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

}  // namespace fused_resnet
