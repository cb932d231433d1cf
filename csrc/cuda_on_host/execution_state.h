// A running block: what csrc/cuda_on_host's own files share.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda_on_host/execution.h"
#include "cuda_on_host/fiber.h"
#include "cuda_on_host/global_accesses.h"
#include "cuda_on_host/memory.h"
#include "cuda_on_host/order.h"
#include "cuda_on_host/shared_accesses.h"

namespace fused_resnet::on_host {

struct Settings {
  uint64_t seed = 0;
  int processors = 4;  // few, so that the kernels' loops over what a grid does not cover run
  // Blocks, or clusters of them, that run at the same time, and of how many accesses to global
  // memory others run before one; 0 for what is drawn from the seed.
  unsigned at_once = 0, accesses_a_turn = 0;
  // Whether accesses of several blocks that nothing orders are faults. Without, what they do to the
  // results shows.
  bool orders_global_accesses = true;
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
enum class State : uint8_t {
  kAtBarrier,
  kAtClusterBarrier,
  kAtNamedBarrier,
  kAtMbarrier,
  kAwaitsRegisters,
  kInWarp,
  kDone
};
enum class Operation : uint8_t {
  kSynchronize,
  kVote,
  kShuffle,
  kLoadMatrices,
  kMultiply,
  kMultiplyBytes,
  kStoreMatrices,
  kFenceSums,
  kMultiplyWarpgroup,
  kCommitProducts,
  kWaitForProducts,
  kChangeRegisters
};

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
struct MultiplyBytes {
  int32_t* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct StoreMatrices {
  const uint32_t* registers;
  int count;
  void* row;
};
struct ChangeRegisters {
  unsigned count;
  bool takes;
};

// What an instruction of TMA's says to copy.
struct Box {
  const void* map;
  std::array<int, 4> at;
  std::array<int, 2> offset;
};

// A cp.async on its way.
struct Copy {
  char* target;
  std::array<char, 16> data;
  int bytes;
  int group;
};

// A store of TMA's on its way.
struct BoxStore {
  Box box;
  char* source;
  int group;
  uint64_t number;  // of its read of shared memory
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
  int groups;           // of copies, committed so far
  const void* barrier;  // the mbarrier it waits at
  unsigned number;      // of the named barrier, the parity or the registers that it waits for
  std::vector<BoxStore> stores;
  int store_groups;  // committed so far
};

// A warp's products of one warpgroup instruction, which its threads' sums wait for.
struct Product {
  WarpgroupMultiply multiply;
  size_t sums;  // index of the accumulators
  int group;
  std::vector<uint64_t> reads;  // the numbers of what it reads
};
struct Accumulators {
  std::array<float*, 32> sums;  // of each lane
  int n;
  std::vector<float> values;  // 16 rows
};
struct Products {
  bool is_fenced = false;
  std::vector<WarpgroupMultiply> begun;  // all of them, to be compared with the other warps'
  std::vector<Product> under_way;
  std::vector<Accumulators> accumulators;
  int groups = 0;      // committed so far
  uint32_t waits = 0;  // the warp's own time in Order
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
  unsigned registers;         // of each thread
  unsigned wanted_registers;  // more than that while it waits for them

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

struct Mbarrier {
  unsigned arrivals;  // of a phase
  unsigned missing;   // of this phase
  int64_t bytes;      // announced less copied, of this phase
  uint32_t phases;    // ended
  bool is_published;
  unsigned agent;    // in Order
  unsigned made_by;  // agent, and when
  uint32_t made_at;
  Origin origin;
  View arriving, arrived;  // what those know who arrived, and who may go on
};

class Block;

// What the blocks of a grid have in common.
struct Grid {
  GlobalAccesses accesses;
  // Of how many accesses to global memory other clusters run before one; 0 for none.
  unsigned accesses_a_turn = 0;
};

// Blocks that can reach each other's shared memory; one by itself where a grid has no clusters.
class Cluster {
 public:
  void prepare(const GridShape& shape, void (*function)(void*), void* argument, Grid* grid);
  void begin(uint64_t number, Random& random);
  // Lets one of its blocks go on, or a copy end, or a barrier open; whether there is more to do.
  // Throws a Fault.
  bool go_on();
  const std::vector<std::unique_ptr<Block>>& blocks() const { return blocks_; }

  // Keeps an order from now on.
  void keep_order();
  Order& order() { return order_; }
  GlobalAccesses& global_accesses() { return grid_->accesses; }
  // Whether others get their turn before the thread goes on; and before it accesses global memory.
  bool interrupts() { return order_.is_kept() && random_.below(16) == 0; }
  bool interrupts_access() {
    return grid_->accesses_a_turn != 0 && random_.below(grid_->accesses_a_turn) == 0;
  }
  uint32_t address() const { return address_; }

  // A load of TMA's into one block.
  struct Load {
    Box box;
    Block* block;
    size_t offset;  // in its shared memory
    uint64_t number;
    size_t barrier;  // offset
    unsigned thread;
    const Block* started_by;
    Origin origin;
  };
  void start(Load load);

 private:
  enum class Pace { kAtOnce, kAtAnyTime, kLate };
  void finish(size_t index);
  std::string describe_deadlock() const;

  std::vector<std::unique_ptr<Block>> blocks_;
  unsigned threads_ = 0;  // of a block
  Order order_;
  Grid* grid_ = nullptr;
  Random random_;
  Pace pace_ = Pace::kAtOnce;
  uint32_t address_ = 0;
  std::vector<Load> loads_;
};

// The blocks of a grid run in some of these, in each one after the other.
class Block {
 public:
  Block();
  void prepare(const GridShape& shape, void (*function)(void*), void* argument);
  // `number` counts the blocks of the grid.
  void begin(const uint3& index, uint64_t number, uint64_t seed);
  // Goes on until no thread can, or others get their turn. Throws a Fault.
  void resume();
  bool has_ended() const { return done_count_ == thread_count_; }
  bool can_go_on() const;
  bool is_at_cluster_barrier() const { return cluster_count_ == thread_count_; }

