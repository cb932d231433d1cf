#include "cpu/max_pool_rows.h"
#include "cpu/vectors_avx512.h"

namespace fused_resnet {

const MaxPoolKernels max_pool_avx512 = {max_pool_rows<Float16>, max_pool_rows<Bfloat16>,
                                        max_pool_rows<Float32>, max_pool_rows<Float64>};

}  // namespace fused_resnet
