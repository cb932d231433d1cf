// Blocks, their threads' turns, barriers and operations of a warp; the checks of what they access.
#include "cuda_on_host/execution.h"

#include <cuda_runtime.h>
#include <signal.h>
#include <ucontext.h>

#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <vector>

#include "cuda_on_host/execution_state.h"
#include "cuda_on_host/fiber.h"
#include "cuda_on_host/memory.h"

thread_local uint3 threadIdx;
thread_local uint3 blockIdx;
thread_local dim3 blockDim;
thread_local dim3 gridDim;

namespace fused_resnet::on_host {

Settings settings;
Statistics statistics;
thread_local Block* running = nullptr;

namespace {

constexpr size_t kStackBytes = 96 << 10;
// Stacks begin at different places within a page: threads do the same at the same depth, which
// would compete for the same few lines of the cache.
constexpr size_t kStackStagger = 1088;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostSharedBytes = 227 << 10;  // compute capability 9.0
constexpr size_t kSharedAlignment = 128;
constexpr unsigned kMostBlocksOfCluster = 8;
constexpr unsigned kMostTurns = 10;       // of a block before another's, their logarithm
constexpr unsigned kRegisters = 1 << 16;  // of a block that has its multiprocessor alone

const char* name(Operation operation) {
  switch (operation) {
    case Operation::kSynchronize:
      return "__syncwarp";
    case Operation::kVote:
      return "a vote";
    case Operation::kShuffle:
      return "a shuffle";
    case Operation::kLoadMatrices:
      return "ldmatrix";
    case Operation::kMultiply:
    case Operation::kMultiplyBytes:
      return "mma";
    case Operation::kStoreMatrices:
      return "stmatrix";
    case Operation::kFenceSums:
      return "wgmma.fence";
    case Operation::kMultiplyWarpgroup:
      return "wgmma";
    case Operation::kCommitProducts:
      return "wgmma.commit_group";
    case Operation::kWaitForProducts:
      return "wgmma.wait_group";
    case Operation::kChangeRegisters:
      return "setmaxnreg";
  }
  return "";
}

bool same_line(const Place& a, const Place& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

}  // namespace

uint3 index_of(uint64_t block) {
  return {static_cast<unsigned>(block % gridDim.x),
          static_cast<unsigned>(block / gridDim.x % gridDim.y),
          static_cast<unsigned>(block / gridDim.x / gridDim.y)};
}

void throw_error(const std::string& message) {
  throw Fault("cuda_on_host: " + message);
}

Block::Block() : threads_(kMostThreads) {
  for (unsigned i = 0; i < kMostThreads; ++i) threads_[i].index = i;
}

void Block::prepare(const GridShape& shape, void (*thread_function)(void*), void* argument) {
  if (shape.threads == 0 || shape.threads > kMostThreads) {
    throw_error("a block of " + std::to_string(shape.threads) + " threads");
  }
  if (shape.shared_bytes > kMostSharedBytes) {
    throw_error(std::to_string(shape.shared_bytes) + " bytes of shared memory");
  }
  tensors_ = {};
  function_ = thread_function;
  argument_ = argument;
  thread_count_ = shape.threads;
  warp_count_ = (thread_count_ + 31) / 32;
  while (stacks_.size() < thread_count_) {
    stacks_.push_back(std::make_unique<GuardedPages>(kStackBytes));
  }
  if (!shared_ || shared_bytes_ != shape.shared_bytes) {
    shared_bytes_ = shape.shared_bytes;
    shared_ = std::make_unique<GuardedPages>(std::max<size_t>(shared_bytes_, 1));
    // It begins as aligned as on a GPU, so it may end a little before the guard page.
    shared_begin = shared_->end() -
                   (shared_bytes_ + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  }
}

void Block::begin(const uint3& index, uint64_t number, uint64_t seed) {
  index_ = index;
  number_ = number;
  random_ = Random(seed);
  memset(shared_->begin(), 0xff, shared_->end() - shared_->begin());
  late_copies_ = random_.below(2);
  restlessness_ = std::array<unsigned, 4>{0, 1, 16, 128}[random_.below(4)];
  current_warp_ = random_.below(warp_count_);
  done_count_ = barrier_count_ = cluster_count_ = predicate_count_ = 0;
  outside_reads_.clear();
  fault_.reset();
  for (NamedBarrier& barrier : named_barriers_) barrier.waiting.clear();
  mbarriers_.clear();
  free_registers_ = 0;
  for (unsigned w = 0; w < warp_count_; ++w) {
    const unsigned lanes = std::min(32u, thread_count_ - 32 * w);
    warps_[w] = {};
    warps_[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps_[w].registers = warps_[w].wanted_registers = kRegisters / thread_count_ / 8 * 8;
    warps_[w].shuffle(random_);
    products_[w] = {};
  }
  for (unsigned i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    thread.copies.clear();
    thread.groups = 0;
    thread.stores.clear();
    thread.store_groups = 0;
    thread.accesses = false;
    const GuardedPages& stack = *stacks_[i];
    thread.stack_begin = stack.begin();
    thread.stack_end = stack.end();
    prepare_fiber(thread.fiber, stack.begin(), stack.end() - i % 32 * kStackStagger,
                  &Block::thread_entry);
  }
  shared_accesses_.begin_block(shared_bytes_, phase_ = ++barriers_);
  statistics.blocks += 1;
  statistics.threads += thread_count_;
}

void Block::resume() {
  running = this;
  blockIdx = index_;
  enter(*next());
  switch_fiber(host_, current->fiber);
  running = nullptr;
  if (fault_) throw Fault("cuda_on_host: " + *fault_);
}

void Block::thread_entry() {
  running->function_(running->argument_);
  running->finish_thread();
}

void Block::finish_thread() {
  if (!products_[current->index / 32].under_way.empty()) {
    fail_at("unfinished product: a thread ends that has not waited for one", current->place);
  }
  if (!current->stores.empty()) {
    fail_at("unfinished copy: a thread ends that has not waited for its stores", current->place);
  }
  current->state = State::kDone;
  warps_[current->index / 32].ready &= ~(1u << current->index % 32);
  if (++done_count_ == thread_count_) {
    check_warpgroup_ends();
    leave();
  }
  go_on();
  __builtin_unreachable();
}

// Continues somewhere, in another block if none can go on here; returns when the calling thread is
// chosen.
void Block::go_on() {
  Thread* chosen = cluster_->interrupts() ? nullptr : next();
  if (!chosen) {
    Thread* from = current;
    switch_fiber(from->fiber, host_);
    return;
  }
  if (chosen == current) return;
  Thread* from = current;
  enter(*chosen);
  switch_fiber(from->fiber, chosen->fiber);
}

// Makes a thread the one that runs, short of switching to it.
void Block::enter(Thread& thread) {
  current = &thread;
  threadIdx.x = thread.index;
}

Thread* Block::next() {
  if (!warps_[current_warp_].ready || (restlessness_ && random_.below(128) < restlessness_)) {
    std::array<unsigned, kMostThreads / 32> runnable;
    unsigned count = 0;
    for (unsigned w = 0; w < warp_count_; ++w) {
      if (warps_[w].ready) runnable[count++] = w;
    }
    if (count == 0) return nullptr;
    current_warp_ = runnable[random_.below(count)];
  }
  return &threads_[32 * current_warp_ + warps_[current_warp_].first_ready()];
}

void Block::leave() {
  switch_fiber(current->fiber, host_);
  __builtin_unreachable();
}

void Block::fail(const std::string& message) {
  fault_ = message;
  leave();
}

void Block::fail_at(const std::string& message, const Origin& origin) {
  fail(message + ", " + where(*current, origin.line()));
}

namespace {

std::string name(const uint3& block) {
  std::ostringstream out;
  out << "(" << block.x << ", " << block.y << ", " << block.z << ")";
  return out.str();
}

}  // namespace

std::string Block::block_name() const {
  return name(index_);
}

std::string Block::where(const Thread& thread, const std::string& line) const {
  return "block " + block_name() + ", thread " + std::to_string(thread.index) + ", " + line;
}

std::string Block::doing(const Thread& thread) const {
  const std::string name_of_thread = "thread " + std::to_string(thread.index);
  switch (thread.state) {
    case State::kDone:
      return name_of_thread + " has ended";
    case State::kAtBarrier:
      return name_of_thread + " waits in __syncthreads at " + Origin(thread.place).line();
    case State::kAtClusterBarrier:
      return name_of_thread + " waits for its cluster at " + Origin(thread.place).line();
    case State::kAtNamedBarrier:
      return name_of_thread + " waits at a barrier of some threads at " +
             Origin(thread.place).line();
    case State::kAtMbarrier:
      return name_of_thread + " waits at an mbarrier at " + Origin(thread.place).line();
    case State::kAwaitsRegisters:
      return name_of_thread + " waits for registers at " + Origin(thread.place).line();
    case State::kInWarp:
      return name_of_thread + " waits in " + name(thread.operation) + " at " +
             Origin(thread.place).line();
  }
  return name_of_thread;
}

std::string Block::describe_divergence() const {
  const Thread* barrier = nullptr;
  for (unsigned i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == State::kAtBarrier && !barrier) barrier = &thread;
    if (thread.state != State::kInWarp) continue;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(thread.mask >> lane & 1)) continue;
      const std::string need = std::string("divergent warp: ") + name(thread.operation) +
                               " needs lane " + std::to_string(lane);
      const unsigned other = thread.index / 32 * 32 + lane;
      if (other >= thread_count_) {
        return need + ", which the block does not have, " +
               where(thread, Origin(thread.place).line());
      }
      const Thread& missing = threads_[other];
      if (missing.state != State::kInWarp || missing.operation != thread.operation ||
          missing.mask != thread.mask) {
        return need + ", but " + doing(missing) + ", " + where(thread, Origin(thread.place).line());
      }
    }
  }
  for (unsigned i = 0; barrier && i < thread_count_; ++i) {
    if (threads_[i].state != State::kAtBarrier) {
      return "divergent barrier: " + std::to_string(barrier_count_) + " of " +
             std::to_string(thread_count_) + " threads wait in __syncthreads, but " +
             doing(threads_[i]) + ", " + where(*barrier, Origin(barrier->place).line());
    }
  }
  for (unsigned i = 0; cluster_count_ > 0 && i < thread_count_; ++i) {
    if (threads_[i].state != State::kAtClusterBarrier) {
      const Thread& first = threads_[first_at_cluster_barrier_];
      return "divergent barrier: " + std::to_string(cluster_count_) + " of " +
             std::to_string(thread_count_) + " threads wait for their cluster, but " +
             doing(threads_[i]) + ", " + where(first, Origin(first.place).line());
    }
  }
  return "";
}

int Block::synchronize(bool predicate, const Place& place) {
  Thread& thread = *current;
  Thread& first = threads_[first_at_barrier_];
  thread.place = place;
  if (barrier_count_ == 0) {
    first_at_barrier_ = thread.index;
    predicate_count_ = 0;
  } else if (!same_line(first.place, place)) {
    fail_at("divergent barrier: " + doing(first) + " while others wait here", place);
  }
  predicate_count_ += predicate;
  thread.state = State::kAtBarrier;
  warps_[thread.index / 32].ready &= ~(1u << thread.index % 32);
  if (++barrier_count_ == thread_count_) {
    barrier_count_ = 0;
    ++barriers_;
    predicate_result_ = predicate_count_;
    join_all_views(~0u, 0, warp_count_);
    release_all();
  }
  go_on();
  return predicate_result_;
}

// Lets all threads pass a barrier.
void Block::release_all() {
  statistics.barriers += 1;
  for (unsigned w = 0; w < warp_count_; ++w) {
    const unsigned lanes = std::min(32u, thread_count_ - 32 * w);
    warps_[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps_[w].shuffle(random_);
  }
  current_warp_ = random_.below(warp_count_);
}

void Block::synchronize_cluster(const Place& place) {
  Thread& thread = *current;
  Thread& first = threads_[first_at_cluster_barrier_];
  thread.place = place;
  if (cluster_count_ == 0) {
    first_at_cluster_barrier_ = thread.index;
  } else if (!same_line(first.place, place)) {
    fail_at("divergent barrier: " + doing(first) + " while others wait here", place);
  }
  thread.state = State::kAtClusterBarrier;
  warps_[thread.index / 32].ready &= ~(1u << thread.index % 32);
  ++cluster_count_;
  go_on();  // the barrier is open when this thread's turn comes
}

void Block::open_cluster_barrier() {
  for (const OutsideRead& read : outside_reads_) {
    if (has_ended()) {
      throw_error("early end: block " + std::to_string(index_.x) +
                  " may have ended before its shared memory is read, " + read.reader);
    }
    if (!shared_accesses_.read_from_outside(read.offset, read.bytes, phase_)) {
      throw_error(shared_accesses_.complaint() + ", " + read.reader);
    }
  }
  outside_reads_.clear();
  if (has_ended()) return;
  cluster_count_ = 0;
  phase_ = ++barriers_;
  release_all();
}

void Block::fail_at_cluster_barrier(const Block& ended) const {
  const Thread& first = threads_[first_at_cluster_barrier_];
  throw_error("divergent barrier: block " + std::to_string(ended.index_.x) +
              " has ended while others wait for it, " + where(first, Origin(first.place).line()));
}

void Block::load_from_block(void* target, const void* shared, unsigned rank, size_t bytes,
                            const Origin& origin) {
  const char* const begin = static_cast<const char*>(shared);
  check_alignment(begin, bytes, origin);
  check_bounds(begin, bytes, origin);
  const size_t count = cluster_->blocks().size();
  if (rank >= count) {
    fail_at("out of bounds: block " + std::to_string(rank) + " of a cluster of " +
                std::to_string(count),
            origin);
  }
  const char* source = begin;
  if (rank == rank_) {
    check_shared(begin, bytes, false, origin);
  } else {
    Block& other = *cluster_->blocks()[rank];
    const size_t offset = begin - shared_begin;
    if (!other.shared_accesses_.read_from_outside(offset, bytes, other.phase_)) {
      fail_at(other.shared_accesses_.complaint(), origin);
    }
    other.outside_reads_.push_back({offset, bytes, where(*current, origin.line())});
    source = other.shared_begin + offset;
  }
  memcpy(target, source, bytes);
}

void Block::in_warp(Operation operation, uint32_t mask, void* payload, const Place& place) {
  Thread& thread = *current;
  const unsigned lane = thread.index % 32;
  Warp& warp = warps_[thread.index / 32];
  if (!(mask >> lane & 1)) {
    fail_at(std::string("divergent warp: ") + name(operation) +
                " is called by a lane that its mask leaves out",
            place);
  }
  thread.state = State::kInWarp;
  thread.operation = operation;
  thread.mask = mask;
  thread.place = place;
  warp.payloads[lane] = payload;
  warp.ready &= ~(1u << lane);

  unsigned g = 0;
  while (g < warp.group_count &&
         (warp.groups[g].operation != operation || warp.groups[g].mask != mask)) {
    ++g;
  }
  if (g == warp.group_count) warp.groups[warp.group_count++] = {operation, mask, 0};
  warp.groups[g].arrived |= 1u << lane;
  if (warp.groups[g].arrived == mask) {
    warp.groups[g] = warp.groups[--warp.group_count];
    carry_out(operation, mask, thread.index / 32);
    warp.ready |= mask;
    warp.shuffle(random_);
  }
  go_on();
}

void Block::carry_out(Operation operation, uint32_t mask, unsigned w) {
  Warp& warp = warps_[w];
  switch (operation) {
    case Operation::kSynchronize:
      ++warp.barriers;
      join_all_views(mask, w, 1);
      return;
    case Operation::kVote: {
      uint32_t ballot = 0;
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        ballot |= static_cast<uint32_t>(static_cast<Vote*>(warp.payloads[lane])->predicate) << lane;
      }
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        static_cast<Vote*>(warp.payloads[std::countr_zero(rest)])->ballot = ballot;
      }
      return;
    }
    case Operation::kShuffle:
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        Shuffle& shuffle = *static_cast<Shuffle*>(warp.payloads[std::countr_zero(rest)]);
        if (!(mask >> shuffle.source_lane & 1)) {
          fail_at("divergent warp: a shuffle reads lane " + std::to_string(shuffle.source_lane) +
                      ", which takes no part",
                  current->place);
        }
        shuffle.result = static_cast<Shuffle*>(warp.payloads[shuffle.source_lane])->value;
      }
      return;
    case Operation::kLoadMatrices:
      return load_matrices_of_warp(warp);
    case Operation::kMultiply:
      statistics.multiplications += 1;
      return multiply_of_warp(warp);
    case Operation::kMultiplyBytes:
      statistics.multiplications += 1;
      return multiply_bytes_of_warp(warp);
    case Operation::kStoreMatrices:
      return store_matrices_of_warp(warp);
    case Operation::kFenceSums:
      products_[w].is_fenced = true;
      return;
    case Operation::kMultiplyWarpgroup:
      return multiply_of_warpgroup(w);
    case Operation::kCommitProducts:
      ++products_[w].groups;
      return;
    case Operation::kWaitForProducts:
      return wait_for_products_of(w, *static_cast<const int*>(warp.payloads[0]));
    case Operation::kChangeRegisters:
      return change_registers_of(w);
  }
}

