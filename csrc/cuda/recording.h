// What this thread's calls of csrc/cuda come down to, written down for a plan: csrc/launch_plan.h.
//
// Kernels take structures that hold addresses. `Addresses` says where, so that a plan can put
// others there; of a type that it does not know no plan is made.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace fused_resnet {

// Offsets of the addresses in a parameter of a kernel.
template <typename T>
struct Addresses {
  static constexpr bool kKnown = std::is_arithmetic_v<T> || std::is_enum_v<T>;
  static constexpr std::initializer_list<size_t> kOffsets{};
};

template <typename T>
struct Addresses<T*> {
  static constexpr bool kKnown = true;
  static constexpr std::initializer_list<size_t> kOffsets{0};
};

// Numbers, entry behind entry, each a Kind and what belongs to it: address and bytes; or function,
// grid (x, y, z), threads, bytes of shared memory, how many parameters, and for each of these how
// many words of eight bytes, and for each word whether it is an address, and the word.
class Recording {
 public:
  enum Kind : int64_t { kMemory, kClearing, kLaunch };

  // A parameter of a kernel: its bytes, and where in them addresses are.
  struct Parameter {
    const void* value;
    size_t bytes;
    std::initializer_list<size_t> addresses;
    bool is_known;
  };
  struct Grid {
    uint32_t blocks[3], threads;
    size_t shared_bytes;
    unsigned cluster;
  };

  void add_memory(const void* address, int64_t bytes) { add({kMemory, number_of(address), bytes}); }
  void add_clearing(const void* address, int64_t bytes) {
    add({kClearing, number_of(address), bytes});
  }

  void add_launch(const void* function, const Grid& grid,
                  std::initializer_list<Parameter> parameters) {
    if (grid.cluster != 1) spoil();
    add({kLaunch, number_of(function), grid.blocks[0], grid.blocks[1], grid.blocks[2], grid.threads,
         static_cast<int64_t>(grid.shared_bytes), static_cast<int64_t>(parameters.size())});
    for (const Parameter& parameter : parameters) {
      if (!parameter.is_known) spoil();
      std::vector<int64_t> words((parameter.bytes + 7) / 8);
      std::memcpy(words.data(), parameter.value, parameter.bytes);
      add({static_cast<int64_t>(words.size())});
      for (size_t w = 0; w < words.size(); ++w) {
        bool is_address = false;
        for (const size_t offset : parameter.addresses) is_address |= offset == 8 * w;
        add({is_address, words[w]});
      }
    }
  }

  // Something happens of which there can be no plan.
  void spoil() { is_spoiled_ = true; }

  // None where that was so.
  const std::vector<int64_t>& numbers() const { return is_spoiled_ ? nothing_ : numbers_; }

 private:
  static int64_t number_of(const void* address) { return reinterpret_cast<int64_t>(address); }
  void add(std::initializer_list<int64_t> numbers) { numbers_.insert(numbers_.end(), numbers); }

  std::vector<int64_t> numbers_, nothing_;
  bool is_spoiled_ = false;
};

// That of this thread, or null.
inline thread_local Recording* recording = nullptr;

// Called where torch does something that no plan repeats.
inline void leave_no_plan() {
  if (recording != nullptr) recording->spoil();
}

}  // namespace fused_resnet
