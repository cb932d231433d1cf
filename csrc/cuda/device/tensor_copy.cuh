// TMA: copies of boxes of a tensor between global and shared memory, which one thread starts and
// the hardware carries out. Of compute capability 9.0 and later.
//
// A TensorMap (cuda/device/tensor_map.h) says what the tensor is and what a box; an instruction
// says where the box begins, the innermost dimension first, in elements. What of a box lies outside
// of the tensor is loaded as zeros and not stored. A load counts all bytes of its box at an
// Mbarrier; stores are waited for in groups, as cp.async is.
//
// These copies go through another proxy than a thread's own loads and stores: between such accesses
// to shared memory and a copy from or to there stands a fence_for_copies of the thread that made
// them, and then a barrier with the thread that starts the copy.
#pragma once

#include "cuda/device/mbarrier.cuh"
#include "cuda/device/tensor_map.h"

namespace fused_resnet::device {

#ifdef FUSED_RESNET_ON_HOST

inline void prefetch(const TensorMap&) {}

template <int N>
void load_tile(const TensorMap& map, void* shared, Mbarrier* barrier, const int (&at)[N],
               on_host::Place place = on_host::Place::current()) {
  on_host::load_box({&map, shared, at, N}, barrier, place);
}

template <int N>
void load_tile_to_blocks(const TensorMap& map, void* shared, Mbarrier* barrier, uint16_t blocks,
                         const int (&at)[N], on_host::Place place = on_host::Place::current()) {
  on_host::load_box({&map, shared, at, N, nullptr, blocks}, barrier, place);
}

inline void load_pixels(const TensorMap& map, void* shared, Mbarrier* barrier, const int (&at)[4],
                        const int (&offset)[2], on_host::Place place = on_host::Place::current()) {
  on_host::load_box({&map, shared, at, 4, offset}, barrier, place);
}

inline void load_pixels_to_blocks(const TensorMap& map, void* shared, Mbarrier* barrier,
                                  uint16_t blocks, const int (&at)[4], const int (&offset)[2],
                                  on_host::Place place = on_host::Place::current()) {
  on_host::load_box({&map, shared, at, 4, offset, blocks}, barrier, place);
}

template <int N>
void store_tile(const TensorMap& map, const void* shared, const int (&at)[N],
                on_host::Place place = on_host::Place::current()) {
  on_host::store_box({&map, const_cast<void*>(shared), at, N}, place);
}

inline void commit_stores() {
  on_host::commit_stores();
}

template <int N>
void wait_until_stores_have_read() {
  on_host::wait_for_stores(N);
}

template <int N>
void wait_for_stores() {
  on_host::wait_for_stores(N);
}

inline void fence_for_copies() {
  on_host::fence_for_copies();
}

#else

// Fetches a map itself, which the first copy would else wait for.
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads a tile of two to four dimensions.
template <int N>
__device__ __forceinline__ void load_tile(const TensorMap& map, void* shared, Mbarrier* barrier,
                                          const int (&at)[N]) {
  static_assert(N >= 2 && N <= 4);
  const uint32_t target = shared_address(shared), counts_at = shared_address(barrier);
  if constexpr (N == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
        "l"(&map), "r"(counts_at), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (N == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
        "l"(&map), "r"(counts_at), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(&map), "r"(counts_at), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
}

// The same into several blocks of the cluster, a bit for each, at the same place in each; each
// block's own barrier counts what comes to that block.
template <int N>
__device__ __forceinline__ void load_tile_to_blocks(const TensorMap& map, void* shared,
                                                    Mbarrier* barrier, uint16_t blocks,
                                                    const int (&at)[N]) {
  static_assert(N >= 2 && N <= 4);
  const uint32_t target = shared_address(shared), counts_at = shared_address(barrier);
  if constexpr (N == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(counts_at), "h"(blocks), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (N == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(counts_at), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(counts_at), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
}

// Loads what one tap of consecutive windows sees, by an im2col map: `at` is {c, w, h, n} under the
// first tap of the first window, `offset` {w, h} how far the tap is from there.
__device__ __forceinline__ void load_pixels(const TensorMap& map, void* shared, Mbarrier* barrier,
                                            const int (&at)[4], const int (&offset)[2]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "h"(static_cast<uint16_t>(offset[0])), "h"(static_cast<uint16_t>(offset[1]))
      : "memory");
}

__device__ __forceinline__ void load_pixels_to_blocks(const TensorMap& map, void* shared,
                                                      Mbarrier* barrier, uint16_t blocks,
                                                      const int (&at)[4], const int (&offset)[2]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], {%8, %9}, %3;" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]),
      "r"(at[3]), "h"(static_cast<uint16_t>(offset[0])), "h"(static_cast<uint16_t>(offset[1]))
      : "memory");
}

// Stores a tile of two to four dimensions.
template <int N>
__device__ __forceinline__ void store_tile(const TensorMap& map, const void* shared,
                                           const int (&at)[N]) {
  static_assert(N >= 2 && N <= 4);
  const uint32_t source = shared_address(shared);
  if constexpr (N == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
            &map),
        "r"(source), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (N == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::
            "l"(&map),
        "r"(source), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
        "[%1];" ::"l"(&map),
        "r"(source), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
}

// Ends the group of this thread's stores since the last call.
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the N youngest groups of this thread have read shared memory, which may then
// be written again. A thread must not end before.
template <int N>
__device__ __forceinline__ void wait_until_stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Waits until they have written global memory too.
template <int N>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Orders this thread's accesses to shared memory before copies, and before products of a warpgroup,
// that a later barrier lets start.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace fused_resnet::device
