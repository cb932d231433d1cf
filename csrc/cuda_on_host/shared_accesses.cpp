#include "cuda_on_host/shared_accesses.h"

#include <algorithm>
#include <bit>

#include "cuda_on_host/memory.h"

namespace fused_resnet::on_host {
namespace {

constexpr size_t kWord = 4;

// The bytes of word `index` that lie in [begin, end), one bit each.
uint8_t bytes_in_word(size_t index, size_t begin, size_t end) {
  const size_t first = std::max(begin, index * kWord) - index * kWord;
  const size_t last = std::min(end, (index + 1) * kWord) - index * kWord;
  return static_cast<uint8_t>((1u << last) - (1u << first));
}

}  // namespace

Origin::Origin(const std::source_location& place) : pointer_(std::bit_cast<const void*>(place)) {}

Origin Origin::instruction(const void* address) {
  Origin origin;
  origin.pointer_ = address;
  origin.is_instruction_ = true;
  return origin;
}

std::string Origin::line() const {
  if (is_instruction_) return source_line(pointer_);
  const auto place = std::bit_cast<std::source_location>(pointer_);
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

bool SharedAccesses::is_unordered(const Access& before, uint8_t bytes, const Time& now) const {
  if (!(before.bytes & bytes)) return false;
  if (before.is_under_way) return true;
  if (before.thread == now.thread || before.barriers != now.barriers) return false;
  return before.thread / 32 != now.thread / 32 || before.warp_barriers == now.warp_barriers;
}

std::string SharedAccesses::describe(const char* what, const Access& before, size_t offset,
                                     const Time& now) const {
  const std::string where = " offset " + std::to_string(offset) + " of shared memory, which ";
  const std::string who = "thread " + std::to_string(before.thread);
  if (before.is_under_way) {
    return std::string("unfinished copy: ") + what + where + "the cp.async of " +
           (before.thread == now.thread ? "this thread" : who) + " at " + before.origin.line() +
           " may not have written yet";
  }
  const bool wrote = &before == &words_[offset / kWord].write;
  return std::string("race: ") + what + where + who + (wrote ? " writes at " : " reads at ") +
         before.origin.line() + " with no barrier in between";
}

std::string SharedAccesses::read(size_t offset, size_t bytes, const Time& now,
                                 const Origin& origin) {
  const size_t end = offset + bytes;
  for (size_t i = offset / kWord; i * kWord < end; ++i) {
    Word& touched = word(i);
    const uint8_t part = bytes_in_word(i, offset, end);
    if (is_unordered(touched.write, part, now)) {
      return describe("a read of", touched.write, i * kWord, now);
    }
    if ((touched.written & part) != part) {
      return "uninitialised read: nothing was written to offset " + std::to_string(i * kWord) +
             " of shared memory";
    }
    Access& last = touched.reads[0];
    if (last.bytes && last.thread / 32 != now.thread / 32) touched.reads[1] = last;
    last = {origin, now.barriers, now.warp_barriers, static_cast<uint16_t>(now.thread), part};
  }
  return "";
}

std::string SharedAccesses::check_write(Word& touched, size_t offset, uint8_t bytes,
                                        const Time& now) {
  if (is_unordered(touched.write, bytes, now)) {
    return describe("a write to", touched.write, offset, now);
  }
  for (const Access& read : touched.reads) {
    if (is_unordered(read, bytes, now)) return describe("a write to", read, offset, now);
  }
  return "";
}

std::string SharedAccesses::write(size_t offset, size_t bytes, const Time& now,
                                  const Origin& origin) {
  const size_t end = offset + bytes;
  for (size_t i = offset / kWord; i * kWord < end; ++i) {
    Word& touched = word(i);
    const uint8_t part = bytes_in_word(i, offset, end);
    if (std::string wrong = check_write(touched, i * kWord, part, now); !wrong.empty()) {
      return wrong;
    }
    touched.write = {origin, now.barriers, now.warp_barriers, static_cast<uint16_t>(now.thread),
                     part};
    touched.written |= part;
  }
  return "";
}

std::string SharedAccesses::begin_copy(size_t offset, size_t bytes, const Time& now,
                                       const Origin& origin) {
  std::string wrong = write(offset, bytes, now, origin);
  for (size_t i = offset / kWord; i * kWord < offset + bytes; ++i) {
    words_[i].write.is_under_way = true;
  }
  return wrong;
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
