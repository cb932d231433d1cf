#include "cpu/pool_linear_rows.h"
#include "cpu/vectors_avx512.h"

namespace fused_resnet {

const PoolLinearKernels pool_linear_avx512 = {pool_linear_rows<Float16>, pool_linear_rows<Bfloat16>,
                                              pool_linear_rows<Float32>};

}  // namespace fused_resnet
