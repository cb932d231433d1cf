// ldmatrix and mma.sync, for a whole warp at a time. Fragments as csrc/cuda/device/mma.cuh says.
#include <algorithm>
#include <cstring>

#include "cuda_on_host/execution_state.h"
#include "cuda_on_host/number_formats.h"

namespace fused_resnet::on_host {
namespace {

constexpr int kM = 16, kN = 8;

// sums[m][n] += sum over k of a[m][k] b[k][n], in float32, k ascending.
template <int kDepth>
void multiply_tiles(float (&sums)[kM][kN], const float (&a)[kM][kDepth],
                    const float (&b)[kDepth][kN]) {
  for (int m = 0; m < kM; ++m) {
    float row[kN];
    std::copy(sums[m], sums[m] + kN, row);
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < kN; ++n) row[n] += a[m][k] * b[k][n];
    }
    std::copy(row, row + kN, sums[m]);
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
      wide[i][j] =
          element == Element::kFloat16 ? from_float16(narrow[i][j]) : from_bfloat16(narrow[i][j]);
    }
  }
}

}  // namespace

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
    multiply_tiles(sums, a, b);
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
    multiply_tiles(sums, a, b);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    memcpy(of_lane(lane)->d, &sums[g][2 * t], 8);
    memcpy(of_lane(lane)->d + 2, &sums[g + 8][2 * t], 8);
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
