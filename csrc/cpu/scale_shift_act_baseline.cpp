#include "cpu/scale_shift_act_row.h"
#include "cpu/vectors_baseline.h"

namespace fused_resnet {

const ScaleShiftActRows scale_shift_act_baseline = {
    scale_shift_act_row<Scalar<Half, float>>, scale_shift_act_row<Scalar<BFloat16, float>>,
    scale_shift_act_row<Scalar<float, float>>, scale_shift_act_row<Scalar<double, double>>};

}  // namespace fused_resnet