SharedAccesses::Time Block::now() const {
  Order& order = cluster_->order();
  return {current->index, barriers_, warps_[current->index / 32].barriers,
          order.is_kept() ? &order : nullptr, rank_ * thread_count_};
}

void Block::check_alignment(const void* address, size_t bytes, const Origin& origin) {
  const auto number = reinterpret_cast<uintptr_t>(address);
  if (number % bytes != 0) {
    const bool shared = is_shared(static_cast<const char*>(address));
    fail_at("misaligned access: " + std::to_string(bytes) + " bytes of " +
                (shared ? "shared" : "global") + " memory, " + std::to_string(number % bytes) +
                " past a multiple of that",
            origin);
  }
}

void Block::check_bounds(const char* begin, size_t bytes, const Origin& origin) {
  if (begin < shared_begin || begin + bytes > shared_begin + shared_bytes_) {
    fail_at("out of bounds: " + std::to_string(bytes) + " bytes at offset " +
                std::to_string(begin - shared_begin) + " of " + std::to_string(shared_bytes_) +
                " bytes of shared memory",
            origin);
  }
}

void Block::check_global_bounds(const char* begin, size_t bytes, const Origin& origin) {
  const TensorMemory* memory = nullptr;
  for (const TensorMemory& known : tensors_) {
    if (begin >= known.reach_begin && begin < known.reach_end) memory = &known;
  }
  if (!memory) {
    memory = &(tensors_[next_tensor_++ % tensors_.size()] = tensor_memory_at(begin));
  }
  if (memory->begin && (begin < memory->begin || begin + bytes > memory->end)) {
    fail_at("out of bounds: " + std::to_string(bytes) + " bytes at offset " +
                std::to_string(begin - memory->begin) + " of " +
                std::to_string(memory->end - memory->begin) + " bytes of a tensor",
            origin);
  }
}

