#include "cpu/max_pool_rows.h"
#include "cpu/vectors_baseline.h"

namespace fused_resnet {

const MaxPoolKernels max_pool_baseline = {
    max_pool_rows<Scalar<Half, float>>, max_pool_rows<Scalar<BFloat16, float>>,
    max_pool_rows<Scalar<float, float>>, max_pool_rows<Scalar<double, double>>};

}  // namespace fused_resnet
