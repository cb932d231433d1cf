#include "cuda_on_host/shared_accesses.h"

#include <algorithm>
#include <bit>

#include "cuda_on_host/execution.h"
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
  words_.resize(std::max(words_.size(), (bytes + kLine - 1) / kLine * (kLine / kWord)));
  lines_.assign((bytes + kLine - 1) / kLine, Line::kUntouched);
  asynchronous_.clear();
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

uint16_t SharedAccesses::time_of(const Time& now) {
  if (!now.order) return 0;
  const uint32_t time = now.order->time_of(now.agent());
  if (time > UINT16_MAX) throw_error("a thread passes more barriers than are counted");
  return static_cast<uint16_t>(time);
}

bool SharedAccesses::is_unordered(const Word& word, const Access& before, unsigned bytes,
                                  const Time& now) {
  if (before.barriers != now.barriers && !before.is_under_way) return false;
  if (!(before.bytes & bytes)) return false;
  if (before.is_under_way) return true;
  if (before.thread == now.thread && !before.is_warps) return false;
  if (before.thread / 32 == now.thread / 32 && before.warp_barriers != now.warp_barriers) {
    return false;
  }
  if (!now.order) return true;
  const uint32_t time = word.times[&before - &word.write];
  const unsigned first =
      now.first_thread + (before.is_warps ? before.thread / 32 * 32 : before.thread);
  for (unsigned agent = first; agent < first + (before.is_warps ? 32 : 1); ++agent) {
    if (agent != now.agent() && !now.order->knows(now.agent(), agent, time)) return true;
  }
  return false;
}

// Whether a copy or product that begins now may count on what a thread did before.
bool SharedAccesses::copies_know(const Word& word, const Access& before, const Time& now) {
  const uint32_t time = word.times[&before - &word.write];
  const unsigned first =
      now.first_thread + (before.is_warps ? before.thread / 32 * 32 : before.thread);
  for (unsigned agent = first; agent < first + (before.is_warps ? 32 : 1); ++agent) {
    if (!now.order->copies_know(now.agent(), agent, time)) return false;
  }
  return true;
}

// Before an access of threads: words that a load wrote become theirs.
void SharedAccesses::touch(size_t begin, size_t end) {
  for (size_t line = begin / kLine; line * kLine < end; ++line) {
    if (lines_[line] == Line::kOfThreads) continue;
    if (lines_[line] == Line::kLoaded) {
      for (size_t i = line * (kLine / kWord); i < (line + 1) * (kLine / kWord); ++i) {
        words_[i] = {};
        words_[i].block = block_;
        words_[i].written = 0xf;
      }
    }
    lines_[line] = Line::kOfThreads;
  }
}

// Whether the copies and products so far leave these bytes to an access.
bool SharedAccesses::is_free(size_t begin, size_t end, bool writes, const char* what,
                             const Time& now) {
  for (const Asynchronous& other : asynchronous_) {
    if (other.end <= begin || end <= other.begin || !(writes || other.writes())) continue;
    if (!other.is_under_way && now.order->knows(now.agent(), other.agent, other.time)) continue;
    const std::string where = std::string(" offset ") +
                              std::to_string(std::max(begin, other.begin)) +
                              " of shared memory, which ";
    const std::string who =
        " of thread " + std::to_string(other.thread) + " at " + other.origin.line();
    if (other.work == Work::kLoad) {
      complaint_ = std::string("unfinished copy: ") + what + where + "the load" + who +
                   " may not have written yet";
    } else if (other.work == Work::kStore) {
      complaint_ = std::string("unfinished copy: ") + what + where + "the store" + who +
                   " may not have read yet";
    } else {
      complaint_ = std::string("unfinished product: ") + what + where + "the product" + who +
                   " may not have read yet";
    }
    return false;
  }
  return true;
}

