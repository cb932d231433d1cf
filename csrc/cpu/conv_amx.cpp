// The native convolution of bfloat16 on AMX tiles (AMX-TILE, AMX-BF16), with AVX-512 (F, BW, DQ,
// VL, BF16) around them.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/conv_tiles.h"
#include "cpu/vectors_avx512.h"

namespace fused_resnet::cpu {
namespace {

using Element = Bfloat16;
using Value = Float32;

inline __attribute__((always_inline)) __m512 square_root(__m512 x) {
  return _mm512_sqrt_ps(x);
}

inline __attribute__((always_inline)) void copy(uint16_t* dst, const uint16_t* src, int64_t count) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) _mm512_storeu_si512(dst + i, _mm512_loadu_si512(src + i));
  if (i == count) return;
  const __mmask32 rest = static_cast<__mmask32>((1u << (count - i)) - 1);
  _mm512_mask_storeu_epi16(dst + i, rest, _mm512_maskz_loadu_epi16(rest, src + i));
}

// Rounded to nearest even; subnormals become zero, as they do in the tiles.
template <int kN>
inline __attribute__((always_inline)) void store_block(uint16_t* dst, const __m512* y) {
  if constexpr (kN == 2) {
    _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), (__m256i)_mm512_cvtneps_pbh(y[0]));
  }
}

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

inline __attribute__((always_inline)) void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int i>
inline __attribute__((always_inline)) void load_pixels(const char* rows, int64_t stride) {
  if constexpr (i == 0) _tile_loadd(4, rows, stride);
  if constexpr (i == 1) _tile_loadd(5, rows, stride);
}

template <int j>
inline __attribute__((always_inline)) void load_weights(const char* rows) {
  if constexpr (j == 0) _tile_loadd(6, rows, 64);
  if constexpr (j == 1) _tile_loadd(7, rows, 64);
}

template <int i, int j>
inline __attribute__((always_inline)) void multiply_add() {
  if constexpr (i == 0 && j == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (i == 0 && j == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (i == 1 && j == 0) _tile_dpbf16ps(2, 5, 6);
  if constexpr (i == 1 && j == 1) _tile_dpbf16ps(3, 5, 7);
}

template <int i, int j>
inline __attribute__((always_inline)) void store_sums(float* rows, int64_t stride) {
  if constexpr (i == 0 && j == 0) _tile_stored(0, rows, stride);
  if constexpr (i == 0 && j == 1) _tile_stored(1, rows, stride);
  if constexpr (i == 1 && j == 0) _tile_stored(2, rows, stride);
  if constexpr (i == 1 && j == 1) _tile_stored(3, rows, stride);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAmx = {"amx", 16, kTileBlockK, 2, kBlockPixels, 256, scratch_bytes, run};
}

#endif
