// Vectors of 512 bits; see vectors.h.
#pragma once

#include <immintrin.h>

#include "cpu/vectors.h"

namespace fused_resnet {
namespace {

__mmask16 first16(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}

struct Float32 {
  using Element = float;
  using Parameter = float;
  using Register = __m512;
  static constexpr int64_t width = 16;

  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static Register load(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(first16(count), p);
  }
  static Register load_parameter(const float* p) { return load(p); }
  static Register load_parameter(const float* p, int64_t count) { return load(p, count); }
  static void store_parameter(float* p, Register x) { _mm512_storeu_ps(p, x); }
  static void store_parameter(float* p, Register x, int64_t count) {
    _mm512_mask_storeu_ps(p, first16(count), x);
  }
  static Register broadcast(float value) { return _mm512_set1_ps(value); }
  static void store(float* p, Register x) { _mm512_storeu_ps(p, x); }
  static void stream(float* p, Register x) { _mm512_stream_ps(p, x); }
  static void store(float* p, Register x, int64_t count) {
    _mm512_mask_storeu_ps(p, first16(count), x);
  }
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  // max returns its second operand when either is NaN.
  static Register relu(Register x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
  static Register where_positive(Register y, Register x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), x);
  }
  static uint32_t passed(Register y) {
    return _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ);
  }
  static Register where_bits(uint32_t bits, Register x) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
  }
  static Register where_exceeds(Register a, Register b, Register x, Register y) {
    const __mmask16 exceeds =
        _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(y, exceeds, x);
  }
  static Register where_equal(Register a, Register b, Register x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), x);
  }
};

struct Float16 : Float32 {
  using Element = Half;

  static Register load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Register load(const Half* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(count), p));
  }
  static void store(Half* p, Register x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round(x));
  }
  static void stream(Half* p, Register x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round(x));
  }
  static void store(Half* p, Register x, int64_t count) {
    _mm256_mask_storeu_epi16(p, first16(count), round(x));
  }
  static __m256i round(Register x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

struct Bfloat16 : Float32 {
  using Element = BFloat16;

  static Register widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Register load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Register load(const BFloat16* p, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(first16(count), p));
  }
  static void store(BFloat16* p, Register x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round(x));
  }
  static void stream(BFloat16* p, Register x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round(x));
  }
  static void store(BFloat16* p, Register x, int64_t count) {
    _mm256_mask_storeu_epi16(p, first16(count), round(x));
  }
  // To nearest even by integer addition; vcvtneps2bf16 would flush subnormals. A NaN whose payload
  // sits in the low half would become an infinity, so NaNs are replaced.
  static __m256i round(Register x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
  }
};

struct Float64 {
  using Element = double;
  using Parameter = double;
  using Register = __m512d;
  static constexpr int64_t width = 8;

  static __mmask8 first8(int64_t count) { return static_cast<__mmask8>((1u << count) - 1); }
  static Register load(const double* p) { return _mm512_loadu_pd(p); }
  static Register load(const double* p, int64_t count) {
    return _mm512_maskz_loadu_pd(first8(count), p);
  }
  static Register load_parameter(const double* p) { return load(p); }
  static Register load_parameter(const double* p, int64_t count) { return load(p, count); }
  static void store_parameter(double* p, Register x) { _mm512_storeu_pd(p, x); }
  static void store_parameter(double* p, Register x, int64_t count) {
    _mm512_mask_storeu_pd(p, first8(count), x);
  }
  static Register broadcast(double value) { return _mm512_set1_pd(value); }
  static void store(double* p, Register x) { _mm512_storeu_pd(p, x); }
  static void stream(double* p, Register x) { _mm512_stream_pd(p, x); }
  static void store(double* p, Register x, int64_t count) {
    _mm512_mask_storeu_pd(p, first8(count), x);
  }
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm512_fmadd_pd(a, b, c);
  }
  static Register add(Register a, Register b) { return _mm512_add_pd(a, b); }
  static Register relu(Register x) { return _mm512_max_pd(_mm512_setzero_pd(), x); }
  static Register where_positive(Register y, Register x) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y, _mm512_setzero_pd(), _CMP_NLE_UQ), x);
  }
  static uint32_t passed(Register y) {
    return _mm512_cmp_pd_mask(y, _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
  static Register where_bits(uint32_t bits, Register x) {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), x);
  }
  static Register where_exceeds(Register a, Register b, Register x, Register y) {
    const __mmask8 exceeds =
        _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_pd(y, exceeds, x);
  }
  static Register where_equal(Register a, Register b, Register x) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ), x);
  }
};

inline Wide<Float64, 2> widen(Float32, __m512 x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
inline Wide<Float64, 1> widen(Float64, __m512d x) {
  return {x};
}
// Straight from memory, which saves taking a register apart.
inline Wide<Float64, 2> load_wide(Float32, const float* p) {
  return {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
template <class V, class... Rest>
Wide<Float64, 2> load_wide(V, const typename V::Element* p, Rest... rest) {
  return widen(V(), V::load(p, rest...));
}
template <class... Rest>
Wide<Float64, 1> load_wide(Float64, const double* p, Rest... rest) {
  return {Float64::load(p, rest...)};
}

}  // namespace
}  // namespace fused_resnet
