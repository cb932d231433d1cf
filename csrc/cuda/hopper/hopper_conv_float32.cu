// The instances of the convolution for Hopper for float32, multiplied as tf32.
#include "cuda/hopper/hopper_conv.cuh"

namespace fused_resnet {

template void launch_hopper_conv<float>(const HopperConv&, int, int, cudaStream_t);

}  // namespace fused_resnet
