// Memory for the outputs of the CPU backend's operators.
//
// A freshly mapped page costs more than the arithmetic that fills it: with the system's allocator a
// ResNet-50 at batch 8 spends a tenth of its time in page faults, because freed activations go back
// to the operating system. The pool keeps them: a tensor's memory returns here when its last
// reference dies, wherever that happens, and serves the next layer that fits. What is kept is
// bounded by the most that was in use at once in the recent past.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_resnet::cpu {

// Uninitialised memory of at least `bytes`, aligned to 64 bytes. Throws std::bad_alloc.
void* pool_allocate(size_t bytes);
void pool_release(void* memory);

// The same for packed weights, which live long and are read by every call: small ones share huge
// pages, and are not in the pool's statistics.
void* weight_allocate(size_t bytes);
void weight_release(void* memory);

struct PoolStatistics {
  int64_t live_bytes, cached_bytes, system_allocations;
};
PoolStatistics pool_statistics();

// Returns cached memory to the system, threads' scratch memory that is not in use included.
void pool_trim();

struct ScratchBlock {
  void* memory;
  size_t size;
};

// Scratch memory of the pool for the time of a task. A thread keeps it between tasks, so that it
// finds it in its cache.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return block_->memory; }

 private:
  ScratchBlock* block_;
};

}  // namespace fused_resnet::cpu
