// wgmma: D (+)= A B on tiles of 64 x kN that the four warps of a warpgroup share, asynchronously,
// with A and B in shared memory. Of compute capability 9.0a. All threads of the warpgroup take
// part.
//
// The kN / 2 sums of a thread are, with g = lane / 4, t = lane % 4 and w its warp in the warpgroup:
//   sums[4 j], sums[4 j + 1]       row 16 w + g, columns 8 j + 2 t and the next
//   sums[4 j + 2], sums[4 j + 3]   row 16 w + g + 8, the same columns
// A is 64 rows and B kN rows (the columns of the product) of 32 bytes each: 16 elements, or 8 of
// float32, of which a product reads tf32 and cuts the lower 13 bits off.
//
// From the first multiply on until wait_for_products the sums are the hardware's: nothing else may
// touch them. fence_sums stands between whatever last wrote them and the first multiply, and
// between a wait and the next. What lies in shared memory is read until the products are waited
// for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <type_traits>

#include "cuda/device/shared_memory.cuh"

namespace fused_resnet::device {

// Whether a kernel's body can have these instructions: the compilation's target, or the host.
#if defined(FUSED_RESNET_ON_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSED_RESNET_HAS_WARPGROUPS 1
#else
#define FUSED_RESNET_HAS_WARPGROUPS 0
#endif

// Where an operand lies in shared memory (PTX ISA, "Matrix descriptor format"). Addresses and
// distances are in units of 16 bytes.
struct MatrixDescriptor {
  uint64_t address : 14;
  uint64_t : 2;
  uint64_t leading : 14;  // of what is permuted by Swizzle::k128Bytes: not looked at
  uint64_t : 2;
  uint64_t stride : 14;  // from eight rows to the next eight
  uint64_t : 3;
  uint64_t base_offset : 3;  // of eight rows that begin at no multiple of 1024
  uint64_t : 10;
  uint64_t swizzle : 2;

  enum : uint64_t { kNone, k128Bytes, k64Bytes, k32Bytes };
};
static_assert(sizeof(MatrixDescriptor) == 8);

// Rows of 128 bytes, one after the other from a multiple of 1024 on, as TMA leaves them with
// Swizzle::k128Bytes; a product takes 32 bytes of each, from `first_byte` on.
__device__ __forceinline__ uint64_t rows_of_128_bytes(const void* shared, int first_byte = 0) {
  MatrixDescriptor descriptor{};
  descriptor.address = (shared_address(shared) + first_byte) >> 4;
  descriptor.leading = 1;
  descriptor.stride = 1024 >> 4;
  descriptor.swizzle = MatrixDescriptor::k128Bytes;
  return std::bit_cast<uint64_t>(descriptor);
}

// The descriptor of what lies `bytes` further along the rows, or at a later row.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

#ifdef FUSED_RESNET_ON_HOST

inline void fence_sums(on_host::Place place = on_host::Place::current()) {
  on_host::fence_sums(place);
}

template <typename T, int kN>
void multiply_warpgroup(float (&sums)[kN / 2], uint64_t a, uint64_t b, bool accumulate,
                        on_host::Place place = on_host::Place::current()) {
  static_assert(kN == 64 || kN == 128 || (kN == 256 && sizeof(T) == 2));
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16> ||
                std::is_same_v<T, float>);
  constexpr auto kElement = std::is_same_v<T, __half>  ? on_host::Element::kFloat16
                            : std::is_same_v<T, float> ? on_host::Element::kTf32
                                                       : on_host::Element::kBFloat16;
  on_host::multiply_warpgroup({kElement, kN, sums, a, b, accumulate}, place);
}

inline void commit_products(on_host::Place place = on_host::Place::current()) {
  on_host::commit_products(place);
}

template <int kLeft>
void wait_for_products(on_host::Place place = on_host::Place::current()) {
  on_host::wait_for_products(kLeft, place);
}

template <int kCount>
void take_registers(on_host::Place place = on_host::Place::current()) {
  on_host::change_registers(kCount, true, place);
}

template <int kCount>
void give_registers(on_host::Place place = on_host::Place::current()) {
  on_host::change_registers(kCount, false, place);
}

template <int kThreads>
void synchronize_threads(int barrier, on_host::Place place = on_host::Place::current()) {
  on_host::synchronize_threads(barrier, kThreads, place);
}

#else