uint64_t SharedAccesses::begin_asynchronous(Asynchronous work, const Time& now) {
  const char* what = work.work == Work::kLoad    ? "a load to"
                     : work.work == Work::kStore ? "a store of"
                                                 : "a product of";
  if (!is_free(work.begin, work.end, work.writes(), what, now)) return 0;
  for (size_t line = work.begin / kLine; line * kLine < work.end; ++line) {
    const size_t line_begin = std::max(work.begin, line * kLine);
    const size_t line_end = std::min(work.end, (line + 1) * kLine);
    if (lines_[line] == Line::kUntouched && !work.writes()) {
      complaint_ = std::string("uninitialised read: ") + what + " offset " +
                   std::to_string(line_begin) + " of shared memory, to which nothing was written";
      return 0;
    }
    if (lines_[line] == Line::kOfThreads) {
      for (size_t i = line_begin / kWord; i * kWord < line_end; ++i) {
        Word& touched = word(i);
        const unsigned part = bytes_in_word(i, line_begin, line_end);
        for (const Access* before : {&touched.write, &touched.reads[0], &touched.reads[1]}) {
          if (!(before->bytes & part)) continue;
          if (before != &touched.write && !work.writes()) continue;
          if (before->is_under_way || !copies_know(touched, *before, now)) {
            complaint_ = std::string("unfenced: ") + what + " offset " + std::to_string(i * kWord) +
                         " of shared memory, which thread " + std::to_string(before->thread) +
                         (before == &touched.write ? " writes at " : " reads at ") +
                         before->origin.line() + " with no fence for copies and barrier in between";
            return 0;
          }
        }
        if (!work.writes() && (touched.written & part) != part) {
          complaint_ = std::string("uninitialised read: ") + what + " offset " +
                       std::to_string(i * kWord) +
                       " of shared memory, to which nothing was written";
          return 0;
        }
      }
    }
    if (work.writes() && line_end - line_begin < kLine) {
      touch(line_begin, line_end);
      for (size_t i = line_begin / kWord; i * kWord < line_end; ++i) {
        Word& touched = word(i);
        touched.write = {};
        touched.reads = {};
        touched.written |= bytes_in_word(i, line_begin, line_end);
      }
    } else if (work.writes()) {
      lines_[line] = Line::kLoaded;
    }
  }
  // What is over and known to this one needs not be known to those behind it; and a warp's products
  // of one step read the same rows.
  std::erase_if(asynchronous_, [&](const Asynchronous& other) {
    const bool within = work.begin <= other.begin && other.end <= work.end;
    return within && !other.is_under_way &&
           (work.writes() || (other.work == work.work && other.agent == work.agent));
  });
  work.number = ++last_number_;
  asynchronous_.push_back(work);
  return work.number;
}

bool SharedAccesses::is_of(uint64_t number, size_t begin, size_t end) const {
  return std::any_of(asynchronous_.begin(), asynchronous_.end(), [&](const Asynchronous& work) {
    return work.number == number && work.begin == begin && work.end == end;
  });
}

void SharedAccesses::end_asynchronous(uint64_t number, unsigned agent, uint32_t time) {
  for (Asynchronous& work : asynchronous_) {
    if (work.number != number) continue;
    work.is_under_way = false;
    work.agent = agent;
    work.time = time;
  }
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
  if (!asynchronous_.empty() && !is_free(offset, end, false, "a read of", now)) return false;
  touch(offset, end);
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
  if (is_unordered(word, word.write, bytes, now)) {
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
    if (last.bytes && last.thread / 32 != now.thread / 32) {
      word.reads[1] = last;
      word.times[2] = word.times[1];
    }
    last = access(now, origin, bytes);
    word.times[1] = time_of(now);
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
  if (!asynchronous_.empty() && !is_free(offset, end, true, "a write to", now)) return false;
  touch(offset, end);
  for (size_t i = offset / kWord; i * kWord < end; ++i) {
    Word& touched = word(i);
    const unsigned part = bytes_in_word(i, offset, end);
    for (const Access* before : {&touched.write, &touched.reads[0], &touched.reads[1]}) {
      if (is_unordered(touched, *before, part, now)) {
        complain("a write to", *before, i * kWord, now);
        return false;
      }
    }
    touched.write = access(now, origin, part);
    touched.reads = {};
    touched.times = {time_of(now), 0, 0};
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
  touch(offset, offset + bytes);
  for (size_t i = offset / kWord; i * kWord < offset + bytes; ++i) {
    word(i).written |= bytes_in_word(i, offset, offset + bytes);
  }
}

}  // namespace fused_resnet::on_host
