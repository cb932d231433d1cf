// Who touched each word of a block's shared memory last, to find accesses that no barrier orders.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace fused_resnet::on_host {

// Where in the source something happened: known from a device function's default argument or, for
// plain loads and stores, from the instruction.
class Origin {
 public:
  Origin() = default;
  Origin(const std::source_location& place) : bits_(std::bit_cast<uintptr_t>(place)) {}
  static Origin instruction(const void* address) {
    Origin origin;
    origin.bits_ = reinterpret_cast<uintptr_t>(address) | kInstruction;
    return origin;
  }
  std::string line() const;  // "file.cu:12"

 private:
  static constexpr uintptr_t kInstruction = uintptr_t{1} << 63;  // no address has this bit

  uintptr_t bits_ = 0;
};

class SharedAccesses {
 public:
  // A moment in a block's run. `barriers` counts those of the block and goes on counting from block
  // to block, `warp_barriers` those of the thread's warp.
  struct Time {
    unsigned thread;
    uint32_t barriers;
    uint16_t warp_barriers;
  };

  void begin_block(size_t bytes, uint32_t barriers);

  // Offset and size lie within the block's shared memory. False where something is wrong, which
  // `complaint` then says.
  bool read(size_t offset, size_t bytes, const Time& now, const Origin& origin);
  bool write(size_t offset, size_t bytes, const Time& now, const Origin& origin);

  // By another block, which `first` and later barriers of this one do not order with what this one
  // writes. Asked again at the end of such a time, it finds writes that came after it.
  bool read_from_outside(size_t offset, size_t bytes, uint32_t first);

  // A cp.async, which may write at any time until it is waited for.
  bool begin_copy(size_t offset, size_t bytes, const Time& now, const Origin& origin);
  void end_copy(size_t offset, size_t bytes, const Time& now);

  // Neither is an atomic operation at odds with another, nor is it looked at more closely.
  void write_atomically(size_t offset, size_t bytes);

  const std::string& complaint() const { return complaint_; }

 private:
  struct Access {
    Origin origin;
    uint32_t barriers = 0;
    uint16_t warp_barriers = 0;
    uint16_t thread : 10 = 0;
    uint16_t is_warps : 1 = false;      // other lanes of the thread's warp did the same
    uint16_t is_under_way : 1 = false;  // a copy that nobody has waited for
    uint16_t bytes : 4 = 0;             // of the word, one bit each; none where nothing happened
  };
  struct alignas(64) Word {
    Access write;
    std::array<Access, 2> reads;  // since then, of different warps where there are several
    uint32_t block = 0;           // what the rest is about
    uint8_t written = 0;          // bytes
  };
  static_assert(sizeof(Word) == 64);

  static Access access(const Time& now, const Origin& origin, unsigned bytes);
  static bool is_unordered(const Access& before, unsigned bytes, const Time& now);
  bool read_word(Word& word, size_t offset, unsigned bytes, const Time& now, const Origin& origin);
  Word& word(size_t index);
  void complain(const char* what, const Access& before, size_t offset, const Time& now);

  std::vector<Word> words_;
  uint32_t block_ = 0;
  std::string complaint_;
};

}  // namespace fused_resnet::on_host
