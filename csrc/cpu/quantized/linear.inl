// A linear layer of bytes, and the sums behind its pool. The including file has defined vectors
// (bytes_*.h) and, as for dot.inl,
//
//   dot(sums, inputs, weights)   adds to each of kLanes sums four products of unsigned and signed
//                                bytes, exactly
//
// Nothing but <stdint.h> is included: see cpu/isa.h.

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kLinearBytes = 4 * kLanes;  // of a vector

// From any address, which a row of weights may begin at.
FR_BYTES_INLINE Ints load_fours(const void* p) {
  Ints x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

FR_BYTES_INLINE int32_t sum_of_lanes(Ints x) {
  alignas(64) int32_t lanes[kLanes];
  store_ints(lanes, x);
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Of kImages inputs, `pitch` bytes apart, each with the weights.
template <int kImages>
FR_BYTES_INLINE void multiply_some(const uint8_t* inputs, int64_t pitch, const int8_t* weights,
                                   int64_t count, int32_t* sums) {
  Ints total[kImages];
  for (int n = 0; n < kImages; ++n) total[n] = broadcast_int(0);
  const auto step = [&](int64_t at, const int8_t* four) {
    const Ints w = load_fours(four);
#pragma GCC unroll 8
    for (int n = 0; n < kImages; ++n) {
      const Ints x = load_fours(inputs + n * pitch + at);
      total[n] = dot(total[n], x, w);
    }
  };
  int64_t at = 0;
  for (; at + kLinearBytes <= count; at += kLinearBytes) step(at, weights + at);
  if (at < count) {
    int8_t last[kLinearBytes] = {};
    for (int64_t i = at; i < count; ++i) last[i - at] = weights[i];
    step(at, last);
  }
  for (int n = 0; n < kImages; ++n) sums[n] = sum_of_lanes(total[n]);
}

// See ByteKernels::multiply_row.
void multiply_row(const uint8_t* inputs, int64_t images, int64_t pitch, const int8_t* weights,
                  int64_t count, int32_t* sums) {
  constexpr int kImages = 8;
  for (; images >= kImages; images -= kImages, inputs += kImages * pitch, sums += kImages) {
    multiply_some<kImages>(inputs, pitch, weights, count, sums);
  }
  for (; images > 0; --images, inputs += pitch) {
    multiply_some<1>(inputs, pitch, weights, count, sums++);
  }
}

// See ByteKernels::add_bytes.
void add_bytes(const uint8_t* source, int64_t count, int32_t* sums) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_ints(sums + i, add_ints(load_ints(sums + i), load_bytes(source + i)));
  }
  for (; i < count; ++i) sums[i] += source[i];
}

}  // namespace
}  // namespace fused_resnet::cpu