void Block::let_others_run() {
  if (!cluster_->interrupts_access()) return;
  Thread* from = current;
  switch_fiber(from->fiber, host_);
}

void Block::check_global(const char* begin, size_t bytes, bool writes, const Origin& origin) {
  let_others_run();
  check_global_bounds(begin, bytes, origin);
  if (!settings.orders_global_accesses) return;
  GlobalAccesses& accesses = cluster_->global_accesses();
  if (const auto* store = accesses.unordered(begin, bytes, global_time())) {
    fail_at(std::string("race: a ") + (writes ? "write to" : "read of") +
                " global memory, which block " + name(index_of(store->block)) + ", thread " +
                std::to_string(store->thread) + " writes at " + store->origin.line() +
                " with no barrier, fence and atomic operation in between",
            origin);
  }
  if (writes) accesses.store(begin, bytes, global_time(), origin);
}

void Block::check_shared(const char* begin, size_t bytes, bool writes, const Origin& origin) {
  check_bounds(begin, bytes, origin);
  const size_t offset = begin - shared_begin;
  if (writes && !mbarriers_.empty()) check_not_mbarrier(offset, offset + bytes, origin);
  const bool fine = writes ? shared_accesses_.write(offset, bytes, now(), origin)
                           : shared_accesses_.read(offset, bytes, now(), origin);
  if (!fine) fail_at(shared_accesses_.complaint(), origin);
}

