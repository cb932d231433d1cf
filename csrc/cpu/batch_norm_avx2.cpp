#include "cpu/batch_norm_rows.h"
#include "cpu/vectors_avx2.h"

namespace fused_resnet {

const BatchNormKernels batch_norm_avx2 = {batch_norm_rows<Float16>, batch_norm_rows<Bfloat16>,
                                          batch_norm_rows<Float32>, batch_norm_rows<Float64>};

}  // namespace fused_resnet
