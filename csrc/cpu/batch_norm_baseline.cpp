#include "cpu/batch_norm_rows.h"
#include "cpu/vectors_baseline.h"

namespace fused_resnet {

const BatchNormKernels batch_norm_baseline = {
    batch_norm_rows<Scalar<Half, float>>, batch_norm_rows<Scalar<BFloat16, float>>,
    batch_norm_rows<Scalar<float, float>>, batch_norm_rows<Scalar<double, double>>};

}  // namespace fused_resnet
