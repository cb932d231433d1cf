// How kernels on tiles lay out what a strided filter reads. For files of any instruction set: see
// isa.h.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {
namespace {

// One dimension of a convolution. Output p meets with tap t input p * stride + t * dil - pad.
// Inputs that lie `stride` apart are gathered into one plane, where neighbouring outputs are
// neighbours: there, output p meets with tap t position p + offset(t) of plane(t).
struct Axis {
  int64_t stride, dil, pad, taps, planes;

  Axis(int64_t stride_, int64_t dil_, int64_t pad_, int64_t taps_)
      : stride(stride_), dil(dil_), pad(pad_), taps(taps_) {
    int64_t a = stride, b = dil;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    planes = taps < stride / a ? taps : stride / a;
  }
  int64_t plane(int64_t tap) const { return tap % planes; }
  int64_t offset(int64_t tap) const { return tap * dil / stride; }
  // How much further than the last output a plane reaches.
  int64_t reach() const { return offset(taps - 1); }
  // The input at position 0 of a plane; the next is `stride` further.
  int64_t first_input(int64_t plane) const { return plane * dil % stride - pad; }
  // Of the positions that a row of so many outputs has, those at its end that are padding and may
  // be the ones that the next row begins with; but every output needs a position of its own.
  int64_t shared(int64_t outputs, int64_t inputs) const {
    const int64_t columns = outputs + reach(), left = pad / stride;
    const int64_t right = columns - (inputs + pad + stride - 1) / stride;
    const int64_t least = left < right ? left : right, most = least < reach() ? least : reach();
    return most < 0 ? 0 : most;
  }
};

}  // namespace
}  // namespace fused_resnet::cpu
