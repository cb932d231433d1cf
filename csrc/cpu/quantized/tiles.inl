// The unit of tile_run.inl: 16 pixels or 16 output channels of 64 bytes of the reduction
// each. Behind byte_tiles_*.h, which has them: two tiles of pixels, two of weights, four of sums.

namespace fused_resnet::cpu {
namespace {

template <int kM, int kN, class P, class Q>
FR_BYTES_INLINE void multiply(const P& product, Q& pending) {
  const int64_t share = bytes_div_up(pending.pixels, product.runs * product.chunks);
  const int8_t* weight = product.weight;
  const char* prefetch = product.prefetch;
  zero_sums();
  for (int64_t r = 0; r < product.R; ++r) {
    for (int64_t s = 0; s < product.S; ++s) {
      const int64_t run = r * product.run_h + s * product.run_w;
      for (int64_t chunk = 0; chunk < product.chunks; ++chunk, weight += 2 * kByteTile) {
        const int64_t offset = run + chunk * kByteChunk;
        load_weights<0>(weight);
        if constexpr (kN == 2) load_weights<1>(weight + kByteTile);
        load_pixels<0>(product.in0 + offset, product.row);
        multiply_add<0, 0>();
        if constexpr (kN == 2) multiply_add<0, 1>();
        if constexpr (kM == 2) {
          load_pixels<1>(product.in1 + offset, product.row);
          multiply_add<1, 0>();
          if constexpr (kN == 2) multiply_add<1, 1>();
        }
        pending.take(share);
        for (int line = 0; line < 32 && prefetch < product.prefetch_end; ++line, prefetch += 64) {
          __builtin_prefetch(prefetch, 0, 2);
        }
      }
    }
  }
  constexpr int64_t kHalf = kByteRows * kByteBlockK;
  store_sums<0, 0>(product.sums);
  if constexpr (kN == 2) store_sums<0, 1>(product.sums + 16);
  if constexpr (kM == 2) store_sums<1, 0>(product.sums + kHalf);
  if constexpr (kM == 2 && kN == 2) store_sums<1, 1>(product.sums + kHalf + 16);
}

}  // namespace
}  // namespace fused_resnet::cpu
