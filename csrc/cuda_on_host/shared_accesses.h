// Who touched each word of a block's shared memory last, to find accesses that no barrier orders.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "cuda_on_host/order.h"

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
    Order* order = nullptr;     // if it is kept
    unsigned first_thread = 0;  // of the block, in there

    unsigned agent() const { return first_thread + thread; }
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

  // What the hardware does to shared memory by itself: TMA's copies and a warpgroup's products.
  enum class Work { kLoad, kStore, kProduct };
  struct Asynchronous {
    size_t begin, end;  // bytes
    Work work;
    unsigned thread;  // that started it
    Origin origin;
    bool is_under_way = true;
    // Who knows of its end: whoever knows that the agent came to this time.
    unsigned agent = 0;
    uint32_t time = 0;
    uint64_t number = 0;

    bool writes() const { return work == Work::kLoad; }
  };
  // Returns the number by which end_asynchronous knows it, 0 where something is wrong.
  uint64_t begin_asynchronous(Asynchronous work, const Time& now);
  // Whether the copies and products so far leave these bytes to an access, as far as a thread
  // knows; `what` the access is.
  bool is_free(size_t begin, size_t end, bool writes, const char* what, const Time& now);
  // Whether it is what is done to just these bytes.
  bool is_of(uint64_t number, size_t begin, size_t end) const;
  // It is done, and known to who knows that the agent came to this time.
  void end_asynchronous(uint64_t number, unsigned agent, uint32_t time);

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
    // When, in the threads' own times, where an order is kept: of the write, and of the reads.
    std::array<uint16_t, 3> times{};
  };
  static_assert(sizeof(Word) == 64);

  static Access access(const Time& now, const Origin& origin, unsigned bytes);
  static bool is_unordered(const Word& word, const Access& before, unsigned bytes, const Time& now);
  static uint16_t time_of(const Time& now);
  static bool copies_know(const Word& word, const Access& before, const Time& now);
  void touch(size_t begin, size_t end);
  bool read_word(Word& word, size_t offset, unsigned bytes, const Time& now, const Origin& origin);
  Word& word(size_t index);
  void complain(const char* what, const Access& before, size_t offset, const Time& now);

  // Of each 128 bytes: whether threads accessed them, or a load wrote them and nobody has since.
  enum class Line : uint8_t { kUntouched, kOfThreads, kLoaded };
  static constexpr size_t kLine = 128;

  std::vector<Word> words_;
  std::vector<Line> lines_;
  std::vector<Asynchronous> asynchronous_;
  uint64_t last_number_ = 0;
  uint32_t block_ = 0;
  std::string complaint_;
};

}  // namespace fused_resnet::on_host
