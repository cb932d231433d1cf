// The instances of the Bottleneck chain for Hopper for bfloat16.
#include "cuda/hopper/hopper_bottleneck.cuh"

namespace fused_resnet {

template void launch_hopper_bottleneck<__nv_bfloat16>(const HopperBottleneck&, int, int,
                                                      cudaStream_t);

}  // namespace fused_resnet
