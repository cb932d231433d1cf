// A running block: what csrc/cuda_on_host's own files share.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda_on_host/execution.h"
#include "cuda_on_host/fiber.h"
#include "cuda_on_host/memory.h"
#include "cuda_on_host/shared_accesses.h"

namespace fused_resnet::on_host {

struct Settings {
  uint64_t seed = 0;
  int processors = 4;  // few, so that the kernels' loops over what a grid does not cover run
};
extern Settings settings;

struct Statistics {
  int64_t blocks, threads, barriers, multiplications;
  // Through csrc/cuda/device's loads and copies, by the logarithm of their bytes.
  std::array<int64_t, 5> loads;
};
extern Statistics statistics;

// xorshift64*
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) { next(); }
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  uint64_t below(uint64_t bound) { return (next() >> 32) % bound; }

 private:
  uint64_t state_;
};

// What a thread does that does not run, or did last.
enum class State : uint8_t { kAtBarrier, kAtClusterBarrier, kInWarp, kDone };
enum class Operation : uint8_t { kSynchronize, kVote, kShuffle, kLoadMatrices, kMultiply };

// What a lane brings to an operation of its warp.
struct Vote {
  bool predicate;
  uint32_t ballot;
};
struct Shuffle {
  uint64_t value, result;
  int source_lane;
};
struct LoadMatrices {
  uint32_t* registers;
  int count;
  const void* row;
  bool transposed;
};
struct Multiply {
  Element element;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// A cp.async on its way.
struct Copy {
  char* target;
  std::array<char, 16> data;
  int bytes;
  int group;
};

struct Thread {
  Fiber fiber;
  const char* stack_begin;
  const char* stack_end;
  unsigned index;
  State state;
  Operation operation;  // of the warp, while it waits in one; so are mask and place
  uint32_t mask;
  Place place;
  bool accesses;  // `place` is where memory is accessed
  std::vector<Copy> copies;
  int groups;  // of copies, committed so far
};

struct Warp {
  // Lanes that came to the same operation.
  struct Group {
    Operation operation;
    uint32_t mask, arrived;
  };
  uint32_t ready;
  uint16_t barriers;  // __syncwarp, so far
  unsigned rotation;  // with `backwards`, the order in which ready lanes go on
  bool backwards;
  unsigned group_count;
  std::array<Group, 32> groups;
  std::array<void*, 32> payloads;

  void shuffle(Random& random) {
    const uint64_t bits = random.next();
    rotation = bits >> 40 & 31;
    backwards = bits >> 50 & 1;
  }
  unsigned first_ready() const {
    const uint32_t turned = std::rotr(ready, static_cast<int>(rotation));
    const int place = backwards ? 31 - std::countl_zero(turned) : std::countr_zero(turned);
    return (place + rotation) & 31;
  }
};

// The blocks of a grid run in one of these, one after the other, or in one for each of a cluster.
class Block {
 public:
  Block();
  void prepare(const GridShape& shape, void (*function)(void*), void* argument);
  void begin(const uint3& index, uint64_t seed);
  // Goes on to the end, or to a barrier of the cluster. Throws a Fault.
  void resume();
  bool has_ended() const { return done_count_ == thread_count_; }

  // The blocks of this one's cluster, and its place among them.
  void join(const std::vector<std::unique_ptr<Block>>* cluster, unsigned rank) {
    cluster_ = cluster;
    rank_ = rank;
  }
  unsigned rank() const { return rank_; }
  // When all of them wait at a barrier, or have ended: lets this one pass. Throws a Fault where
  // what the others read here since the last barrier was written, or may be gone, by then.
  void open_cluster_barrier();
  [[noreturn]] void fail_at_cluster_barrier(const Block& ended) const;

