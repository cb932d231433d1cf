// Who touched each word of a block's shared memory last, to find accesses that no barrier orders.
#pragma once

#include <array>
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
  Origin(const std::source_location& place);
  static Origin instruction(const void* address);
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
    uint32_t barriers, warp_barriers;
  };

  void begin_block(size_t bytes, uint32_t barriers);

  // Offset and size lie within the block's shared memory. False where something is wrong, which
  // `complaint` then says.
  bool read(size_t offset, size_t bytes, const Time& now, const Origin& origin);
  bool write(size_t offset, size_t bytes, const Time& now, const Origin& origin);

  // A cp.async, which may write at any time until it is waited for.
  bool begin_copy(size_t offset, size_t bytes, const Time& now, const Origin& origin);
  void end_copy(size_t offset, size_t bytes, const Time& now);

  // Neither is an atomic operation at odds with another, nor is it looked at more closely.
  void write_atomically(size_t offset, size_t bytes);

  const std::string& complaint() const { return complaint_; }

 private:
  struct Access {
    Origin origin;
    uint32_t barriers = 0, warp_barriers = 0;
    uint16_t thread = 0;
    uint8_t bytes = 0;          // of the word, one bit each
    bool is_under_way = false;  // a copy that nobody has waited for
  };
  struct Word {
    Access write;
    std::array<Access, 2> reads;  // of different warps where there are several
    uint32_t block = 0;           // the rest is of this block, or of none before
    uint8_t written = 0;
  };

  bool is_unordered(const Access& before, uint8_t bytes, const Time& now) const;
  Word& word(size_t index);
  void complain(const char* what, const Access& before, size_t offset, const Time& now);

  std::vector<Word> words_;
  uint32_t block_ = 0;
  std::string complaint_;
};

}  // namespace fused_resnet::on_host
