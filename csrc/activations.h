// Which activation is applied behind batch norm and the residual; for every compiler and processor.
#pragma once

#include <cstdint>

namespace fused_resnet {

// The numbers are those of fused_resnet/layers/activation.py.
enum class Act : int64_t {
  kNone,
  kRelu,
  kHardtanh,
  kLeakyRelu,
  kSilu,
  kHardswish,
  kGelu,
  kGeluTanh,
};

// {} is none.
struct Activation {
  Act kind;
  float first, second;
};

// Whether it is max(x, floor), with 0 or -infinity.
constexpr bool is_plain(const Activation& activation) {
  return activation.kind <= Act::kRelu;
}

}  // namespace fused_resnet
