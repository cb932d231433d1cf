// Tensor cores: D += A B on tiles of 16 x 8, and loading their operands from shared memory. All 32
// lanes of a warp take part in every call.
//
// Lane l holds, with g = l / 4 and t = l % 4 (PTX ISA, "Matrix fragments for mma"):
//   16-bit types, depth 16, two elements to a register, the lower column or row in the low half:
//     a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8; columns 2t, 2t + 1, the last two 8 further
//     b[0], b[1]               rows 2t, 2t + 1 and 8 further; column g
//   tf32, depth 8, one element to a register:
//     a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8; columns t, t, t + 4, t + 4
//     b[0], b[1]               rows t, t + 4; column g
//   8-bit types, depth 32, four elements to a register, the lowest column or row in the low byte:
//     a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8; columns 4t to 4t + 3, the last two 16 on
//     b[0], b[1]               rows 4t to 4t + 3 and 16 further; column g
//   d[0..3]                    rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/device/shared_memory.cuh"

namespace fused_resnet::device {

#ifdef FUSED_RESNET_ON_HOST

inline void load_matrix_x4(uint32_t (&r)[4], const void* row,
                           on_host::Place place = on_host::Place::current()) {
  on_host::load_matrices(r, 4, row, false, place);
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row,
                                      on_host::Place place = on_host::Place::current()) {
  on_host::load_matrices(r, 4, row, true, place);
}

inline void load_matrix_x2(uint32_t (&r)[2], const void* row,
                           on_host::Place place = on_host::Place::current()) {
  on_host::load_matrices(r, 2, row, false, place);
}

inline void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row,
                                      on_host::Place place = on_host::Place::current()) {
  on_host::load_matrices(r, 2, row, true, place);
}

inline void store_matrix_x4(void* row, const uint32_t (&r)[4],
                            on_host::Place place = on_host::Place::current()) {
  on_host::store_matrices(row, r, 4, place);
}

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 on_host::Place place = on_host::Place::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  on_host::multiply(kHalf ? on_host::Element::kFloat16 : on_host::Element::kBFloat16, d, a, b,
                    place);
}

inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            on_host::Place place = on_host::Place::current()) {
  on_host::multiply(on_host::Element::kTf32, d, a, b, place);
}

inline void mma_16x8x32_bytes(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              on_host::Place place = on_host::Place::current()) {
  on_host::multiply_bytes(d, a, b, place);
}

inline uint32_t to_tf32(float x) {
  return on_host::to_tf32(x);
}

#else

// Loads four 8 x 8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix
// i, 16 aligned bytes. r[i] gets two neighbours of matrix i: row l / 4, columns 2 (l % 4) and the
// next.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// r[i] gets rows 2 (l % 4) and the next of matrix i, column l / 4.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices; only the first 16 lanes' addresses count, but all are valid.
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Stores four matrices, the reverse of load_matrix_x4. Of compute capability 9.0 and later.
__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// T is __half or __nv_bfloat16.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Operands as to_tf32 makes them.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A unsigned, B signed; the sums wrap around.
__device__ __forceinline__ void mma_16x8x32_bytes(int32_t (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to the 10 explicit bits of tf32, to nearest with ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

#endif

}  // namespace fused_resnet::device
