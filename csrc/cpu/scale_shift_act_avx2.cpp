#include "cpu/scale_shift_act_row.h"
#include "cpu/vectors_avx2.h"

namespace fused_resnet {

const ScaleShiftActRows scale_shift_act_avx2 = {
    scale_shift_act_row<Float16>, scale_shift_act_row<Bfloat16>, scale_shift_act_row<Float32>,
    scale_shift_act_row<Float64>};

}  // namespace fused_resnet
