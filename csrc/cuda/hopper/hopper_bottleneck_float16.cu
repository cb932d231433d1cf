// The instances of the Bottleneck chain for Hopper for float16.
#include "cuda/hopper/hopper_bottleneck.cuh"

namespace fused_resnet {

template void launch_hopper_bottleneck<__half>(const HopperBottleneck&, int, int, cudaStream_t);

}  // namespace fused_resnet
