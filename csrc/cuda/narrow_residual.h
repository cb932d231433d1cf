// A residual of fewer channels than what it is added to: zero in as many channels before it as
// behind, or in one more behind. Kernels read it where it lies, in any strides.
#pragma once

#include <cstdint>

namespace fused_resnet {

struct NarrowResidual {
  const void* values;   // null without one
  int begin, channels;  // the first of the output's channels that it has, and how many
  unsigned P, Q;        // rows and columns of an image
  int64_t n, h, w, c;   // steps of images, rows, columns and channels, in elements

  // Elements of an access, a power of two: as many channels lie side by side, at an address that is
  // a multiple of their size, wherever the output's channel is a multiple of it; and of those
  // either all are the residual's or none is.
  int width;
  int unused = 0;  // no byte of it is undefined, so that what kernels are given can be compared
};

}  // namespace fused_resnet