void Block::start_copy(const Copy& copy, const Origin& origin) {
  check_bounds(copy.target, copy.bytes, origin);
  if (!shared_accesses_.begin_copy(copy.target - shared_begin, copy.bytes, now(), origin)) {
    fail_at(shared_accesses_.complaint(), origin);
  }
  if (late_copies_) {
    memset(copy.target, 0xff, copy.bytes);
  } else {
    memcpy(copy.target, copy.data.data(), copy.bytes);
  }
  current->copies.push_back(copy);
}

void Block::finish_copy(const Copy& copy) {
  if (late_copies_) memcpy(copy.target, copy.data.data(), copy.bytes);
  shared_accesses_.end_copy(copy.target - shared_begin, copy.bytes, now());
}

void Block::write_atomically(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (is_shared(begin)) {
    shared_accesses_.write_atomically(begin - shared_begin, bytes);
  } else {
    cluster_->global_accesses().atomic(address, global_time());
  }
}

void Block::fence_global_memory() {
  cluster_->global_accesses().fence(global_time());
}

namespace {

Block& block() {
  if (!running) throw_error("a device function was called outside a kernel");
  return *running;
}

// Runs in the place of an instruction that faulted.
[[noreturn]] __attribute__((force_align_arg_pointer)) void leave_after_signal() {
  running->fail_after_signal();
}

struct sigaction previous_action;

void on_signal(int number, siginfo_t* info, void* context_pointer) {
  if (!running) {
    // Not ours: the instruction is tried again under the handler that was there before.
    sigaction(number, &previous_action, nullptr);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context_pointer)->uc_mcontext;
  running->signal_address = static_cast<const char*>(info->si_addr);
  running->signal_has_address = info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR;
#if defined(__x86_64__)
  running->signal_instruction = reinterpret_cast<void*>(registers.gregs[REG_RIP]);
  registers.gregs[REG_RSP] = reinterpret_cast<greg_t>(running->spare_stack_end());
  registers.gregs[REG_RIP] = reinterpret_cast<greg_t>(&leave_after_signal);
#elif defined(__aarch64__)
  running->signal_instruction = reinterpret_cast<void*>(registers.pc);
  registers.sp = reinterpret_cast<uintptr_t>(running->spare_stack_end());
  registers.pc = reinterpret_cast<uintptr_t>(&leave_after_signal);
#endif
}

// Faults are handled on a stack of their own, since a fiber's may be what ran out.
class SignalStack {
 public:
  SignalStack() {
    stack_t stack{};
    stack.ss_sp = memory_.data();
    stack.ss_size = memory_.size();
    sigaltstack(&stack, &previous_);
  }
  ~SignalStack() { sigaltstack(&previous_, nullptr); }

