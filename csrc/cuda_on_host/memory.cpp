#include "cuda_on_host/memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace fused_resnet::on_host {
namespace {

constexpr size_t kAlignment = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format

size_t round_up(size_t size, size_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

}  // namespace

size_t page_bytes() {
  static const size_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

GuardedPages::GuardedPages(size_t bytes) {
  const size_t size = round_up(bytes, page_bytes());
  void* pages =
      mmap(nullptr, size + 2 * page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  begin_ = static_cast<char*>(pages) + page_bytes();
  end_ = begin_ + size;
  if (mprotect(begin_, size, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

GuardedPages::~GuardedPages() {
  munmap(begin_ - page_bytes(), end_ - begin_ + 2 * page_bytes());
}

namespace {

// A tensor's memory.
struct Buffer {
  Buffer(size_t bytes, Guard guard) : pages(bytes), bytes(bytes) {
    const size_t room = pages.end() - pages.begin();
    begin = guard == Guard::kEnd ? pages.end() - round_up(bytes, kAlignment) : pages.begin();
    memset(pages.begin(), kPoison, room);
  }
  GuardedPages pages;
  size_t bytes;
  char* begin;
};

std::mutex mutex;
std::map<const char*, Buffer*>& buffers() {
  static auto& map = *new std::map<const char*, Buffer*>;  // outlives every tensor
  return map;
}

void delete_buffer(void* begin) {
  Buffer* buffer = nullptr;
  {
    const std::lock_guard lock(mutex);
    const auto found = buffers().find(static_cast<const char*>(begin));
    if (found == buffers().end()) return;  // of no bytes
    buffer = found->second;
    buffers().erase(found);
  }
  delete buffer;
}

class GuardingAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    char* begin = nullptr;
    if (bytes > 0) {
      auto* buffer = new Buffer(bytes, guard);
      begin = buffer->begin;
      const std::lock_guard lock(mutex);
      buffers()[begin] = buffer;
    }
    return {begin, begin, &delete_buffer, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &delete_buffer; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    memcpy(target, source, bytes);
  }

  Guard guard = Guard::kOff;
};

}  // namespace

void guard_tensors(Guard guard) {
  static GuardingAllocator guarding;
  static c10::Allocator* const plain = c10::GetCPUAllocator();
  guarding.guard = guard;
  c10::SetCPUAllocator(guard == Guard::kOff ? plain : &guarding);
}

TensorMemory tensor_memory_at(const char* address) {
  const std::lock_guard lock(mutex);
  const auto page = address - reinterpret_cast<uintptr_t>(address) % page_bytes();
  TensorMemory nothing{page, page + page_bytes(), nullptr, nullptr};
  if (buffers().empty()) return nothing;
  // The last to begin before the address, or the next, whose guard page lies before it.
  auto next = buffers().upper_bound(address);
  for (int i = 0; i < 2; ++i) {
    if (next != buffers().end()) {
      const Buffer& buffer = *next->second;
      const TensorMemory memory{buffer.pages.begin() - page_bytes(),
                                buffer.pages.end() + page_bytes(), buffer.begin,
                                buffer.begin + buffer.bytes};
      if (address >= memory.reach_begin && address < memory.reach_end) return memory;
    }
    if (next == buffers().begin()) break;
    --next;
  }
  return nothing;
}

std::string source_line(const void* instruction) {
  Dl_info library;
  if (!dladdr(instruction, &library) || !library.dli_fname) return "unknown line";
  const size_t offset =
      static_cast<const char*>(instruction) - static_cast<const char*>(library.dli_fbase);
  char command[4096];
  snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx 2>/dev/null", library.dli_fname,
           offset);
  std::string found;
  if (FILE* lines = popen(command, "r")) {
    char line[4096];
    while (found.empty() && fgets(line, sizeof(line), lines)) {
      std::string text(line, strcspn(line, " \n"));
      const bool is_ours = text.find("/cuda/device/") == std::string::npos &&
                           text.find("/cuda_on_host/") == std::string::npos &&
                           text.find("/include/") == std::string::npos && text[0] == '/';
      if (is_ours) found = text.substr(text.rfind('/') + 1);
    }
    pclose(lines);
  }
  if (found.empty()) snprintf(command, sizeof(command), "%s+%#zx", library.dli_fname, offset);
  return found.empty() ? command : found;
}

}  // namespace fused_resnet::on_host
