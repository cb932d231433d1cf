#include "cuda_on_host/shared_accesses.h"

#include <algorithm>
#include <bit>

#include "cuda_on_host/memory.h"

namespace fused_resnet::on_host {
namespace {

constexpr size_t kWord = 4;

// The bytes of word `index` that lie in [begin, end), one bit each.
unsigned bytes_in_word(size_t index, size_t begin, size_t end) {
  if (begin <= index * kWord && (index + 1) * kWord <= end) return 0xf;
  const size_t first = std::max(begin, index * kWord) - index * kWord;
  const size_t last = std::min(end, (index + 1) * kWord) - index * kWord;
  return (1u << last) - (1u << first);
}

}  // namespace

std::string Origin::line() const {
  if (bits_ & kInstruction)
    return source_line(reinterpret_cast<const void*>(bits_ & ~kInstruction));
  const auto place = std::bit_cast<std::source_location>(bits_);
  const std::string path = place.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line());
}

void SharedAccesses::begin_block(size_t bytes, uint32_t barriers) {
  words_.resize(std::max(words_.size(), (bytes + kWord - 1) / kWord));
  block_ = barriers;
}

SharedAccesses::Word& SharedAccesses::word(size_t index) {
  Word& word = words_[index];
  if (word.block != block_) {
    word = {};
    word.block = block_;
  }
  return word;
}

SharedAccesses::Access SharedAccesses::access(const Time& now, const Origin& origin,
                                              unsigned bytes) {
  Access access;
  access.origin = origin;
  access.barriers = now.barriers;
  access.warp_barriers = now.warp_barriers;
  access.thread = now.thread;
  access.bytes = bytes;
  return access;
}

bool SharedAccesses::is_unordered(const Access& before, unsigned bytes, const Time& now) {
  if (before.barriers != now.barriers && !before.is_under_way) return false;
  if (!(before.bytes & bytes)) return false;
  if (before.is_under_way) return true;
  if (before.thread == now.thread && !before.is_warps) return false;
  return before.thread / 32 != now.thread / 32 || before.warp_barriers == now.warp_barriers;
}

void SharedAccesses::complain(const char* what, const Access& before, size_t offset,
                              const Time& now) {
  const std::string where = " offset " + std::to_string(offset) + " of shared memory, which ";
  const std::string who = "thread " + std::to_string(before.thread);
  if (before.is_under_way) {
    complaint_ = std::string("unfinished copy: ") + what + where + "the cp.async of " +
                 (before.thread == now.thread ? "this thread" : who) + " at " +
                 before.origin.line() + " may not have written yet";
  } else {
    const bool wrote = &before == &words_[offset / kWord].write;
    complaint_ = std::string("race: ") + what + where + who +
                 (wrote ? " writes at " : " reads at ") + before.origin.line() +
                 " with no barrier in between";
  }
}

bool SharedAccesses::read(size_t offset, size_t bytes, const Time& now, const Origin& origin) {
  const size_t end = offset + bytes;
  for (size_t i = offset / kWord; i * kWord < end; ++i) {
    if (!read_word(word(i), i * kWord, bytes_in_word(i, offset, end), now, origin)) return false;
  }
  return true;
}

bool SharedAccesses::read_word(Word& word, size_t offset, unsigned bytes, const Time& now,
                               const Origin& origin) {
  Access& last = word.reads[0];
  const bool by_same_warp = last.barriers == now.barriers &&
                            last.warp_barriers == now.warp_barriers &&
                            last.thread / 32 == now.thread / 32 && (last.bytes & bytes) == bytes;
  // If two lanes were right to read, one of them did not write, so every lane may.
  if (by_same_warp && (last.is_warps || last.thread == now.thread)) return true;
  if (is_unordered(word.write, bytes, now)) {
    complain("a read of", word.write, offset, now);
    return false;
  }
  if ((word.written & bytes) != bytes) {
    complaint_ = "uninitialised read: nothing was written to offset " + std::to_string(offset) +
                 " of shared memory";
    return false;
  }
  if (by_same_warp) {
    last.is_warps = true;
  } else {
    if (last.bytes && last.thread / 32 != now.thread / 32) word.reads[1] = last;
    last = access(now, origin, bytes);
  }
  return true;
}

bool SharedAccesses::read_from_outside(size_t offset, size_t bytes, uint32_t first) {
  const size_t end = offset + bytes;
  for (size_t i = offset / kWord; i * kWord < end; ++i) {
    const Word& touched = word(i);
    const Access& write = touched.write;
    const unsigned part = bytes_in_word(i, offset, end);
    const std::string what =
        ": a read of offset " + std::to_string(i * kWord) + " of another block's shared memory, ";
    const std::string who = "thread " + std::to_string(write.thread) + " of that block";
    if ((write.bytes & part) && write.is_under_way) {
      complaint_ = "unfinished copy" + what + "which the cp.async of " + who + " at " +
                   write.origin.line() + " may not have written yet";
      return false;
    }
    if ((write.bytes & part) && write.barriers >= first) {
      complaint_ = "race" + what + "which " + who + " writes at " + write.origin.line() +
                   " with no barrier of the cluster in between";
      return false;
    }
    if ((touched.written & part) != part) {
      complaint_ = "uninitialised read" + what + "to which nothing was written";
      return false;
    }
  }
  return true;
}

bool SharedAccesses::write(size_t offset, size_t bytes, const Time& now, const Origin& origin) {
  const size_t end = offset + bytes;
  for (size_t i = offset / kWord; i * kWord < end; ++i) {
    Word& touched = word(i);
    const unsigned part = bytes_in_word(i, offset, end);
    for (const Access* before : {&touched.write, &touched.reads[0], &touched.reads[1]}) {
      if (is_unordered(*before, part, now)) {
        complain("a write to", *before, i * kWord, now);
        return false;
      }
    }
    touched.write = access(now, origin, part);
    touched.reads = {};
    touched.written |= part;
  }
  return true;
}

bool SharedAccesses::begin_copy(size_t offset, size_t bytes, const Time& now,
                                const Origin& origin) {
  if (!write(offset, bytes, now, origin)) return false;
  for (size_t i = offset / kWord; i * kWord < offset + bytes; ++i) {
    words_[i].write.is_under_way = true;
  }
  return true;
}

void SharedAccesses::end_copy(size_t offset, size_t bytes, const Time& now) {
  for (size_t i = offset / kWord; i * kWord < offset + bytes; ++i) {
    Access& write = words_[i].write;
    write.is_under_way = false;
    write.barriers = now.barriers;
    write.warp_barriers = now.warp_barriers;
  }
}

void SharedAccesses::write_atomically(size_t offset, size_t bytes) {
  for (size_t i = offset / kWord; i * kWord < offset + bytes; ++i) {
    word(i).written |= bytes_in_word(i, offset, offset + bytes);
  }
}

}  // namespace fused_resnet::on_host
