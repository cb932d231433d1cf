// Memory whose ends are guarded, and what is said about an access beyond them.
#pragma once

#include <cstddef>
#include <string>

namespace fused_resnet::on_host {

// What memory is guarded in units of.
size_t page_bytes();

// Whole pages between two that cannot be accessed.
class GuardedPages {
 public:
  explicit GuardedPages(size_t bytes);
  ~GuardedPages();
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  char* begin() const { return begin_; }
  char* end() const { return end_; }

 private:
  char* begin_;
  char* end_;
};

enum class Guard { kOff, kEnd, kBegin };

// Tensors that torch makes on the CPU from now on end (begin) at a guard page, up to what alignment
// leaves over, and are filled with NaN.
void guard_tensors(Guard guard);

// Addresses that only an access to one guarded tensor can lead to, and those that are the tensor.
// Where no such tensor is, an empty one.
struct TensorMemory {
  const char* reach_begin = nullptr;
  const char* reach_end = nullptr;
  const char* begin = nullptr;
  const char* end = nullptr;
};
TensorMemory tensor_memory_at(const char* address);

// "file.cu:12" for an instruction: the innermost function inlined there that is a kernel's own.
std::string source_line(const void* instruction);

}  // namespace fused_resnet::on_host
