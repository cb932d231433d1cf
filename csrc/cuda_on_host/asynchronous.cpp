// mbarriers, named barriers, TMA's copies, setmaxnreg, and the turns of a cluster's blocks.
#include <algorithm>
#include <cstring>
#include <sstream>

#include "cuda_on_host/execution_state.h"
#include "cuda_on_host/tensor_map.h"

namespace fused_resnet::on_host {
namespace {

constexpr unsigned kMostMbarriers = 64;        // of a block, here
constexpr int64_t kMostBytes = (1 << 20) - 1;  // announced or copied in a phase
constexpr unsigned kFewestRegisters = 24, kMostRegisters = 256;

const EncodedMap& map_at(const void* map) {
  return *static_cast<const EncodedMap*>(map);
}

// Four float32: to nearest, ties to even.
void round_to_tf32(char* chunk) {
  uint32_t values[4];
  memcpy(values, chunk, sizeof(values));
  for (uint32_t& bits : values) {
    const bool is_finite = (~bits & 0x7f800000u) != 0;
    if (is_finite) bits = (bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu;
  }
  memcpy(chunk, values, sizeof(values));
}

}  // namespace

// --- clusters ---------------------------------------------------------------------------------

void Cluster::prepare(const GridShape& shape, void (*function)(void*), void* argument, Grid* grid) {
  blocks_.resize(shape.cluster);
  threads_ = shape.threads;
  grid_ = grid;
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    if (!blocks_[rank]) blocks_[rank] = std::make_unique<Block>();
    blocks_[rank]->prepare(shape, function, argument);
    blocks_[rank]->join(this, rank);
  }
}

void Cluster::keep_order() {
  if (!order_.is_kept()) order_.begin(blocks_.size(), threads_, kMostMbarriers);
}

void Cluster::begin(uint64_t number, Random& random) {
  order_.end();
  loads_.clear();
  random_ = Random(random.next());
  pace_ = static_cast<Pace>(random_.below(3));
  address_ = 1024 + 128 * random_.below(8);  // aligned as a launch promises, and no better
  for (unsigned rank = 0; rank < blocks_.size(); ++rank) {
    const uint64_t b = number * blocks_.size() + rank;
    blocks_[rank]->begin(index_of(b), b, random.next());
  }
}

bool Cluster::go_on() {
  if (!loads_.empty() && pace_ == Pace::kAtAnyTime && random_.below(4) == 0) {
    finish(random_.below(loads_.size()));
  }
  unsigned count = 0;
  for (const auto& block : blocks_) count += block->can_go_on();
  if (count > 0) {
    uint64_t chosen = random_.below(count);
    for (const auto& block : blocks_) {
      if (block->can_go_on() && chosen-- == 0) {
        block->resume();
        break;
      }
    }
    return true;
  }
  if (!loads_.empty()) {
    finish(random_.below(loads_.size()));
    return true;
  }
  const Block* ended = nullptr;
  const Block* waiting = nullptr;
  for (const auto& block : blocks_) {
    if (block->has_ended()) {
      ended = block.get();
    } else if (block->is_at_cluster_barrier()) {
      waiting = block.get();
    } else {
      throw_error(describe_deadlock());
    }
  }
  if (ended && waiting) waiting->fail_at_cluster_barrier(*ended);
  if (waiting && order_.is_kept()) {
    View joined(order_.size());
    const unsigned threads = threads_ * blocks_.size();
    for (unsigned t = 0; t < threads; ++t) order_.release(t, joined);
    for (unsigned t = 0; t < threads; ++t) order_.acquire(t, joined);
  }
  if (waiting) {
    std::vector<GlobalAccesses::Time> times;
    for (const auto& block : blocks_) times.push_back({block->number(), 0, block->barriers()});
    global_accesses().join(times);
  }
  for (const auto& block : blocks_) block->open_cluster_barrier();
  return ended == nullptr;
}

// Nobody can go on: what is wrong, if that can be seen, and who waits for what.
std::string Cluster::describe_deadlock() const {
  std::string divergence, waiters;
  for (const auto& block : blocks_) {
    if (divergence.empty()) divergence = block->describe_divergence();
    const std::string of_block = block->describe_waiters();
    if (!of_block.empty()) waiters += (waiters.empty() ? "" : "; ") + of_block;
  }
  if (waiters.empty()) return divergence.empty() ? "deadlock: no thread can go on" : divergence;
  return (divergence.empty() ? "" : divergence + "; ") + "deadlock: " + waiters;
}

void Cluster::start(Load load) {
  loads_.push_back(std::move(load));
  if (pace_ == Pace::kAtOnce) finish(loads_.size() - 1);
}

void Cluster::finish(size_t index) {
  const Load load = loads_[index];
  loads_.erase(loads_.begin() + index);
  load.block->finish_load(load);
}

bool Block::can_go_on() const {
  for (unsigned w = 0; w < warp_count_; ++w) {
    if (warps_[w].ready) return true;
  }
  return false;
}

// --- what orders accesses -----------------------------------------------------------------------

// Of the threads of `mask` in each of some warps: all know what any of them knew.
void Block::join_all_views(uint32_t mask, unsigned first_warp, unsigned warps) {
  Order& order = cluster_->order();
  if (!order.is_kept()) return;
  View joined(order.size());
  const auto for_each = [&](auto&& visit) {
    for (unsigned i = 32 * first_warp; i < std::min(thread_count_, 32 * (first_warp + warps));
         ++i) {
      if (mask >> i % 32 & 1) visit(agent_of(i));
    }
  };
  for_each([&](unsigned agent) { order.release(agent, joined); });
  for_each([&](unsigned agent) { order.acquire(agent, joined); });
}

// The running thread waits until something makes it ready.
void Block::wait_as(State state, const Place& place) {
  Thread& thread = *current;
  thread.state = state;
  thread.place = place;
  warps_[thread.index / 32].ready &= ~(1u << thread.index % 32);
  go_on();
}

void Block::synchronize_threads(unsigned number, unsigned threads, const Place& place) {
  if (number == 0 || number > 15 || threads == 0 || threads % 32 != 0 || threads > thread_count_) {
    fail_at("bad barrier: number " + std::to_string(number) + " of " + std::to_string(threads) +
                " threads",
            place);
  }
  keep_order();
  NamedBarrier& barrier = named_barriers_[number];
  if (barrier.waiting.empty()) barrier.threads = threads;
  if (barrier.threads != threads) {
    fail_at("divergent barrier: " + std::to_string(threads) +
                " threads at one where others wait "
                "for " +
                std::to_string(barrier.threads),
            place);
  }
  barrier.waiting.push_back(current->index);
  current->number = number;
  if (barrier.waiting.size() == threads) {
    Order& order = cluster_->order();
    View joined(order.size());
    for (const unsigned i : barrier.waiting) order.release(agent_of(i), joined);
    for (const unsigned i : barrier.waiting) {
      order.acquire(agent_of(i), joined);
      make_ready(threads_[i]);
    }
    barrier.waiting.clear();
    statistics.barriers += 1;
    go_on();
  } else {
    wait_as(State::kAtNamedBarrier, place);
  }
}

// --- mbarriers ----------------------------------------------------------------------------------

void Block::initialize_mbarrier(void* barrier, unsigned arrivals, const Place& place) {
  check_alignment(barrier, 8, place);
  if (!is_shared(static_cast<const char*>(barrier))) {
    fail_at("out of bounds: an mbarrier outside of shared memory", place);
  }
  check_bounds(static_cast<const char*>(barrier), 8, place);
  if (arrivals == 0 || arrivals > kMostBytes) {
    fail_at("bad mbarrier: of " + std::to_string(arrivals) + " arrivals", place);
  }
  Order& order = keep_order();
  const size_t offset = static_cast<const char*>(barrier) - shared_begin;
  if (mbarriers_.count(offset)) fail_at("bad mbarrier: it is initialised again", place);
  if (mbarriers_.size() == kMostMbarriers) fail_at("bad mbarrier: one too many", place);
  const unsigned agent = order.mbarrier(rank_ * kMostMbarriers + mbarriers_.size());
  const unsigned thread = agent_of(current->index);
  mbarriers_[offset] = {arrivals,
                        arrivals,
                        0,
                        0,
                        false,
                        agent,
                        thread,
                        order.time_of(thread),
                        place,
                        View(order.size()),
                        View(order.size())};
}

void Block::publish_mbarriers() {
  for (auto& [offset, barrier] : mbarriers_) {
    if (barrier.made_by == agent_of(current->index)) barrier.is_published = true;
  }
}

// The barrier that the running thread names, which it has to know of.
Mbarrier& Block::mbarrier_at(const void* address, const Origin& origin) {
  const auto found = mbarriers_.find(static_cast<const char*>(address) - shared_begin);
  if (found == mbarriers_.end()) {
    fail_at("bad mbarrier: there is none at offset " +
                std::to_string(static_cast<const char*>(address) - shared_begin) +
                " of shared memory",
            origin);
  }
  Mbarrier& barrier = found->second;
  const unsigned thread = agent_of(current->index);
  if (thread != barrier.made_by &&
      !cluster_->order().knows(thread, barrier.made_by, barrier.made_at)) {
    fail_at("race: an mbarrier is used that thread " +
                std::to_string(barrier.made_by % thread_count_) + " initialises at " +
                barrier.origin.line() + " with no barrier in between",
            origin);
  }
  return barrier;
}

// The barrier at an offset as copies and other blocks see it; the thread that runs may be another
// block's.
Mbarrier* Block::published_mbarrier(size_t offset, const char* what, const Origin& origin) {
  Block& caller = *running;
  if (has_ended()) {
    caller.fail_at("early end: " + std::string(what) + " to block " + std::to_string(index_.x) +
                       ", which has ended",
                   origin);
  }
  const auto found = mbarriers_.find(offset);
  if (found == mbarriers_.end() || !found->second.is_published) {
    caller.fail_at("unpublished mbarrier: " + std::string(what) + " at offset " +
                       std::to_string(offset) + " of shared memory",
                   origin);
  }
  const unsigned thread = caller.agent_of(caller.current->index);
  if (thread != found->second.made_by &&
      !cluster_->order().knows(thread, found->second.made_by, found->second.made_at)) {
    caller.fail_at("race: an mbarrier is used that " +
                       std::string("another thread initialises at ") + found->second.origin.line() +
                       " with no barrier in between",
                   origin);
  }
  return &found->second;
}

void Block::arrive(void* address, unsigned bytes, const Place& place) {
  Mbarrier& barrier = mbarrier_at(address, place);
  if (barrier.missing == 0) fail_at("bad mbarrier: an arrival more than it counts", place);
  barrier.bytes += bytes;
  if (barrier.bytes > kMostBytes) fail_at("bad mbarrier: it counts too many bytes", place);
  cluster_->order().release(agent_of(current->index), barrier.arriving);
  --barrier.missing;
  end_phase_if_complete(static_cast<const char*>(address) - shared_begin, barrier);
}

void Block::arrive_in_block(void* address, unsigned rank, const Place& place) {
  const auto& blocks = cluster_->blocks();
  if (rank >= blocks.size()) {
    fail_at("out of bounds: block " + std::to_string(rank) + " of a cluster of " +
                std::to_string(blocks.size()),
            place);
  }
  Block& other = *blocks[rank];
  const size_t offset = static_cast<const char*>(address) - shared_begin;
  Mbarrier& barrier = *other.published_mbarrier(offset, "an arrival", place);
  if (barrier.missing == 0) fail_at("bad mbarrier: an arrival more than it counts", place);
  cluster_->order().release(agent_of(current->index), barrier.arriving);
  --barrier.missing;
  other.end_phase_if_complete(offset, barrier);
}

void Block::end_phase_if_complete(size_t offset, Mbarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.missing = barrier.arrivals;
  barrier.arriving[barrier.agent] = barrier.phases;
  barrier.arrived = barrier.arriving;
  for (unsigned i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    if (thread.state != State::kAtMbarrier || thread.barrier != shared_begin + offset ||
        (barrier.phases & 1) == thread.number) {
      continue;
    }
    thread.state = State::kInWarp;  // any that does not wait here
    thread.mask = 0;
    cluster_->order().acquire(agent_of(i), barrier.arrived);
    make_ready(thread);
  }
}

void Block::wait_for_phase(void* address, unsigned parity, const Place& place) {
  Mbarrier& barrier = mbarrier_at(address, place);
  if (parity > 1) fail_at("bad mbarrier: a parity of " + std::to_string(parity), place);
  if ((barrier.phases & 1) != parity) {
    cluster_->order().acquire(agent_of(current->index), barrier.arrived);
    return;
  }
  current->barrier = address;
  current->number = parity;
  wait_as(State::kAtMbarrier, place);
}

void Block::check_not_mbarrier(size_t begin, size_t end, const Origin& origin) {
  const auto after = mbarriers_.lower_bound(end);
  if (after == mbarriers_.begin()) return;
  const size_t last = std::prev(after)->first;
  if (last + 8 > begin) {
    fail_at("bad mbarrier: the one at offset " + std::to_string(last) + " is overwritten", origin);
  }
}

// --- TMA ----------------------------------------------------------------------------------------

uint32_t Block::address_of(const char* shared) const {
  return cluster_->address() + static_cast<uint32_t>(shared - shared_begin);
}

void Block::load_box(const BoxCopy& copy, void* counts_at, const Place& place) {
  const EncodedMap& map = map_at(copy.map);
  char* const target = static_cast<char*>(copy.shared);
  if (map.mark != EncodedMap::kMark) fail_at("bad tensor map: it is none", place);
  if (map.rank != copy.rank || map.is_im2col != (copy.offset != nullptr)) {
    fail_at("bad tensor map: it is for another instruction", place);
  }
  if (address_of(target) % 128 != 0) {
    fail_at("misaligned access: a load to shared memory, " +
                std::to_string(address_of(target) % 128) + " past a multiple of 128",
            place);
  }
  check_bounds(target, map.box_bytes(), place);
  check_global_bounds(reinterpret_cast<const char*>(map.address), map.tensor_bytes(), place);
  Box box{copy.map, {}, {}};
  for (int i = 0; i < copy.rank; ++i) box.at[i] = copy.at[i];
  for (int i = 0; copy.offset && i < 2; ++i) {
    box.offset[i] = copy.offset[i];
    if (box.offset[i] < 0 || box.offset[i] > 255) {
      fail_at("out of bounds: an im2col offset of " + std::to_string(box.offset[i]), place);
    }
    const int64_t end = static_cast<int64_t>(map.sizes[i + 1]) + map.upper[i];
    if (box.at[i + 1] < map.lower[i] || box.at[i + 1] >= end) {
      fail_at("out of bounds: im2col begins at " + std::to_string(box.at[i + 1]) +
                  ", outside of its box from " + std::to_string(map.lower[i]) + " to " +
                  std::to_string(end),
              place);
    }
  }
  const size_t offset = target - shared_begin;
  const size_t barrier = static_cast<const char*>(counts_at) - shared_begin;
  const auto& blocks = cluster_->blocks();
  const unsigned to = copy.blocks ? copy.blocks : 1u << rank_;
  if (to >> blocks.size()) fail_at("out of bounds: a load to blocks that are not there", place);
  for (unsigned r = 0; r < blocks.size(); ++r) {
    if (!(to >> r & 1)) continue;
    Block& other = *blocks[r];
    other.published_mbarrier(barrier, "a load", place);
    check_not_mbarrier(offset, offset + map.box_bytes(), place);
    SharedAccesses::Time time = now();
    time.first_thread = other.rank_ * thread_count_;
    time.thread = agent_of(current->index) - time.first_thread;
    const uint64_t number = other.shared_accesses_.begin_asynchronous(
        {offset, offset + map.box_bytes(), SharedAccesses::Work::kLoad, current->index, place},
        time);
    if (!number) fail_at(other.shared_accesses_.complaint(), place);
    memset(other.shared_begin + offset, 0xff, map.box_bytes());
    cluster_->start({box, &other, offset, number, barrier, current->index, this, place});
  }
}

void Block::finish_load(const Cluster::Load& load) {
  const std::string where =
      load.started_by->where(load.started_by->threads_[load.thread], load.origin.line());
  if (has_ended()) {
    throw_error("early end: block " + std::to_string(index_.x) +
                " may have ended before a load to its shared memory has, " + where);
  }
  const EncodedMap& map = map_at(load.box.map);
  for_each_chunk(map, load.box.at, load.box.offset, address_of(shared_begin + load.offset),
                 [&](const BoxChunk& chunk) {
                   char* target = shared_begin + (chunk.address - cluster_->address());
                   memset(target, 0, 16);
                   if (chunk.valid) {
                     memcpy(target + chunk.skipped, chunk.global + chunk.skipped, chunk.valid);
                   }
                   if (map.rounds) round_to_tf32(target);
                 });
  statistics.loads[4] += map.box_bytes() / 16;
  Mbarrier& barrier = mbarriers_.at(load.barrier);
  shared_accesses_.end_asynchronous(load.number, barrier.agent, barrier.phases + 1);
  barrier.bytes -= map.box_bytes();
  if (barrier.bytes < -kMostBytes) {
    throw_error("bad mbarrier: more bytes come than it counts, " + where);
  }
  end_phase_if_complete(load.barrier, barrier);
}

void Block::store_box(const BoxCopy& copy, const Place& place) {
  const EncodedMap& map = map_at(copy.map);
  char* const source = static_cast<char*>(copy.shared);
  if (map.mark != EncodedMap::kMark) fail_at("bad tensor map: it is none", place);
  if (map.rank != copy.rank || map.is_im2col) {
    fail_at("bad tensor map: it is for another instruction", place);
  }
  // Whether stores round too is not written down.
  if (map.rounds) fail_at("bad tensor map: a store through one that rounds loads to tf32", place);
  if (address_of(source) % 128 != 0) {
    fail_at("misaligned access: a store of shared memory, " +
                std::to_string(address_of(source) % 128) + " past a multiple of 128",
            place);
  }
  keep_order();
  check_bounds(source, map.box_bytes(), place);
  check_global_bounds(reinterpret_cast<const char*>(map.address), map.tensor_bytes(), place);
  const size_t offset = source - shared_begin;
  const uint64_t number = shared_accesses_.begin_asynchronous(
      {offset, offset + map.box_bytes(), SharedAccesses::Work::kStore, current->index, place},
      now());
  if (!number) fail_at(shared_accesses_.complaint(), place);
  BoxStore store{{copy.map, {}, {}}, source, current->store_groups, number};
  for (int i = 0; i < copy.rank; ++i) store.box.at[i] = copy.at[i];
  if (!late_copies_) finish_store(store);
  current->stores.push_back(store);
}

void Block::finish_store(const BoxStore& store) {
  for_each_chunk(map_at(store.box.map), store.box.at, store.box.offset, address_of(store.source),
                 [&](const BoxChunk& chunk) {
                   const char* source = shared_begin + (chunk.address - cluster_->address());
                   if (chunk.valid) {
                     memcpy(chunk.global + chunk.skipped, source + chunk.skipped, chunk.valid);
                   }
                 });
}

void Block::wait_for_stores(int groups_left) {
  Thread& thread = *current;
  size_t done = 0;
  while (done < thread.stores.size() &&
         thread.stores[done].group + groups_left < thread.store_groups) {
    const BoxStore& store = thread.stores[done++];
    if (late_copies_) finish_store(store);
    const unsigned agent = agent_of(thread.index);
    shared_accesses_.end_asynchronous(store.number, agent, cluster_->order().time_of(agent));
  }
  thread.stores.erase(thread.stores.begin(), thread.stores.begin() + done);
}

// --- setmaxnreg
// -----------------------------------------------------------------------------------

void Block::change_registers(unsigned count, bool takes, const Place& place) {
  if (count % 8 != 0 || count < kFewestRegisters || count > kMostRegisters) {
    fail_at("register budget: " + std::to_string(count) + " registers of a thread", place);
  }
  ChangeRegisters change{count, takes};
  in_warp(Operation::kChangeRegisters, ~0u, &change, place);
  Warp& warp = warps_[current->index / 32];
  while (warp.registers != count) {
    current->number = count;
    wait_as(State::kAwaitsRegisters, place);
  }
}

void Block::change_registers_of(unsigned w) {
  Warp& warp = warps_[w];
  const ChangeRegisters& change = *static_cast<const ChangeRegisters*>(warp.payloads[0]);
  if (change.takes ? change.count < warp.registers : change.count > warp.registers) {
    fail_at("register budget: " + std::string(change.takes ? "raises " : "lowers ") +
                std::to_string(warp.registers) + " to " + std::to_string(change.count),
            current->place);
  }
  warp.wanted_registers = change.count;
  grant_registers();
}

// Lets warps have the registers they want, as far as there are some.
void Block::grant_registers() {
  for (unsigned w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    const unsigned more =
        warp.wanted_registers > warp.registers ? 32 * (warp.wanted_registers - warp.registers) : 0;
    if (warp.wanted_registers == warp.registers || more > free_registers_) continue;
    free_registers_ += 32 * warp.registers;
    free_registers_ -= 32 * warp.wanted_registers;
    warp.registers = warp.wanted_registers;
    for (unsigned i = 32 * w; i < std::min(thread_count_, 32 * (w + 1)); ++i) {
      if (threads_[i].state != State::kAwaitsRegisters) continue;
      threads_[i].state = State::kInWarp;
      threads_[i].mask = 0;
      make_ready(threads_[i]);
    }
    w = ~0u;  // what was given back may be enough for an earlier one
  }
}

// --- saying who waits for what
// --------------------------------------------------------------------

std::string Block::describe_waiters() const {
  const auto awaits = [&](const Thread& thread) -> std::string {
    switch (thread.state) {
      case State::kAtMbarrier: {
        const size_t offset = static_cast<const char*>(thread.barrier) - shared_begin;
        const Mbarrier& barrier = mbarriers_.at(offset);
        return "wait for phase " + std::to_string(barrier.phases) + " of the mbarrier at offset " +
               std::to_string(offset) + ", where " + std::to_string(barrier.missing) +
               " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing";
      }
      case State::kAtNamedBarrier: {
        const NamedBarrier& barrier = named_barriers_[thread.number];
        return "wait at barrier " + std::to_string(thread.number) + ", where " +
               std::to_string(barrier.waiting.size()) + " of " + std::to_string(barrier.threads) +
               " threads are";
      }
      case State::kAwaitsRegisters:
        return "wait for " + std::to_string(thread.number) + " registers each, of which " +
               std::to_string(free_registers_) + " are free";
      default:
        return "";
    }
  };
  std::ostringstream out;
  for (unsigned i = 0; i < thread_count_;) {
    const Thread& first = threads_[i];
    const std::string what = awaits(first);
    unsigned end = i + 1;
    while (end < thread_count_ && threads_[end].state == first.state &&
           awaits(threads_[end]) == what) {
      ++end;
    }
    if (!what.empty()) {
      if (out.tellp() > 0) out << "; ";
      out << (end == i + 1 ? "thread " : "threads ") << i;
      if (end > i + 1) out << " to " << end - 1;
      out << " " << what << ", " << where(first, Origin(first.place).line());
    }
    i = end;
  }
  return out.str();
}

}  // namespace fused_resnet::on_host
