// How threads share the tasks of a layer.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fused_resnet::cpu {

// Calls run(i, is_last) of the tasks 0 <= i < tasks. Each thread begins with its own stretch of
// them, the same part in every layer, so that it finds what it wrote in the last one in its own
// cache; `is_last` is the last of a stretch. Then it helps the others. For fewer than `grain` tasks
// no thread is woken.
template <class Run>
void share_tasks(int64_t tasks, int64_t grain, const Run& run) {
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, (tasks + grain - 1) / grain);
  std::vector<Stretch> stretches(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w) {
    stretches[w].next = tasks * w / workers;
    stretches[w].end = tasks * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) {
    for (int64_t w = begin; w < begin + workers; ++w) {
      Stretch& stretch = stretches[w % workers];
      for (int64_t i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) {
        run(i, i + 1 == stretch.end);
      }
    }
  });
}

}  // namespace fused_resnet::cpu
