#if defined(__x86_64__)

#include "cpu/tile_rate.h"
#include "cpu/tiles_amx.h"

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kStepBytes = 4 * kTileBytes, kSteps = 4;

// `multiply` is the four products of a step.
template <class F>
inline __attribute__((always_inline)) void repeat(int64_t steps, F multiply) {
  alignas(64) char tiles[kSteps * kStepBytes];
  for (int64_t i = 0; i < kSteps * kStepBytes; ++i) tiles[i] = static_cast<char>(i % 2 + 63);
  alignas(64) float sums[16 * 16];
  const TileState state;
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  zero_sums();
  for (int64_t i = 0; i < steps; ++i) {
    const char* step = tiles + i % kSteps * kStepBytes;
    load_weights<0>(step);
    load_pixels<0>(step + kTileBytes, 64);
    load_weights<1>(step + 2 * kTileBytes);
    load_pixels<1>(step + 3 * kTileBytes, 64);
    multiply();
  }
  store_sums<0, 0>(sums, 64);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

}  // namespace

int64_t multiply_bfloat16_tiles(int64_t steps) {
  repeat(steps, [] {
    multiply_add<0, 0>();
    multiply_add<0, 1>();
    multiply_add<1, 0>();
    multiply_add<1, 1>();
  });
  return 4 * 16 * 16 * 32;
}

int64_t multiply_byte_tiles(int64_t steps) {
  repeat(steps, [] {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  });
  return 4 * 16 * 16 * 64;
}

}  // namespace fused_resnet::cpu

#endif
