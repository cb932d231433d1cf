// The convolution kernel's instances for bfloat16.
#include "cuda/conv_bn_act.cuh"

namespace fused_resnet {

template void launch_conv_bn_act<__nv_bfloat16>(const Conv&, int, int, cudaStream_t);

}  // namespace fused_resnet