  // For the thread that runs.
  int synchronize(bool predicate, const Place& place);
  void synchronize_cluster(const Place& place);
  void load_from_block(void* target, const void* shared, unsigned rank, size_t bytes,
                       const Origin& origin);
  void in_warp(Operation operation, uint32_t mask, void* payload, const Place& place);
  void check_alignment(const void* address, size_t bytes, const Origin& origin);
  // Also that it is within bounds and, in shared memory, initialised and ordered by barriers.
  void check_access(const void* address, size_t bytes, size_t alignment, bool writes,
                    const Origin& origin) {
    const char* begin = static_cast<const char*>(address);
    if (begin >= current->stack_begin && begin < current->stack_end) return;
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
      check_alignment(address, alignment, origin);
    }
    if (is_shared(begin)) {
      check_shared(begin, bytes, writes, origin);
    } else {
      check_global(begin, bytes, origin);
    }
  }
  bool is_shared(const char* address) const {
    return address >= shared_->begin() && address < shared_->end();
  }
  void start_copy(const Copy& copy, const Origin& origin);
  void finish_copy(const Copy& copy);
  void write_atomically(const void* address, size_t bytes);
  [[noreturn]] void fail_at(const std::string& message, const Origin& origin);
  [[noreturn]] void fail_after_signal();

  // Memory accessed in between is accessed on behalf of `place`.
  void begin_access(const Place& place) {
    current->place = place;
    current->accesses = true;
  }
  void end_access() { current->accesses = false; }

  Thread* current = nullptr;
  char* shared_begin = nullptr;

  // What a signal handler leaves for fail_after_signal, which runs on the spare stack.
  const char* signal_address = nullptr;
  bool signal_has_address = false;
  const void* signal_instruction = nullptr;
  char* spare_stack_end();

 private:
  static void thread_entry();
  [[noreturn]] void finish_thread();
  void go_on();
  void release_all();
  void enter(Thread& thread);
  Thread* next();
  [[noreturn]] void leave();
  [[noreturn]] void fail(const std::string& message);
  void carry_out(Operation operation, uint32_t mask, Warp& warp);
  void check_bounds(const char* begin, size_t bytes, const Origin& origin);
  void check_global(const char* begin, size_t bytes, const Origin& origin);
  void check_shared(const char* begin, size_t bytes, bool writes, const Origin& origin);
  SharedAccesses::Time now() const;
  std::string block_name() const;
  std::string where(const Thread& thread, const std::string& line) const;
  std::string doing(const Thread& thread) const;
  std::string describe_deadlock() const;

  void (*function_)(void*) = nullptr;
  void* argument_ = nullptr;
  unsigned thread_count_ = 0, warp_count_ = 0;
  std::vector<Thread> threads_;
  std::array<Warp, 32> warps_;
  std::vector<std::unique_ptr<GuardedPages>> stacks_;
  std::unique_ptr<GuardedPages> spare_stack_;
  std::unique_ptr<GuardedPages> shared_;
  size_t shared_bytes_ = 0;
  SharedAccesses shared_accesses_;
  bool late_copies_ = false;             // cp.async writes when it is waited for, else at once
  uint32_t barriers_ = 0;                // that the block passed; a new block counts as one
  std::array<TensorMemory, 8> tensors_;  // accessed lately
  unsigned next_tensor_ = 0;
  Fiber host_;

  Random random_;
  unsigned restlessness_ = 0;  // of 128 choices, how many may leave a warp that could go on
  unsigned current_warp_ = 0;
  unsigned done_count_ = 0;
  unsigned barrier_count_ = 0, first_at_barrier_ = 0;
  unsigned cluster_count_ = 0, first_at_cluster_barrier_ = 0;

  // A read by another block of the cluster since its last barrier, when this one had passed
  // `phase_` barriers.
  struct OutsideRead {
    size_t offset, bytes;
    std::string reader;
  };
  const std::vector<std::unique_ptr<Block>>* cluster_ = nullptr;
  unsigned rank_ = 0;
  uint3 index_{};
  uint32_t phase_ = 0;
  std::vector<OutsideRead> outside_reads_;
  int predicate_count_ = 0, predicate_result_ = 0;
  std::optional<std::string> fault_;
};

// The block that runs on this host thread, or null.
extern thread_local Block* running;

void load_matrices_of_warp(const Warp& warp);
void multiply_of_warp(const Warp& warp);

}  // namespace fused_resnet::on_host
