// Reading batch norm's parameters in whatever dtype they were found.
#pragma once

#include "cuda/conv_bn_act.h"
#include "cuda/device/vector.cuh"

namespace fused_resnet {

__device__ __forceinline__ float read(const Parameter& parameter, int i, float otherwise) {
  if (parameter.values == nullptr) return otherwise;
  switch (parameter.type) {
    case Parameter::Type::kFloat16:
      return device::widen(static_cast<const __half*>(parameter.values)[i]);
    case Parameter::Type::kBFloat16:
      return device::widen(static_cast<const __nv_bfloat16*>(parameter.values)[i]);
    case Parameter::Type::kFloat64:
      return static_cast<float>(static_cast<const double*>(parameter.values)[i]);
    default:
      return static_cast<const float*>(parameter.values)[i];
  }
}

}  // namespace fused_resnet