  // This one's cluster, and its place in there.
  void join(Cluster* cluster, unsigned rank) {
    cluster_ = cluster;
    rank_ = rank;
  }
  unsigned rank() const { return rank_; }
  uint64_t number() const { return number_; }
  uint32_t barriers() const { return barriers_; }
  unsigned thread_count() const { return thread_count_; }
  // When all of them wait at a barrier, or have ended: lets this one pass. Throws a Fault where
  // what the others read here since the last barrier was written, or may be gone, by then.
  void open_cluster_barrier();
  [[noreturn]] void fail_at_cluster_barrier(const Block& ended) const;
  // What is said where no thread of a cluster can go on, of this block's: who waits for a thread
  // that waits elsewhere or has ended, and who waits at an mbarrier and the like. Empty where
  // nobody does.
  std::string describe_divergence() const;
  std::string describe_waiters() const;

  // For the thread that runs.
  int synchronize(bool predicate, const Place& place);
  void synchronize_cluster(const Place& place);
  void load_from_block(void* target, const void* shared, unsigned rank, size_t bytes,
                       const Origin& origin);
  void synchronize_threads(unsigned number, unsigned threads, const Place& place);
  void initialize_mbarrier(void* barrier, unsigned arrivals, const Place& place);
  void publish_mbarriers();
  void arrive(void* barrier, unsigned bytes, const Place& place);
  void arrive_in_block(void* barrier, unsigned rank, const Place& place);
  void wait_for_phase(void* barrier, unsigned parity, const Place& place);
  void load_box(const BoxCopy& copy, void* barrier, const Place& place);
  void store_box(const BoxCopy& copy, const Place& place);
  void wait_for_stores(int groups_left);
  void fence_for_copies() { keep_order().fence(agent_of(current->index)); }
  void change_registers(unsigned count, bool takes, const Place& place);
  uint32_t address_of(const char* shared) const;
  void check_warpgroup_ends();

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
      check_global(begin, bytes, writes, origin);
    }
  }
  bool is_shared(const char* address) const {
    return address >= shared_->begin() && address < shared_->end();
  }
  // For a load that was started: of this block.
  void finish_load(const Cluster::Load& load);

  void start_copy(const Copy& copy, const Origin& origin);
  void finish_copy(const Copy& copy);
  // Other blocks may run before the thread accesses global memory.
  void let_others_run();
  void write_atomically(const void* address, size_t bytes);
  void fence_global_memory();
  GlobalAccesses::Time global_time() const { return {number_, current->index, barriers_}; }
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
  void carry_out(Operation operation, uint32_t mask, unsigned warp);
  void check_bounds(const char* begin, size_t bytes, const Origin& origin);
  void check_global_bounds(const char* begin, size_t bytes, const Origin& origin);
  void check_global(const char* begin, size_t bytes, bool writes, const Origin& origin);
  void check_shared(const char* begin, size_t bytes, bool writes, const Origin& origin);
  SharedAccesses::Time now() const;
  std::string block_name() const;
  std::string where(const Thread& thread, const std::string& line) const;
  std::string doing(const Thread& thread) const;
  Order& keep_order() {
    cluster_->keep_order();
    return cluster_->order();
  }
  unsigned agent_of(unsigned thread) const { return rank_ * thread_count_ + thread; }
  void join_all_views(uint32_t warp_mask, unsigned first, unsigned count);
  Mbarrier& mbarrier_at(const void* barrier, const Origin& origin);
  Mbarrier* published_mbarrier(size_t offset, const char* what, const Origin& origin);
  void wait_as(State state, const Place& place);
  void make_ready(Thread& thread) { warps_[thread.index / 32].ready |= 1u << thread.index % 32; }
  void end_phase_if_complete(size_t offset, Mbarrier& barrier);
  void check_not_mbarrier(size_t begin, size_t end, const Origin& origin);
  void grant_registers();
  void finish_store(const BoxStore& store);
  void store_matrices_of_warp(const Warp& warp);
  void multiply_of_warpgroup(unsigned warp);
  void carry_out(unsigned warp, const Product& product);  // its rows of the product
  void wait_for_products_of(unsigned warp, int groups_left);
  void change_registers_of(unsigned warp);

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
  Cluster* cluster_ = nullptr;
  unsigned rank_ = 0;
  uint3 index_{};
  uint64_t number_ = 0;
  uint32_t phase_ = 0;
  std::vector<OutsideRead> outside_reads_;
  int predicate_count_ = 0, predicate_result_ = 0;

  // Of the threads that wait at one of bar.sync's barriers.
  struct NamedBarrier {
    unsigned threads = 0;
    std::vector<unsigned> waiting;
  };
  std::array<NamedBarrier, 16> named_barriers_;
  std::map<size_t, Mbarrier> mbarriers_;  // by offset
  std::array<Products, 32> products_;     // of each warp
  unsigned free_registers_ = 0;           // that warps gave back
  std::optional<std::string> fault_;
};

// In the grid, of the block that this number counts to.
uint3 index_of(uint64_t block);

// The block that runs on this host thread, or null.
extern thread_local Block* running;

void load_matrices_of_warp(const Warp& warp);
void multiply_of_warp(const Warp& warp);
void multiply_bytes_of_warp(const Warp& warp);

}  // namespace fused_resnet::on_host
