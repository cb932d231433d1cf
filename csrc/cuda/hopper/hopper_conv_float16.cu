// The instances of the convolution for Hopper for float16.
#include "cuda/hopper/hopper_conv.cuh"

namespace fused_resnet {

template void launch_hopper_conv<__half>(const HopperConv&, int, int, cudaStream_t);

}  // namespace fused_resnet
