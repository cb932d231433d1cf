// AMX's configuration while a task uses the unit.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fused_resnet::cpu {
namespace {

// All eight tiles are 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

constexpr TileConfiguration kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The unit's configuration belongs to the thread, and other libraries remember which one they
// loaded last. So what was there before is there again afterwards, be it that nothing was.
class TileState {
 public:
  TileState() {
    _tile_storeconfig(&before_);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    _tile_loadconfig(&kTiles);
  }
  ~TileState() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  TileConfiguration before_ = {};
};

}  // namespace
}  // namespace fused_resnet::cpu
