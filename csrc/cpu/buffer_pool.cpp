#include "cpu/buffer_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace fused_resnet::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// After so many allocations the bound on cached memory is measured anew.
constexpr int64_t kWindow = 1024;

// No allocation can be larger, and the sizes computed from it stay below SIZE_MAX.
constexpr size_t kMostBytes = static_cast<size_t>(std::numeric_limits<ptrdiff_t>::max()) / 2;
// The scratch memory a thread keeps; few layers need more, and theirs goes back to the pool.
constexpr size_t kMostKeptScratch = size_t{8} << 20;

// To AddressSanitizer a block ends where what was asked for ends, and is gone while nobody has it.
// It returns as NaN, for whoever reads what was not written.
void allow([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes,
           [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(memory, size);
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
  std::memset(memory, 0xff, bytes);
#endif
}
void forbid([[maybe_unused]] void* memory, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(memory, size);
#endif
}

// Four sizes to each power of two: at most a fifth of a buffer is unused.
size_t size_class(size_t bytes) {
  if (bytes > kMostBytes) throw std::bad_alloc();
  size_t step = 1024;
  while (bytes > step * 8) step *= 2;
  return (bytes + step - 1) / step * step;
}

void* system_allocate(size_t bytes) {
  if (bytes > kMostBytes) throw std::bad_alloc();
  const bool huge = bytes >= kHugePage;
  const size_t alignment = huge ? kHugePage : 64;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

class Pool {
 public:
  void* allocate(size_t bytes) {
    const size_t size = size_class(std::max<size_t>(bytes, 1));
    {
      std::lock_guard lock(mutex_);
      if (++allocations_ % kWindow == 0) start_window();
      // The most recently released one is the likeliest to be in a cache.
      for (auto block = free_.rbegin(); block != free_.rend(); ++block) {
        if (block->size != size) continue;
        void* memory = block->memory;
        free_.erase(std::next(block).base());
        cached_ -= size;
        size_of_[memory] = size;
        count_live(size);
        allow(memory, bytes, size);
        return memory;
      }
      ++system_allocations_;
    }
    void* memory = nullptr;
    try {
      memory = system_allocate(size);
    } catch (const std::bad_alloc&) {
      trim(0);
      memory = system_allocate(size);
    }
    std::lock_guard lock(mutex_);
    size_of_[memory] = size;
    count_live(size);
    trim_to_bound();
    allow(memory, bytes, size);
    return memory;
  }

  void release(void* memory) {
    std::lock_guard lock(mutex_);
    const auto entry = size_of_.find(memory);
    const size_t size = entry->second;
    size_of_.erase(entry);
    live_ -= size;
    forbid(memory, size);
    free_.push_back({memory, size});
    cached_ += size;
    trim_to_bound();
  }

  void trim(size_t keep) {
    std::lock_guard lock(mutex_);
    trim_locked(keep);
  }

  // Around a fork, so that the child does not inherit a lock whose owner it lacks.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  PoolStatistics statistics() {
    std::lock_guard lock(mutex_);
    return {static_cast<int64_t>(live_), static_cast<int64_t>(cached_), system_allocations_};
  }

 private:
  struct Block {
    void* memory;
    size_t size;
  };

  void count_live(size_t size) {
    live_ += size;
    window_peak_ = std::max(window_peak_, live_);
  }

  void start_window() {
    previous_peak_ = window_peak_;
    window_peak_ = live_;
    trim_to_bound();
  }

  // Live and cached memory together stay within twice the recent peak of what was live: a step's
  // backward pass wants other sizes than its forward pass has released.
  void trim_to_bound() { trim_locked(2 * std::max(window_peak_, previous_peak_) - live_); }

  // The least recently used go first.
  void trim_locked(size_t keep) {
    size_t dropped = 0;
    for (; dropped < free_.size() && cached_ > keep; ++dropped) {
      cached_ -= free_[dropped].size;
      std::free(free_[dropped].memory);
    }
    free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(dropped));
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order of their release
  std::unordered_map<void*, size_t> size_of_;
  size_t live_ = 0, cached_ = 0, window_peak_ = 0, previous_peak_ = 0;
  int64_t allocations_ = 0, system_allocations_ = 0;
};

// Scratch memory that waits for its thread's next task, or for pool_trim().
class KeptScratch {
 public:
  ScratchBlock* take() { return kept_.exchange(nullptr); }
  void put(ScratchBlock* block) { destroy(kept_.exchange(block)); }
  static void destroy(ScratchBlock* block);

 private:
  std::atomic<ScratchBlock*> kept_{nullptr};
};

// All threads' of it. It lies in the heap: in a forked child the other threads' own memory is gone.
class Threads {
 public:
  KeptScratch* add() {
    auto* scratch = new KeptScratch;
    std::lock_guard lock(mutex_);
    all_.push_back(scratch);
    return scratch;
  }
  void remove(KeptScratch* scratch) {
    {
      std::lock_guard lock(mutex_);
      all_.erase(std::find(all_.begin(), all_.end(), scratch));
    }
    scratch->put(nullptr);
    delete scratch;
  }
  void drop_scratch() {
    std::lock_guard lock(mutex_);
    for (KeptScratch* scratch : all_) scratch->put(nullptr);
  }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::vector<KeptScratch*> all_;
};

// Whole huge pages from the system, which unmap() gives back to it at once: the allocator would
// keep what lies below a block that is still in use.
char* map(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(memory);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head > 0) munmap(begin, head);
  munmap(begin + head + bytes, kHugePage - head);
#if defined(__linux__)
  madvise(begin + head, bytes, MADV_HUGEPAGE);
#endif
  return begin + head;
}

// Packed weights side by side in chunks of huge pages, those of half a chunk and more in chunks of
// their own. Each by itself would lie in pages of 4 KiB: a network's are tens of megabytes, more
// than the translation buffers cover, and reading them, which every call does, would go at half the
// speed. A chunk lives as long as a weight in it.
class WeightArena {
 public:
  void* allocate(size_t bytes) {
    if (bytes > kMostBytes) throw std::bad_alloc();
    bytes = (std::max<size_t>(bytes, 1) + 63) / 64 * 64;
    std::lock_guard lock(mutex_);
    if (bytes >= kChunk / 2) return add_chunk((bytes + kHugePage - 1) / kHugePage * kHugePage);
    if (current_ == nullptr || used_ + bytes > kChunk) {
      current_ = add_chunk(kChunk);
      used_ = 0;
    } else {
      ++chunks_[current_].weights;
    }
    char* memory = current_ + used_;
    used_ += bytes;
    return memory;
  }

  void release(void* memory) {
    std::lock_guard lock(mutex_);
    const auto chunk = std::prev(chunks_.upper_bound(static_cast<char*>(memory)));
    if (--chunk->second.weights > 0) return;
    if (chunk->first == current_) current_ = nullptr;
    munmap(chunk->first, chunk->second.bytes);
    chunks_.erase(chunk);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Chunk {
    size_t bytes;
    int64_t weights;
  };
  static constexpr size_t kChunk = 2 * kHugePage;

  char* add_chunk(size_t bytes) {
    char* const begin = map(bytes);
    chunks_[begin] = {bytes, 1};
    return begin;
  }

  std::mutex mutex_;
  std::map<char*, Chunk> chunks_;  // by their beginning
  char* current_ = nullptr;
  size_t used_ = 0;
};

// Never destroyed: tensors and threads may outlive static destruction. Made when the library is
// loaded: a fork during a first use would leave a child that waits for its end.
Pool* const pool = new Pool;
Threads* const threads = new Threads;
WeightArena* const weight_arena = new WeightArena;

// A child must not inherit a lock whose owner it lacks. In the order of drop_scratch().
[[maybe_unused]] const int fork_handlers = pthread_atfork(
    [] {
      threads->lock();
      pool->lock();
      weight_arena->lock();
    },
    [] {
      weight_arena->unlock();
      pool->unlock();
      threads->unlock();
    },
    [] {
      weight_arena->unlock();
      pool->unlock();
      threads->unlock();
    });

void KeptScratch::destroy(ScratchBlock* block) {
  if (block == nullptr) return;
  pool->release(block->memory);
  delete block;
}

KeptScratch& kept_by_this_thread() {
  struct Kept {
    KeptScratch* const scratch = threads->add();
    ~Kept() { threads->remove(scratch); }
  };
  thread_local const Kept kept;
  return *kept.scratch;
}

}  // namespace

void* pool_allocate(size_t bytes) {
  return pool->allocate(bytes);
}
void pool_release(void* memory) {
  pool->release(memory);
}
void* weight_allocate(size_t bytes) {
  return weight_arena->allocate(bytes);
}
void weight_release(void* memory) {
  weight_arena->release(memory);
}
PoolStatistics pool_statistics() {
  return pool->statistics();
}
void pool_trim() {
  threads->drop_scratch();
  pool->trim(0);
}

Scratch::Scratch(size_t bytes) : block_(kept_by_this_thread().take()) {
  if (block_ != nullptr && block_->size >= bytes) {
    allow(block_->memory, bytes, block_->size);
    return;
  }
  KeptScratch::destroy(block_);
  block_ = nullptr;
  std::unique_ptr<ScratchBlock> block(new ScratchBlock{nullptr, bytes});
  block->memory = pool->allocate(bytes);
  block_ = block.release();
}

Scratch::~Scratch() {
  if (block_->size <= kMostKeptScratch) {
    forbid(block_->memory, block_->size);
    kept_by_this_thread().put(block_);
  } else {
    KeptScratch::destroy(block_);
  }
}

}  // namespace fused_resnet::cpu
