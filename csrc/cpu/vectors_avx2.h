// Vectors of 256 bits; see vectors.h.
#pragma once

#include <immintrin.h>

#include "cpu/vectors.h"

namespace fused_resnet {
namespace {

struct Float32 {
  using Element = float;
  using Parameter = float;
  using Register = __m256;
  static constexpr int64_t width = 8;

  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static Register load(const float* p, int64_t count) {
    return load(Padded<float, width>(p, count).values);
  }
  static Register load_parameter(const float* p) { return load(p); }
  static Register load_parameter(const float* p, int64_t count) { return load(p, count); }
  static void store_parameter(float* p, Register x) { _mm256_storeu_ps(p, x); }
  static void store_parameter(float* p, Register x, int64_t count) {
    Padded<float, width> padded;
    store_parameter(padded.values, x);
    padded.copy_to(p, count);
  }
  static Register broadcast(float value) { return _mm256_set1_ps(value); }
  static void store(float* p, Register x) { _mm256_storeu_ps(p, x); }
  static void stream(float* p, Register x) { _mm256_stream_ps(p, x); }
  static void store(float* p, Register x, int64_t count) {
    Padded<float, width> padded;
    store(padded.values, x);
    padded.copy_to(p, count);
  }
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  // max returns its second operand when either is NaN.
  static Register relu(Register x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
  static Register where_positive(Register y, Register x) {
    return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NLE_UQ), x);
  }
  static uint32_t passed(Register y) {
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NLE_UQ)));
  }
  static Register where_bits(uint32_t bits, Register x) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lanes)), x);
  }
  static Register where_exceeds(Register a, Register b, Register x, Register y) {
    const Register exceeds =
        _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_ps(y, x, exceeds);
  }
  static Register where_equal(Register a, Register b, Register x) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ), x);
  }
};

struct Float16 : Float32 {
  using Element = Half;

  static Register load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Register load(const Half* p, int64_t count) {
    return load(Padded<Half, width>(p, count).values);
  }
  static void store(Half* p, Register x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round(x));
  }
  static void stream(Half* p, Register x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), round(x));
  }
  static __m128i round(Register x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static void store(Half* p, Register x, int64_t count) {
    Padded<Half, width> padded;
    store(padded.values, x);
    padded.copy_to(p, count);
  }
};

struct Bfloat16 : Float32 {
  using Element = BFloat16;

  static Register load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Register load(const BFloat16* p, int64_t count) {
    return load(Padded<BFloat16, width>(p, count).values);
  }
  static void store(BFloat16* p, Register x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round(x));
  }
  static void stream(BFloat16* p, Register x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), round(x));
  }
  // To nearest even by integer addition. A NaN whose payload sits in the low half would become an
  // infinity, so NaNs are replaced.
  static __m128i round(Register x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    // packus works within 128-bit lanes; the permutation brings both halves together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  static void store(BFloat16* p, Register x, int64_t count) {
    Padded<BFloat16, width> padded;
    store(padded.values, x);
    padded.copy_to(p, count);
  }
};

struct Float64 {
  using Element = double;
  using Parameter = double;
  using Register = __m256d;
  static constexpr int64_t width = 4;

  static Register load(const double* p) { return _mm256_loadu_pd(p); }
  static Register load(const double* p, int64_t count) {
    return load(Padded<double, width>(p, count).values);
  }
  static Register load_parameter(const double* p) { return load(p); }
  static Register load_parameter(const double* p, int64_t count) { return load(p, count); }
  static void store_parameter(double* p, Register x) { _mm256_storeu_pd(p, x); }
  static void store_parameter(double* p, Register x, int64_t count) {
    Padded<double, width> padded;
    store_parameter(padded.values, x);
    padded.copy_to(p, count);
  }
  static Register broadcast(double value) { return _mm256_set1_pd(value); }
  static void store(double* p, Register x) { _mm256_storeu_pd(p, x); }
  static void stream(double* p, Register x) { _mm256_stream_pd(p, x); }
  static void store(double* p, Register x, int64_t count) {
    Padded<double, width> padded;
    store(padded.values, x);
    padded.copy_to(p, count);
  }
  static Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_pd(a, b, c);
  }
  static Register add(Register a, Register b) { return _mm256_add_pd(a, b); }
  static Register relu(Register x) { return _mm256_max_pd(_mm256_setzero_pd(), x); }
  static Register where_positive(Register y, Register x) {
    return _mm256_and_pd(_mm256_cmp_pd(y, _mm256_setzero_pd(), _CMP_NLE_UQ), x);
  }
  static uint32_t passed(Register y) {
    return static_cast<uint32_t>(
        _mm256_movemask_pd(_mm256_cmp_pd(y, _mm256_setzero_pd(), _CMP_NLE_UQ)));
  }
  static Register where_bits(uint32_t bits, Register x) {
    const __m256i lanes = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i own = _mm256_and_si256(_mm256_set1_epi64x(bits), lanes);
    return _mm256_and_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(own, lanes)), x);
  }
  static Register where_exceeds(Register a, Register b, Register x, Register y) {
    const Register exceeds =
        _mm256_or_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ), _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_pd(y, x, exceeds);
  }
  static Register where_equal(Register a, Register b, Register x) {
    return _mm256_and_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ), x);
  }
};

inline Wide<Float64, 2> widen(Float32, __m256 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline Wide<Float64, 1> widen(Float64, __m256d x) {
  return {x};
}
// Straight from memory, which saves taking a register apart.
inline Wide<Float64, 2> load_wide(Float32, const float* p) {
  return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
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
