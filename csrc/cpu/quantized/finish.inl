// The step behind the products of dot.inl and lists.inl: from sums in registers to bytes.

namespace fused_resnet::cpu {
namespace {

// The zero point times the sums of some filters.
FR_BYTES_INLINE void find_offsets(const ByteWeight& weight, int64_t channel, int64_t count,
                                  int32_t* offsets) {
  for (int64_t k = 0; k < count; ++k) {
    offsets[k] = weight.zero_point * weight.filter_sums[channel + k];
  }
}

// The step behind the products of some output channels, from the first of them on.
struct DotStep {
  const float *scale, *shift, *other_scale;
  const int32_t *offset, *other_offset;  // zero point times the filters' sums
  Ints added_zero_point;
  Floats shortcut_scale;
};

// Of one pixel: `sums` of the filter, or those of the projection, and then the filter's in
// `first`.
template <bool kOffset, ByteShortcut kShortcut, int kVectors>
FR_BYTES_INLINE void finish(const DotStep& step, const Ints (&sums)[kVectors], const int32_t* first,
                            const uint8_t* added, uint8_t* out) {
  constexpr bool kProjection = kShortcut == ByteShortcut::projection;
  Floats t[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const int64_t k = v * kLanes;
    Ints sum = kProjection ? load_ints(first + k) : sums[v];
    if constexpr (kOffset) sum = subtract(sum, load_ints(step.offset + k));
    t[v] = add(multiply(to_floats(sum), load_floats(step.scale + k)), load_floats(step.shift + k));
    if constexpr (kShortcut == ByteShortcut::bytes) {
      Ints x = load_bytes(added + k);
      if constexpr (kOffset) x = subtract(x, step.added_zero_point);
      t[v] = add(t[v], multiply(to_floats(x), step.shortcut_scale));
    }
    if constexpr (kProjection) {
      Ints other = sums[v];
      if constexpr (kOffset) other = subtract(other, load_ints(step.other_offset + k));
      t[v] = add(t[v], multiply(to_floats(other), load_floats(step.other_scale + k)));
    }
  }
  store_rounded(out, t);
}

}  // namespace
}  // namespace fused_resnet::cpu
