// Memory whose ends are guarded, and what is said about an access beyond them.
#pragma once

#include <cstddef>
#include <string>

namespace fused_resnet::on_host {

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

// Tensors that torch makes on the CPU from now on end (begin) at a guard page and are filled with
// NaN. Up to 15 bytes between the end and the page are watched instead: see check_buffers.
void guard_tensors(Guard guard);

// "" or which live tensor was written to beyond its end.
std::string check_buffers();

// Where an address lies, in words: "4 bytes past the end of a tensor's 128".
std::string describe_address(const void* address);

// "file.cu:12" for an instruction: the innermost function inlined there that is a kernel's own.
std::string source_line(const void* instruction);

}  // namespace fused_resnet::on_host
