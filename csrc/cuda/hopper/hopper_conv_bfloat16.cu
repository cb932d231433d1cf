// The instances of the convolution for Hopper for bfloat16.
#include "cuda/hopper/hopper_conv.cuh"

namespace fused_resnet {

template void launch_hopper_conv<__nv_bfloat16>(const HopperConv&, int, int, cudaStream_t);

}  // namespace fused_resnet
