// Schemas of the operators that csrc/cuda implements, on a GPU and on the host.
#pragma once

namespace fused_resnet {

inline constexpr const char* kCudaSchemas[] = {
    "scale_shift_act(Tensor input, Tensor scale, Tensor shift, Tensor? residual=None, "
    "str activation=\"relu\") -> Tensor",
};

}  // namespace fused_resnet
