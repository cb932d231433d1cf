#include "cuda_on_host/global_accesses.h"

#include <algorithm>

namespace fused_resnet::on_host {
namespace {

template <typename T>
void add(std::vector<T>& all, const T& one) {
  if (std::find(all.begin(), all.end(), one) == all.end()) all.push_back(one);
}

// The bytes [begin, end) as far as they are in the word at `word`, one bit each.
unsigned bytes_of_word(uintptr_t word, uintptr_t begin, uintptr_t end) {
  unsigned bytes = 0;
  for (unsigned i = 0; i < 4; ++i) bytes |= unsigned{word + i >= begin && word + i < end} << i;
  return bytes;
}

}  // namespace

void GlobalAccesses::begin_grid() {
  pages_.clear();
  last_page_ = nullptr;
  last_number_ = 0;
  blocks_.clear();
  known_block_ = nullptr;
  handed_on_.clear();
}

GlobalAccesses::Block& GlobalAccesses::block_of(uint64_t number) {
  if (!known_block_ || number != last_block_) known_block_ = &blocks_[last_block_ = number];
  return *known_block_;
}

GlobalAccesses::Page* GlobalAccesses::page_of(uintptr_t number) {
  if (number != last_number_) {
    const auto found = pages_.find(number);
    last_number_ = number;
    last_page_ = found == pages_.end() ? nullptr : found->second.get();
  }
  return last_page_;
}

bool GlobalAccesses::knows(const Block& block, const Store& store, const Time& now) {
  return std::any_of(block.known.begin(), block.known.end(), [&](const Known& known) {
    return (known.thread == now.thread || known.barriers < now.barriers) &&
           known.stores.holds(store);
  });
}

const GlobalAccesses::Store* GlobalAccesses::unordered(const char* address, size_t bytes,
                                                       const Time& now) {
  if (pages_.empty()) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  for (uintptr_t word = begin / kWord * kWord; word < end; word += kWord) {
    const Page* page = page_of(word / kPage);
    if (!page) continue;
    const Store& store = (*page)[word % kPage / kWord];
    if (!store.bytes || store.block == now.block) continue;
    if (!(store.bytes & bytes_of_word(word, begin, end))) continue;
    if (!knows(block_of(now.block), store, now)) return &store;
  }
  return nullptr;
}

void GlobalAccesses::store(const char* address, size_t bytes, const Time& now,
                           const Origin& origin) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + bytes;
  const uint32_t fences = block_of(now.block).fences;
  for (uintptr_t word = begin / kWord * kWord; word < end; word += kWord) {
    Page* page = page_of(word / kPage);
    if (!page) {
      auto& made = pages_[word / kPage] = std::make_unique<Page>();
      page = last_page_ = made.get();
    }
    Store& last = (*page)[word % kPage / kWord];
    const bool by_same = last.block == now.block && last.thread == now.thread &&
                         last.barriers == now.barriers && last.fences == fences;
    const unsigned others = by_same ? last.bytes : 0;
    last = {origin,
            static_cast<uint32_t>(now.block),
            now.barriers,
            fences,
            static_cast<uint16_t>(now.thread),
            static_cast<uint16_t>(others | bytes_of_word(word, begin, end))};
  }
}

void GlobalAccesses::fence(const Time& now) {
  Block& block = block_of(now.block);
  for (const Gathered& stores : block.seen[now.thread]) {
    block.known.push_back({stores, now.thread, now.barriers});
  }
  block.seen.erase(now.thread);
  Stores& gathered = block.gathered[now.thread];
  gathered = {{static_cast<uint32_t>(now.block), now.barriers, block.fences++,
               static_cast<int>(now.thread)}};
  for (const Known& known : block.known) {
    if (known.thread == now.thread || known.barriers < now.barriers) add(gathered, known.stores);
  }
}

void GlobalAccesses::atomic(const void* address, const Time& now) {
  Block& block = block_of(now.block);
  Stores& variable = handed_on_[address];
  for (const Gathered& stores : variable) add(block.seen[now.thread], stores);
  if (const auto own = block.gathered.find(now.thread); own != block.gathered.end()) {
    for (const Gathered& stores : own->second) add(variable, stores);
  }
}

void GlobalAccesses::join(const std::vector<Time>& times) {
  std::vector<Stores> known;
  for (const Time& time : times) {
    // All stores so far: that block has not counted this barrier yet.
    Stores& stores = known.emplace_back();
    stores.push_back({static_cast<uint32_t>(time.block), time.barriers + 1, 0, -1});
    for (const Known& one : block_of(time.block).known) add(stores, one.stores);
  }
  for (size_t i = 0; i < times.size(); ++i) {
    Block& block = block_of(times[i].block);
    block.known.clear();
    for (const Stores& stores : known) {
      for (const Gathered& one : stores) block.known.push_back({one, 0, times[i].barriers});
    }
    // A block's own stores before an earlier barrier are among those before this one.
    std::erase_if(block.known, [&](const Known& one) {
      return one.stores.block == times[i].block ||
             std::any_of(known.begin(), known.end(), [&](const Stores& stores) {
               return stores[0].block == one.stores.block && !(stores[0] == one.stores);
             });
    });
  }
}

}  // namespace fused_resnet::on_host
