// mbarriers: what threads and asynchronous copies of a cluster meet at, in shared memory. Of
// compute capability 9.0 and later.
//
// A barrier goes from phase to phase. A phase ends when as many arrivals came as the barrier was
// initialised with and every byte that was announced has been copied; the next begins at once.
// Whoever waits names the parity of the phase it waits for, 0 for the first; a wait for the parity
// of the phase before the first returns at once. What was written before an arrival, and what the
// announced copies wrote, is seen by those who waited.
#pragma once

#include "cuda/device/shared_memory.cuh"

namespace fused_resnet::device {

struct alignas(8) Mbarrier {
  uint64_t state;
};

#ifdef FUSED_RESNET_ON_HOST

inline void initialize(Mbarrier* barrier, unsigned arrivals,
                       on_host::Place place = on_host::Place::current()) {
  on_host::initialize_mbarrier(barrier, arrivals, place);
}

inline void publish_mbarriers() {
  on_host::publish_mbarriers();
}

inline void arrive(Mbarrier* barrier, on_host::Place place = on_host::Place::current()) {
  on_host::arrive(barrier, 0, place);
}

inline void arrive_and_expect(Mbarrier* barrier, unsigned bytes,
                              on_host::Place place = on_host::Place::current()) {
  on_host::arrive(barrier, bytes, place);
}

inline void arrive_in_block(Mbarrier* barrier, unsigned rank,
                            on_host::Place place = on_host::Place::current()) {
  on_host::arrive_in_block(barrier, rank, place);
}

inline void wait(Mbarrier* barrier, unsigned parity,
                 on_host::Place place = on_host::Place::current()) {
  on_host::wait_for_phase(barrier, parity, place);
}

#else

// By one thread, before any other use. `arrivals` of each phase.
__device__ __forceinline__ void initialize(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes barriers that this thread initialised known to copies and to other blocks; a barrier of the
// block or cluster has to follow.
__device__ __forceinline__ void publish_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Announces copies of so many bytes and arrives.
__device__ __forceinline__ void arrive_and_expect(Mbarrier* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives at the barrier that lies in another block of the cluster where `barrier` is in this one.
__device__ __forceinline__ void arrive_in_block(Mbarrier* barrier, unsigned rank) {
  asm volatile(
      "{\n"
      ".reg .b32 address;\n"
      "mapa.shared::cluster.u32 address, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [address];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Whether the phase has ended; the hardware lets the thread sleep a while before it says no.
__device__ __forceinline__ bool try_wait(Mbarrier* barrier, unsigned parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

__device__ __forceinline__ void wait(Mbarrier* barrier, unsigned parity) {
  while (!try_wait(barrier, parity)) {
  }
}

#endif

}  // namespace fused_resnet::device
