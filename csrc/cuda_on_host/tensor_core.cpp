// ldmatrix and mma.sync, for a whole warp at a time. Fragments as csrc/cuda/device/mma.cuh says.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cuda_on_host/execution_state.h"
#include "cuda_on_host/number_formats.h"
#include "cuda_on_host/tensor_core.h"

namespace fused_resnet::on_host {
namespace {

constexpr int kM = 16, kN = 8;

// How compute capability 8.x adds, the coarsest of all that have these instructions (Khattak and
// Mikaitis, "Accurate Models of NVIDIA Tensor Cores", 2025, whose models gave the bits of the
// hardware; 9.0 and 10.0 take twice as many products at once and keep a bit more): the exact
// products of a few elements and the sum so far are shifted to the largest exponent among them,
// cut off one bit below a float32 of that exponent, added, and the sum is cut off to a float32.
constexpr int kFractionBits = 24;
// Of what has a float32 as its scale, either way.
constexpr int kLargestExponent = 127, kSmallestExponent = kFractionBits - 127;
// Of a zero, which no other value is shifted to.
constexpr int kNoExponent = -1000;
constexpr int kNotFinite = 128;

float power_of_two(int exponent) {
  return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// `least` is that of subnormal numbers.
int exponent_of(float x, int least) {
  return std::max(static_cast<int>(std::bit_cast<uint32_t>(x) >> 23 & 0xffu) - 127, least);
}

// row[n] += sum of a[k] b[k][n] over `depth` elements, for kColumns of them.
template <int kColumns>
void add_products(float* row, const float* a, const float* b, int pitch, int depth, int least) {
  int largest[kColumns];
  for (int n = 0; n < kColumns; ++n)
    largest[n] = row[n] == 0 ? kNoExponent : exponent_of(row[n], -126);
  bool is_plain = false;
  for (int k = 0; k < depth; ++k) {
    const int exponent = a[k] == 0 ? 2 * kNoExponent : exponent_of(a[k], least);
    is_plain |= exponent == kNotFinite;
    for (int n = 0; n < kColumns; ++n) {
      const int other = exponent_of(b[k * pitch + n], least);
      is_plain |= other == kNotFinite;
      largest[n] = std::max(largest[n], b[k * pitch + n] == 0 ? kNoExponent : exponent + other);
    }
  }
  for (int n = 0; n < kColumns; ++n) {
    if (largest[n] == kNoExponent) largest[n] = 0;
    is_plain |= largest[n] > kLargestExponent || largest[n] < kSmallestExponent;
  }
  if (is_plain) {  // infinity, NaN, and what is close to the largest and to subnormal numbers
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < kColumns; ++n) row[n] += a[k] * b[k * pitch + n];
    }
    return;
  }
  int sums[kColumns];
  float scale[kColumns];
  for (int n = 0; n < kColumns; ++n) {
    scale[n] = power_of_two(kFractionBits - largest[n]);
    sums[n] = static_cast<int>(row[n] * scale[n]);
  }
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < kColumns; ++n)
      sums[n] += static_cast<int>(a[k] * b[k * pitch + n] * scale[n]);
  }
  for (int n = 0; n < kColumns; ++n) {
    const int magnitude = std::abs(sums[n]);
    float sum = static_cast<float>(magnitude);
    sum = std::bit_cast<float>(std::bit_cast<int>(sum) - (static_cast<int>(sum) > magnitude));
    row[n] =
        std::copysign(sum, static_cast<float>(sums[n])) * power_of_two(largest[n] - kFractionBits);
  }
}

// sums[m][n] += sum over k of a[m][k] b[k][n], k ascending, kTogether products at once.
template <int kTogether, int kDepth>
void multiply_tiles(float (&sums)[kM][kN], const float (&a)[kM][kDepth],
                    const float (&b)[kDepth][kN], int least) {
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kDepth; k += kTogether) {
      add_products<kN>(sums[m], &a[m][k], b[k], kN, kTogether, least);
    }
  }
}

template <int kRows, int kColumns>
void widen(float (&wide)[kRows][kColumns], const uint16_t (&narrow)[kRows][kColumns],
           Element element) {
  for (int i = 0; i < kRows; ++i) {
#ifdef __F16C__
    if (element == Element::kFloat16) {
      for (int j = 0; j < kColumns; j += 8) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(&narrow[i][j]));
        _mm256_storeu_ps(&wide[i][j], _mm256_cvtph_ps(bits));
      }
      continue;
    }
#endif
    for (int j = 0; j < kColumns; ++j) {
      wide[i][j] = widened(element, narrow[i][j]);
    }
  }
}

// Of subnormal numbers, the least exponent.
int least_exponent(Element element) {
  return element == Element::kFloat16 ? -14 : -126;
}

}  // namespace