__device__ __forceinline__ void fence_sums() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The sums' operands in the instruction's text, and in its list.
#define FUSED_RESNET_NAMES_64                \
  "%0, %1, %2, %3, %4, %5, %6, %7"           \
  ", %8, %9, %10, %11, %12, %13, %14, %15"   \
  ", %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSED_RESNET_NAMES_128               \
  FUSED_RESNET_NAMES_64                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39" \
  ", %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSED_RESNET_NAMES_256                       \
  FUSED_RESNET_NAMES_128                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71"         \
  ", %72, %73, %74, %75, %76, %77, %78, %79"         \
  ", %80, %81, %82, %83, %84, %85, %86, %87"         \
  ", %88, %89, %90, %91, %92, %93, %94, %95"         \
  ", %96, %97, %98, %99, %100, %101, %102, %103"     \
  ", %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FUSED_RESNET_SUMS_8(i)                                                               \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define FUSED_RESNET_SUMS_32(i)                                                    \
  FUSED_RESNET_SUMS_8(i), FUSED_RESNET_SUMS_8(i + 8), FUSED_RESNET_SUMS_8(i + 16), \
      FUSED_RESNET_SUMS_8(i + 24)
#define FUSED_RESNET_SUMS_64 FUSED_RESNET_SUMS_32(0)
#define FUSED_RESNET_SUMS_128 FUSED_RESNET_SUMS_64, FUSED_RESNET_SUMS_32(32)
#define FUSED_RESNET_SUMS_256 \
  FUSED_RESNET_SUMS_128, FUSED_RESNET_SUMS_32(64), FUSED_RESNET_SUMS_32(96)
// `a`, `b` and `flag` are the numbers of the operands behind the sums.
// `transposed` says for both operands that they are not, where there is a choice.
#define FUSED_RESNET_WGMMA(n, depth, type, transposed, a_name, b_name, flag_name)              \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred accumulate;\n"                                                               \
      "setp.ne.b32 accumulate, %" #flag_name                                                   \
      ", 0;\n"                                                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #n depth ".f32." type "." type                       \
      " {" FUSED_RESNET_NAMES_##n "}, %" #a_name ", %" #b_name ", accumulate, 1, 1" transposed \
                                  ";\n"                                                        \
                                  "}"                                                          \
      : FUSED_RESNET_SUMS_##n                                                                  \
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)))
#define FUSED_RESNET_WGMMA_16(n, type, a_name, b_name, flag_name) \
  FUSED_RESNET_WGMMA(n, "k16", type, ", 0, 0", a_name, b_name, flag_name)
#define FUSED_RESNET_WGMMA_TF32(n, a_name, b_name, flag_name) \
  FUSED_RESNET_WGMMA(n, "k8", "tf32", "", a_name, b_name, flag_name)

// sums = (accumulate ? sums : 0) + A B, begun here. The descriptors are the same in all threads. T
// is __half, __nv_bfloat16 or, for at most 128 columns, float.
template <typename T, int kN>
__device__ __forceinline__ void multiply_warpgroup(float (&sums)[kN / 2], uint64_t a, uint64_t b,
                                                   bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kN == 64) {
      FUSED_RESNET_WGMMA_16(64, "f16", 32, 33, 34);
    } else if constexpr (kN == 128) {
      FUSED_RESNET_WGMMA_16(128, "f16", 64, 65, 66);
    } else {
      FUSED_RESNET_WGMMA_16(256, "f16", 128, 129, 130);
    }
  } else if constexpr (std::is_same_v<T, float>) {
    static_assert(kN <= 128);
    if constexpr (kN == 64) {
      FUSED_RESNET_WGMMA_TF32(64, 32, 33, 34);
    } else {
      FUSED_RESNET_WGMMA_TF32(128, 64, 65, 66);
    }
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    if constexpr (kN == 64) {
      FUSED_RESNET_WGMMA_16(64, "bf16", 32, 33, 34);
    } else if constexpr (kN == 128) {
      FUSED_RESNET_WGMMA_16(128, "bf16", 64, 65, 66);
    } else {
      FUSED_RESNET_WGMMA_16(256, "bf16", 128, 129, 130);
    }
  }
}

#undef FUSED_RESNET_WGMMA_TF32
#undef FUSED_RESNET_WGMMA_16
#undef FUSED_RESNET_WGMMA
#undef FUSED_RESNET_SUMS_256
#undef FUSED_RESNET_SUMS_128
#undef FUSED_RESNET_SUMS_64
#undef FUSED_RESNET_SUMS_32
#undef FUSED_RESNET_SUMS_8
#undef FUSED_RESNET_NAMES_256
#undef FUSED_RESNET_NAMES_128
#undef FUSED_RESNET_NAMES_64

// Ends the group of products that the warp has begun since the last call.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the kLeft youngest groups of the warp are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Raises the registers of each of the warpgroup's threads to kCount, a multiple of 8; waits until
// other warpgroups have given as many back.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Lowers them.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A barrier of kThreads of the block, whole warps; `barrier` is 1 to 15.
template <int kThreads>
__device__ __forceinline__ void synchronize_threads(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

#endif

}  // namespace fused_resnet::device