 private:
  std::array<char, 64 << 10> memory_;
  stack_t previous_;
};

void install_handler() {
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  struct sigaction before;
  sigaction(SIGSEGV, &action, &before);
  if (before.sa_sigaction != on_signal) previous_action = before;
}

}  // namespace

void Block::fail_after_signal() {
  const std::string line = source_line(signal_instruction);
  std::string what;
  if (!signal_has_address) {
    what = "misaligned access, or an address that cannot be";
  } else if (const GuardedPages& stack = *stacks_[current->index];
             signal_address < stack.begin() && signal_address >= stack.begin() - page_bytes()) {
    what = "the thread's stack overflows";
  } else {
    std::ostringstream address;
    address << static_cast<const void*>(signal_address);
    what = "out of bounds: an access to " + address.str() + ", where nothing is";
  }
  fail(what + ", " + where(*current, current->accesses ? Origin(current->place).line() : line));
}

char* Block::spare_stack_end() {
  if (!spare_stack_) spare_stack_ = std::make_unique<GuardedPages>(kStackBytes);
  return spare_stack_->end() - 8;
}

void run_grid(const GridShape& shape, void (*thread)(void*), void* argument) {
  if (running) throw_error("a kernel starts a kernel");
  static thread_local std::vector<std::unique_ptr<Cluster>> clusters;
  static thread_local Grid grid;
  static std::mutex one_grid_at_a_time;
  const std::lock_guard lock(one_grid_at_a_time);
  const SignalStack stack;
  install_handler();
  uint64_t count = uint64_t{shape.blocks.x} * shape.blocks.y * shape.blocks.z;
  if (shape.blocks.y > 65535 || shape.blocks.z > 65535 || count == 0) {
    throw_error("a grid of " + std::to_string(shape.blocks.x) + " x " +
                std::to_string(shape.blocks.y) + " x " + std::to_string(shape.blocks.z) +
                " blocks");
  }
  if (shape.cluster == 0 || shape.cluster > kMostBlocksOfCluster ||
      shape.blocks.x % shape.cluster != 0) {
    throw_error("clusters of " + std::to_string(shape.cluster) + " blocks in a grid of " +
                std::to_string(shape.blocks.x));
  }
  count /= shape.cluster;
  blockDim = dim3(shape.threads);
  gridDim = shape.blocks;
  grid.accesses.begin_grid();
  Random random(settings.seed);
  const uint64_t first = random.below(count);
  const bool backwards = random.below(2);
  // Half of the seeds run one block after the other, which finds what depends on their order alone.
  const unsigned drawn = std::array<unsigned, 4>{1, 1, 2, 4}[random.below(4)];
  const unsigned drawn_turn = random.below(2) ? 16 : 128;
  const uint64_t at_once = std::min<uint64_t>(settings.at_once ? settings.at_once : drawn, count);
  const unsigned turn = settings.accesses_a_turn ? settings.accesses_a_turn : drawn_turn;
  grid.accesses_a_turn = at_once > 1 ? turn : 0;
  while (clusters.size() < at_once) clusters.push_back(std::make_unique<Cluster>());
  std::vector<Cluster*> active, free;
  for (uint64_t i = 0; i < at_once; ++i) {
    clusters[i]->prepare(shape, thread, argument, &grid);
    free.push_back(clusters[i].get());
  }
  // One is ahead of the others for a while: up to so many turns.
  uint64_t chosen = 0, turns = 0;
  for (uint64_t begun = 0; begun < count || !active.empty();) {
    for (; begun < count && !free.empty(); ++begun) {
      free.back()->begin((first + (backwards ? count - begun : begun)) % count, random);
      active.push_back(free.back());
      free.pop_back();
    }
    if (turns-- == 0 || chosen >= active.size()) {
      chosen = active.size() > 1 ? random.below(active.size()) : 0;
      turns = random.below(uint64_t{1} << random.below(kMostTurns));
    }
    if (!active[chosen]->go_on()) {
      free.push_back(active[chosen]);
      active.erase(active.begin() + static_cast<ptrdiff_t>(chosen));
      turns = 0;
    }
  }
}