float widened(Element element, uint16_t bits) {
  return element == Element::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

int read_chunk(Element element, const void* chunk, float* wide, int step) {
  if (element == Element::kTf32) {
    uint32_t bits[4];
    memcpy(bits, chunk, sizeof(bits));
    for (int i = 0; i < 4; ++i) wide[i * step] = from_tf32(bits[i]);
    return 4;
  }
  uint16_t bits[8];
  memcpy(bits, chunk, sizeof(bits));
  for (int i = 0; i < 8; ++i) wide[i * step] = widened(element, bits[i]);
  return 8;
}

void multiply_rows(Element element, float* sums, const float* a, const float* b, int rows,
                   int columns) {
  constexpr int kColumns = 64;
  const int depth = depth_of(element), together = depth / 2;
  for (int first = 0; first < columns; first += kColumns) {
    for (int m = 0; m < rows; ++m) {
      for (int k = 0; k < depth; k += together) {
        add_products<kColumns>(sums + m * columns + first, a + m * depth + k,
                               b + k * columns + first, columns, together, least_exponent(element));
      }
    }
  }
}

void multiply_of_warp(const Warp& warp) {
  const auto of_lane = [&](int lane) { return static_cast<const Multiply*>(warp.payloads[lane]); };
  const Element element = of_lane(0)->element;
  float sums[kM][kN];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    memcpy(&sums[g][2 * t], of_lane(lane)->d, 8);
    memcpy(&sums[g + 8][2 * t], of_lane(lane)->d + 2, 8);
  }
  if (element == Element::kTf32) {
    float a[kM][8], b[8][kN];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Multiply& operands = *of_lane(lane);
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = from_tf32(operands.a[i]);
      for (int i = 0; i < 2; ++i) b[t + i * 4][g] = from_tf32(operands.b[i]);
    }
    multiply_tiles<4>(sums, a, b, -126);
  } else {
    uint16_t narrow_a[kM][16], narrow_b[16][kN];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Multiply& operands = *of_lane(lane);
      for (int i = 0; i < 4; ++i) {
        memcpy(&narrow_a[g + i % 2 * 8][2 * t + i / 2 * 8], &operands.a[i], 4);
      }
      for (int i = 0; i < 2; ++i) {
        narrow_b[2 * t + i * 8][g] = static_cast<uint16_t>(operands.b[i]);
        narrow_b[2 * t + i * 8 + 1][g] = static_cast<uint16_t>(operands.b[i] >> 16);
      }
    }
    float a[kM][16], b[16][kN];
    widen(a, narrow_a, element);
    widen(b, narrow_b, element);
    multiply_tiles<8>(sums, a, b, least_exponent(element));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    memcpy(of_lane(lane)->d, &sums[g][2 * t], 8);
    memcpy(of_lane(lane)->d + 2, &sums[g + 8][2 * t], 8);
  }
}

void multiply_bytes_of_warp(const Warp& warp) {
  constexpr int kDepth = 32;
  const auto of_lane = [&](int lane) {
    return static_cast<const MultiplyBytes*>(warp.payloads[lane]);
  };
  uint8_t a[kM][kDepth];
  int8_t b[kN][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const MultiplyBytes& operands = *of_lane(lane);
    for (int i = 0; i < 4; ++i) memcpy(&a[g + i % 2 * 8][4 * t + i / 2 * 16], &operands.a[i], 4);
    for (int i = 0; i < 2; ++i) memcpy(&b[g][4 * t + i * 16], &operands.b[i], 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint8_t* row = a[g + i / 2 * 8];
      const int8_t* column = b[2 * t + i % 2];
      uint32_t sum = static_cast<uint32_t>(of_lane(lane)->d[i]);
      for (int k = 0; k < kDepth; ++k) sum += static_cast<uint32_t>(row[k] * column[k]);
      of_lane(lane)->d[i] = static_cast<int32_t>(sum);
    }
  }
}

void Block::store_matrices_of_warp(const Warp& warp) {
  const auto of_lane = [&](int lane) {
    return static_cast<const StoreMatrices*>(warp.payloads[lane]);
  };
  for (int matrix = 0; matrix < of_lane(0)->count; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      char* const row = static_cast<char*>(of_lane(8 * matrix + lane / 4)->row);
      memcpy(row + lane % 4 * 4, &of_lane(lane)->registers[matrix], 4);
    }
  }
}

void load_matrices_of_warp(const Warp& warp) {
  const auto of_lane = [&](int lane) {
    return static_cast<const LoadMatrices*>(warp.payloads[lane]);
  };
  const LoadMatrices& first = *of_lane(0);
  for (int matrix = 0; matrix < first.count; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) memcpy(elements[row], of_lane(8 * matrix + row)->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = first.transposed ? elements[j][i] : elements[i][j];
      const uint16_t high = first.transposed ? elements[j + 1][i] : elements[i][j + 1];
      of_lane(lane)->registers[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace fused_resnet::on_host
