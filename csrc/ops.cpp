// Schemas of the native operators. The implementations register themselves beside their kernels,
// with STABLE_TORCH_LIBRARY_IMPL in csrc/cpu and csrc/cuda.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fused_resnet, m)
{
  m.def(
      "scale_shift_act(Tensor input, Tensor scale, Tensor shift, Tensor? residual=None, "
      "str activation=\"relu\") -> Tensor");
}
