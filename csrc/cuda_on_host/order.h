// Which accesses happened before which, as far as barriers of every kind say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fused_resnet::on_host {

// What a thread, or whoever waits for a barrier, knows to have happened: for each agent, up to
// which time of its own. Agents are the threads of a cluster, then its mbarriers (whose time is the
// phases they ended), then its warps (the products they waited for). In a second half, the threads'
// accesses to shared memory of which a proxy fence lets asynchronous copies and products know.
using View = std::vector<uint32_t>;

// The views of a cluster's threads. Nothing is kept until `begin`.
class Order {
 public:
  // Blocks, threads of each, and how many mbarriers each may have.
  void begin(unsigned blocks, unsigned threads, unsigned mbarriers) {
    threads_ = blocks * threads;
    warps_begin_ = threads_ + blocks * mbarriers;
    agents_ = warps_begin_ + blocks * ((threads + 31) / 32);
    views_.assign(size_t{threads_} * size(), 0);
    for (unsigned t = 0; t < threads_; ++t) of(t)[t] = 1;
  }
  void end() { agents_ = 0; }
  bool is_kept() const { return agents_ != 0; }

  size_t size() const { return 2 * size_t{agents_}; }
  unsigned mbarrier(unsigned number) const { return threads_ + number; }
  unsigned warp(unsigned number) const { return warps_begin_ + number; }
  uint32_t* of(unsigned thread) { return &views_[thread * size()]; }
  uint32_t time_of(unsigned thread) { return of(thread)[thread]; }
  bool knows(unsigned thread, unsigned agent, uint32_t time) { return of(thread)[agent] >= time; }
  // Whether copies that the thread starts know an access of another thread.
  bool copies_know(unsigned thread, unsigned other, uint32_t time) {
    return of(thread)[agents_ + other] >= time;
  }

  // Adds what the thread knows; what it does from now on is later.
  void release(unsigned thread, View& into) {
    add(into.data(), of(thread));
    ++of(thread)[thread];
  }
  void acquire(unsigned thread, const View& from) { add(of(thread), from.data()); }
  void fence(unsigned thread) {
    uint32_t* view = of(thread);
    view[agents_ + thread] = view[thread]++;
  }

 private:
  // The later time of each.
  __attribute__((optimize("O3"))) void add(uint32_t* into, const uint32_t* from) const {
    for (size_t i = 0, count = size(); i < count; ++i)
      into[i] = into[i] < from[i] ? from[i] : into[i];
  }

  unsigned threads_ = 0, warps_begin_ = 0, agents_ = 0;
  std::vector<uint32_t> views_;
};

}  // namespace fused_resnet::on_host
