// The unit of kernel.inl on vectors: dot(sums, pixels, weights) adds to each of kLanes sums four
// products of unsigned and signed bytes, exactly. Included by kernel.inl's includers behind
// bytes_*.h, dot(), kDotPixels and kDotVectors: how many pixels and vectors of output channels fill
// the registers.

namespace fused_resnet::cpu {
namespace {

struct UnitState {
  UnitState() {}
};

FR_BYTES_INLINE Ints broadcast_four(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return broadcast_int(four);
}

// `sums` and the weights begin at the first of the output channels.
template <int kPixels, int kVectors, class P>
FR_BYTES_INLINE void multiply_pixels(const P& product, const uint8_t* in, const int8_t* weight,
                                     int32_t* sums) {
  constexpr int64_t kFour = 4 * kLanes;  // bytes of a vector of weights
  Ints total[kPixels][kVectors];
  for (int i = 0; i < kPixels; ++i) {
    for (int v = 0; v < kVectors; ++v) total[i][v] = broadcast_int(0);
  }
  for (int64_t r = 0; r < product.R; ++r) {
    for (int64_t s = 0; s < product.S; ++s) {
      const uint8_t* at = in + r * product.run_h + s * product.run_w;
      for (int64_t step = 0; step < product.steps; ++step, at += 4) {
        const int8_t* four = weight + step / 16 * 2 * kByteTile + step % 16 * 64;
        Ints weights[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          // A tile has 16 output channels.
          constexpr int64_t kHalf = 16 / kLanes;
          weights[v] = load_ints(
              reinterpret_cast<const int32_t*>(four + v / kHalf * kByteTile + v % kHalf * kFour));
        }
        for (int i = 0; i < kPixels; ++i) {
          const Ints pixel = broadcast_four(at + i * product.row);
          for (int v = 0; v < kVectors; ++v) total[i][v] = dot(total[i][v], pixel, weights[v]);
        }
      }
      weight += product.chunks * 2 * kByteTile;
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      store_ints(sums + i * kByteBlockK + v * kLanes, total[i][v]);
    }
  }
}

template <int kN, class P>
FR_BYTES_INLINE void multiply_tile(const P& product, const uint8_t* in, int32_t* sums) {
  constexpr int64_t kVectors = kDotVectors * kLanes <= kN * 16 ? kDotVectors : kN * 16 / kLanes;
  for (int64_t k = 0; k < kN * 16; k += kVectors * kLanes) {
    const int8_t* weight = product.weight + k / 16 * kByteTile + k % 16 * 4;
    for (int64_t i = 0; i < kByteRows; i += kDotPixels) {
      multiply_pixels<kDotPixels, kVectors>(product, in + i * product.row, weight,
                                            sums + i * kByteBlockK + k);
    }
  }
}

template <int kM, int kN, class P, class Q>
void multiply(const P& product, Q&) {
  multiply_tile<kN>(product, product.in0, product.sums);
  if constexpr (kM == 2) {
    multiply_tile<kN>(product, product.in1, product.sums + kByteRows * kByteBlockK);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