char* shared_memory() {
  return block().shared_begin;
}

uint32_t shared_address(const void* shared) {
  return block().address_of(static_cast<const char*>(shared));
}

int synchronize_block(bool predicate, Place place) {
  return block().synchronize(predicate, place);
}

unsigned rank_in_cluster() {
  return block().rank();
}

void synchronize_cluster(Place place) {
  block().synchronize_cluster(place);
}

void load_from_block(void* target, const void* shared, unsigned rank, size_t bytes, Place place) {
  block().load_from_block(target, shared, rank, bytes, place);
}

void synchronize_warp(uint32_t mask, Place place) {
  block().in_warp(Operation::kSynchronize, mask, nullptr, place);
}

uint32_t ballot(uint32_t mask, bool predicate, Place place) {
  Vote vote{predicate, 0};
  block().in_warp(Operation::kVote, mask, &vote, place);
  return vote.ballot;
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, Place place) {
  Shuffle shuffle{value, 0, source_lane};
  block().in_warp(Operation::kShuffle, mask, &shuffle, place);
  return shuffle.result;
}

void load(void* target, const void* source, size_t bytes, Place place) {
  Block& b = block();
  b.check_access(source, bytes, bytes, false, place);
  ++statistics.loads[std::countr_zero(bytes)];
  b.begin_access(place);
  memcpy(target, source, bytes);
  b.end_access();
}

