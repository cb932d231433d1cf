// Who stored to each word of global memory last, to find accesses of several blocks that nothing
// orders. Stores are seen by all at once here, so a missing fence never shows in a result.
//
// As the PTX memory model has it: a store is ordered before what another block does if a barrier
// (or the same thread) brings it to a fence, behind which the same thread does an atomic operation,
// which one of that other block's reads, behind which its thread has a fence, and a barrier. Blocks
// of a cluster are ordered by its barriers too.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_on_host/shared_accesses.h"

namespace fused_resnet::on_host {

class GlobalAccesses {
 public:
  // A thread and how far it is. `barriers` are those its block passed.
  struct Time {
    uint64_t block;
    unsigned thread;
    uint32_t barriers;
  };
  struct Store {
    Origin origin;
    uint32_t block = 0;
    uint32_t barriers = 0;
    uint32_t fences = 0;  // of the block, so far
    uint16_t thread = 0;
    uint16_t bytes = 0;  // of the word, one bit each; none where nothing was stored
  };

  void begin_grid();

  // The store before, if nothing orders it before this access; else null.
  const Store* unordered(const char* begin, size_t bytes, const Time& now);
  void store(const char* begin, size_t bytes, const Time& now, const Origin& origin);
  void fence(const Time& now);
  void atomic(const void* address, const Time& now);
  // Blocks of a cluster, each at its own time, are at a barrier of all.
  void join(const std::vector<Time>& blocks);

 private:
  // What a fence has gathered: the stores of a block before a barrier, and those of the thread with
  // the fence before that, if it was one thread's.
  struct Gathered {
    uint32_t block, barriers, fences;
    int thread;
    bool holds(const Store& store) const {
      return store.block == block &&
             (store.barriers < barriers || (store.thread == thread && store.fences <= fences));
    }
    bool operator==(const Gathered&) const = default;
  };
  using Stores = std::vector<Gathered>;

  // What the threads of a block know: one of them at once, the others behind a barrier.
  struct Known {
    Gathered stores;
    unsigned thread;
    uint32_t barriers;
  };
  struct Block {
    uint32_t fences = 0;
    std::vector<Known> known;
    std::map<unsigned, Stores> seen;      // by threads' atomic operations, without a fence since
    std::map<unsigned, Stores> gathered;  // by threads' last fences
  };

  static constexpr size_t kWord = 4, kPage = 4096;
  using Page = std::array<Store, kPage / kWord>;

  static bool knows(const Block& block, const Store& store, const Time& now);
  Block& block_of(uint64_t number);
  Page* page_of(uintptr_t number);

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;  // null where nothing was stored
  std::unordered_map<uint64_t, Block> blocks_;
  uint64_t last_block_ = 0;
  Block* known_block_ = nullptr;
  std::unordered_map<const void*, Stores> handed_on_;  // through each atomic variable
};

}  // namespace fused_resnet::on_host
