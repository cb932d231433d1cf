// Carries out CUDA kernels on the CPU and finds the mistakes in them: the interface behind
// csrc/cuda/device and the headers in include/. Test-only.
//
// A CUDA thread is a fiber. A block's fibers run one at a time, each until it has to wait for
// others: at a barrier, or in an operation of its warp, which the last lane to come carries out for
// all. Which fiber goes on is drawn from a seed, so a missing barrier shows as a difference between
// seeds where it does not show as a wrong result. Blocks run one after the other, in an order drawn
// likewise, or with half of the seeds several at once: these take turns at accesses to global
// memory, so that what a block reads may be half written. Blocks of a cluster take turns at its
// barriers, and at any time once an mbarrier is there.
//
// What Hopper does asynchronously, TMA's copies and a warpgroup's products, is done by turns at
// once, at some time or as late as can be: until then the target holds NaN. Accesses that no
// barrier, wait or proxy fence orders are faults, whatever was done when. So are accesses to global
// memory that another block stored to, with no fences and atomic operations (or barrier of their
// cluster) in between; stores of TMA's and what is read before another block stores are left out.
//
// A mistake ends the kernel with a Fault that names block, thread and source line.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace fused_resnet::device {
struct Im2col;
struct Tiles;
}  // namespace fused_resnet::device

namespace fused_resnet::on_host {

using Place = std::source_location;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void throw_error(const std::string& message);

struct GridShape {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes;
  unsigned cluster = 1;  // blocks side by side in x
};

// Calls `thread(argument)` for every thread of the grid.
void run_grid(const GridShape& shape, void (*thread)(void*), void* argument);

template <typename F>
void run_grid(const GridShape& shape, F& thread) {
  run_grid(shape, [](void* f) { (*static_cast<F*>(f))(); }, &thread);
}

// The rest is called by the threads of a running block.

char* shared_memory();
uint32_t shared_address(const void* shared);

// Waits for all threads of the block; returns how many of them gave a true predicate.
int synchronize_block(bool predicate, Place place);

// The block's place in its cluster; waiting for all of its blocks; and a load from the shared
// memory of one of them, where `shared` is in the caller's.
unsigned rank_in_cluster();
void synchronize_cluster(Place place);
void load_from_block(void* target, const void* shared, unsigned rank, size_t bytes, Place place);

void synchronize_warp(uint32_t mask, Place place);
uint32_t ballot(uint32_t mask, bool predicate, Place place);
uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, Place place);

// `bytes` is at most 16, and both addresses are multiples of it.
void load(void* target, const void* source, size_t bytes, Place place);
void store(void* target, const void* source, size_t bytes, Place place);

// __threadfence.
void fence_global_memory();

// Before an atomic operation.
void check_atomic(const void* address, size_t bytes, Place place);

void copy_async(void* shared, const void* global, int bytes, bool valid, Place place);
void commit_copies();
void wait_for_copies(int groups_left);

// ldmatrix; `count` registers.
void load_matrices(uint32_t* registers, int count, const void* row, bool transposed, Place place);

enum class Element { kFloat16, kBFloat16, kTf32 };

// mma.sync: m16n8k16 of 16-bit elements, m16n8k8 of tf32.
void multiply(Element element, float* d, const uint32_t* a, const uint32_t* b, Place place);

// mma.sync of m16n8k32: unsigned bytes by signed ones, into 32 bits that wrap around.
void multiply_bytes(int32_t* d, const uint32_t* a, const uint32_t* b, Place place);

// stmatrix; `count` registers.
void store_matrices(void* row, const uint32_t* registers, int count, Place place);

// mbarriers. `bytes` are announced before the arrival.
void initialize_mbarrier(void* barrier, unsigned arrivals, Place place);
void publish_mbarriers();
void arrive(void* barrier, unsigned bytes, Place place);
void arrive_in_block(void* barrier, unsigned rank, Place place);
void wait_for_phase(void* barrier, unsigned parity, Place place);

// bar.sync of some of the block's threads.
void synchronize_threads(int barrier, unsigned threads, Place place);

// TMA. `blocks` has a bit for each block of the cluster that a load goes to, none for this one.
struct BoxCopy {
  const void* map;
  void* shared;
  const int* at;
  int rank;
  const int* offset = nullptr;  // of an im2col map
  unsigned blocks = 0;
};
void encode_map(void* map, const device::Tiles& tiles);
void encode_map(void* map, const device::Im2col& im2col);
void load_box(const BoxCopy& copy, void* barrier, Place place);
void store_box(const BoxCopy& copy, Place place);
void commit_stores();
void wait_for_stores(int groups_left);
void fence_for_copies();

// wgmma of m64nNk16, and what stands around it.
struct WarpgroupMultiply {
  Element element;
  int n;
  float* sums;
  uint64_t a, b;
  bool accumulate;
};
void fence_sums(Place place);
void multiply_warpgroup(const WarpgroupMultiply& multiply, Place place);
void commit_products(Place place);
void wait_for_products(int groups_left, Place place);

// setmaxnreg.
void change_registers(unsigned count, bool takes, Place place);

int device_attribute(int attribute);

}  // namespace fused_resnet::on_host