void store(void* target, const void* source, size_t bytes, Place place) {
  Block& b = block();
  b.check_access(target, bytes, bytes, true, place);
  b.begin_access(place);
  memcpy(target, source, bytes);
  b.end_access();
}

void copy_async(void* shared, const void* global, int bytes, bool valid, Place place) {
  Block& b = block();
  b.check_alignment(shared, bytes, place);
  Copy copy{static_cast<char*>(shared), {}, bytes, b.current->groups};
  if (valid) {
    b.check_access(global, bytes, bytes, false, place);
    ++statistics.loads[std::countr_zero(static_cast<unsigned>(bytes))];
    b.begin_access(place);
    memcpy(copy.data.data(), global, bytes);
    b.end_access();
  }
  b.start_copy(copy, place);
}

void commit_copies() {
  ++block().current->groups;
}

void wait_for_copies(int groups_left) {
  Thread& thread = *block().current;
  size_t done = 0;
  while (done < thread.copies.size() && thread.copies[done].group + groups_left < thread.groups) {
    block().finish_copy(thread.copies[done++]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

void load_matrices(uint32_t* registers, int count, const void* row, bool transposed, Place place) {
  Block& b = block();
  if (!b.is_shared(static_cast<const char*>(row))) {
    b.fail_at("out of bounds: ldmatrix outside of shared memory", place);
  }
  b.check_access(row, 16, 16, false, place);
  LoadMatrices load{registers, count, row, transposed};
  b.in_warp(Operation::kLoadMatrices, ~0u, &load, place);
}

void multiply(Element element, float* d, const uint32_t* a, const uint32_t* b, Place place) {
  Multiply operands{element, d, a, b};
  block().in_warp(Operation::kMultiply, ~0u, &operands, place);
}

void multiply_bytes(int32_t* d, const uint32_t* a, const uint32_t* b, Place place) {
  MultiplyBytes operands{d, a, b};
  block().in_warp(Operation::kMultiplyBytes, ~0u, &operands, place);
}

void store_matrices(void* row, const uint32_t* registers, int count, Place place) {
  Block& b = block();
  if (!b.is_shared(static_cast<const char*>(row))) {
    b.fail_at("out of bounds: stmatrix outside of shared memory", place);
  }
  b.check_access(row, 16, 16, true, place);
  StoreMatrices store{registers, count, row};
  b.in_warp(Operation::kStoreMatrices, ~0u, &store, place);
}

void initialize_mbarrier(void* barrier, unsigned arrivals, Place place) {
  block().initialize_mbarrier(barrier, arrivals, place);
}

void publish_mbarriers() {
  block().publish_mbarriers();
}

void arrive(void* barrier, unsigned bytes, Place place) {
  block().arrive(barrier, bytes, place);
}

void arrive_in_block(void* barrier, unsigned rank, Place place) {
  block().arrive_in_block(barrier, rank, place);
}

void wait_for_phase(void* barrier, unsigned parity, Place place) {
  block().wait_for_phase(barrier, parity, place);
}

void synchronize_threads(int barrier, unsigned threads, Place place) {
  block().synchronize_threads(barrier, threads, place);
}

void load_box(const BoxCopy& copy, void* barrier, Place place) {
  block().load_box(copy, barrier, place);
}

void store_box(const BoxCopy& copy, Place place) {
  block().store_box(copy, place);
}

void commit_stores() {
  ++block().current->store_groups;
}

void wait_for_stores(int groups_left) {
  block().wait_for_stores(groups_left);
}

void fence_for_copies() {
  block().fence_for_copies();
}

void fence_sums(Place place) {
  block().in_warp(Operation::kFenceSums, ~0u, nullptr, place);
}

void multiply_warpgroup(const WarpgroupMultiply& multiply, Place place) {
  WarpgroupMultiply own = multiply;
  block().in_warp(Operation::kMultiplyWarpgroup, ~0u, &own, place);
}

void commit_products(Place place) {
  block().in_warp(Operation::kCommitProducts, ~0u, nullptr, place);
}

void wait_for_products(int groups_left, Place place) {
  block().in_warp(Operation::kWaitForProducts, ~0u, &groups_left, place);
}

void change_registers(unsigned count, bool takes, Place place) {
  block().change_registers(count, takes, place);
}

void fence_global_memory() {
  block().fence_global_memory();
}

void check_atomic(const void* address, size_t bytes, Place place) {
  block().let_others_run();
  block().check_alignment(address, bytes, place);
  block().write_atomically(address, bytes);
}

int device_attribute(int attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMultiProcessorCount:
      return settings.processors;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return kMostSharedBytes;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return kMostSharedBytes + 1024;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    default:
      return 0;
  }
}

}  // namespace fused_resnet::on_host
