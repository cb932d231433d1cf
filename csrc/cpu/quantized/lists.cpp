// Weights as lists of steps, for lists.inl, which says what for.

#include "cpu/quantized/lists.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "checks.h"
#include "cpu/conv_layer.h"
#include "cpu/quantized/layers.h"

namespace fused_resnet::cpu {
namespace {

// Sums in 16 bits of weights times bytes of up to 255 stay in 16 bits if the positive weights'
// sum is at most this and the negative ones' at least its negative: 255 * 128 < 2^15.
constexpr int kMostInWord = 128;

// Steps behind one that are looked at for its partner. Of steps with normally distributed weights
// about one in five would do.
constexpr size_t kMostPartners = 256;

// The weights of kListChannels output channels in the reduction, byte by byte.
class ListedColumns {
 public:
  ListedColumns(const int8_t* tiles, const ByteFilter& filter, int64_t list)
      : filter_(filter), run_bytes_(filter.steps() * 4) {
    const int64_t channel = list * kListChannels, column = channel % kByteBlockK;
    first_ = tiles + channel / kByteBlockK * filter.block_bytes() + column / 16 * kByteTile +
             column % 16 * 4;
  }

  int64_t run_bytes() const { return run_bytes_; }
  // Of output channel k of the list.
  int at(int64_t run, int64_t byte, int64_t k) const {
    if (byte >= run_bytes_) return 0;
    const int64_t chunk = run * filter_.chunks() + byte / kByteChunk;
    return first_[chunk * 2 * kByteTile + byte % kByteChunk / 4 * 64 + k * 4 + byte % 4];
  }
  bool is_zero(int64_t run, int64_t byte) const {
    for (int64_t k = 0; k < kListChannels; ++k) {
      if (at(run, byte, k) != 0) return false;
    }
    return true;
  }
  // Whether this byte's and the next one's products fit 16 bits together. A sum of two weights of
  // different signs is smaller than one of them.
  bool fits(int64_t run, int64_t byte) const {
    for (int64_t k = 0; k < kListChannels; ++k) {
      const int sum = at(run, byte, k) + at(run, byte + 1, k);
      if (sum < -kMostInWord || sum > kMostInWord) return false;
    }
    return true;
  }

 private:
  const ByteFilter& filter_;
  const int64_t run_bytes_;
  const int8_t* first_;
};

struct Step {
  ByteStepPlace place;
  std::array<int8_t, kListBytes> weights;
  // Of the two weights that meet in 16 bits: the sums of the positive ones and of the negative.
  std::array<int16_t, kListBytes / 2> most, least;
  int largest;  // of both
};

Step make_step(const ListedColumns& columns, int64_t run, int64_t first, int64_t begin,
               int64_t end) {
  Step step{};
  const int64_t segments = bytes_div_up(columns.run_bytes(), kListSegment);
  step.place = {static_cast<uint16_t>(run * segments + first / kListSegment),
                static_cast<uint16_t>(first % kListSegment)};
  for (int64_t byte = begin; byte < end; ++byte) {
    for (int64_t k = 0; k < kListChannels; ++k) {
      const size_t i = static_cast<size_t>(k * 4 + byte - first);
      const int weight = columns.at(run, byte, k);
      step.weights[i] = static_cast<int8_t>(weight);
      int16_t& sum = weight > 0 ? step.most[i / 2] : step.least[i / 2];
      sum = static_cast<int16_t>(sum + weight);
    }
  }
  for (size_t i = 0; i < step.most.size(); ++i) {
    step.largest = std::max({step.largest, int{step.most[i]}, -int{step.least[i]}});
  }
  return step;
}

// A step is of four bytes, but ends before the second of two weights that do not fit where it would
// add them: its first two bytes' products, and its last two's. Where the first two do not, it
// begins a byte earlier, with nothing for that byte. No other choice makes fewer steps: what covers
// the bytes from one on covers those from the next on. At worst a step has two weights a channel,
// or one at a run's first byte.
std::vector<Step> make_steps(const ListedColumns& columns, int64_t runs) {
  std::vector<Step> steps;
  for (int64_t run = 0; run < runs; ++run) {
    for (int64_t byte = 0; byte < columns.run_bytes();) {
      if (columns.is_zero(run, byte)) {
        ++byte;
        continue;
      }
      int64_t first = byte, count = 4;
      if (columns.fits(run, byte)) {
        if (!columns.fits(run, byte + 2)) count = 3;
      } else if (byte == 0) {
        count = 1;
      } else {
        first = byte - 1;
        count = columns.fits(run, byte + 1) ? 3 : 2;
      }
      const int64_t end = std::min(byte + count, columns.run_bytes());
      steps.push_back(make_step(columns, run, first, byte, end));
      byte = end;
    }
  }
  return steps;
}

bool may_be_added(const Step& a, const Step& b) {
  int beyond = 0;
  for (size_t i = 0; i < a.most.size(); ++i) {
    beyond |= a.most[i] + b.most[i] > kMostInWord;
    beyond |= a.least[i] + b.least[i] < -kMostInWord;
  }
  return beyond == 0;
}

// Puts pairs of steps that may be added in front, and returns how many there are. Those with the
// largest sums choose first, and take the largest that they may.
int64_t find_pairs(std::vector<Step>& steps) {
  std::vector<const Step*> waiting;
  for (const Step& step : steps) waiting.push_back(&step);
  std::stable_sort(waiting.begin(), waiting.end(),
                   [](const Step* a, const Step* b) { return a->largest > b->largest; });
  std::vector<std::pair<const Step*, const Step*>> pairs;
  std::vector<const Step*> singles;
  for (size_t i = 0; i < waiting.size(); ++i) {
    const Step* step = waiting[i];
    if (step == nullptr) continue;
    const Step** partner = nullptr;
    size_t looked_at = 0;
    for (size_t j = i + 1; j < waiting.size() && looked_at < kMostPartners; ++j) {
      if (waiting[j] == nullptr) continue;
      ++looked_at;
      if (may_be_added(*step, *waiting[j])) {
        partner = &waiting[j];
        break;
      }
    }
    if (partner == nullptr) {
      singles.push_back(step);
    } else {
      pairs.emplace_back(std::min(step, *partner), std::max(step, *partner));
      *partner = nullptr;
    }
  }
  // As they lie in memory, as far as that goes.
  std::sort(pairs.begin(), pairs.end());
  std::sort(singles.begin(), singles.end());
  std::vector<Step> ordered;
  ordered.reserve(steps.size());
  for (const auto& [first, second] : pairs) {
    ordered.push_back(*first);
    ordered.push_back(*second);
  }
  for (const Step* step : singles) ordered.push_back(*step);
  steps = std::move(ordered);
  return static_cast<int64_t>(pairs.size());
}

}  // namespace

Tensor pack_lists(const char* op, const int8_t* tiles, const ByteFilter& filter) {
  FR_CHECK(filter.runs() * segments_of_run(filter) <= 65536, op, ": weight has ", filter.R, " x ",
           filter.S, " taps, too many");
  const ByteListsLayout layout{filter.padded_k()};
  std::vector<std::vector<Step>> steps(static_cast<size_t>(layout.count()));
  std::vector<ByteList> lists(steps.size());
  torch::stable::parallel_for(0, layout.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto list = static_cast<size_t>(i);
      steps[list] = make_steps(ListedColumns(tiles, filter, i), filter.runs());
      lists[list].pairs = find_pairs(steps[list]);
      lists[list].singles = static_cast<int64_t>(steps[list].size()) - 2 * lists[list].pairs;
    }
  });
  int64_t all = 0;
  for (const ByteList& list : lists) all += list.steps();
  int64_t before = 0;
  for (ByteList& list : lists) {
    list.places = layout.places() + before * static_cast<int64_t>(sizeof(ByteStepPlace));
    list.weights = layout.weights(all) + before * kListBytes;
    before += list.steps();
  }
  Tensor packed = packed_memory(layout.weights(all) + all * kListBytes);
  char* memory = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(memory, tiles + filter.vectors(), static_cast<size_t>(layout.lists()));
  std::memcpy(memory + layout.lists(), lists.data(), lists.size() * sizeof(ByteList));
  for (size_t i = 0; i < lists.size(); ++i) {
    char* place = memory + lists[i].places;
    char* weight = memory + lists[i].weights;
    for (const Step& step : steps[i]) {
      std::memcpy(place, &step.place, sizeof(step.place));
      std::memcpy(weight, step.weights.data(), kListBytes);
      place += sizeof(step.place);
      weight += kListBytes;
    }
  }
  return packed;
}

void check_lists(const char* op, const Tensor& packed, const ByteFilter& filter) {
  const ByteListsLayout layout{filter.padded_k()};
  const int64_t numel = packed.numel();
  FR_CHECK(numel >= layout.places(), op, ": packed has ", numel, " elements, the weight needs ",
           layout.places(), " and its lists");
  const int8_t* memory = static_cast<const int8_t*>(packed.const_data_ptr());
  const ByteList* lists = reinterpret_cast<const ByteList*>(memory + layout.lists());
  bool right = reinterpret_cast<uintptr_t>(memory) % alignof(ByteList) == 0;
  int64_t steps = 0;
  for (int64_t i = 0; right && i < layout.count(); ++i) {
    const auto is_count = [numel](int64_t count) { return count >= 0 && count <= numel; };
    right = is_count(lists[i].pairs) && is_count(lists[i].singles);
    if (right) steps += lists[i].steps();
  }
  right = right && numel == layout.weights(steps) + steps * kListBytes;
  int64_t before = 0;
  for (int64_t i = 0; right && i < layout.count(); ++i) {
    const int64_t own = before * static_cast<int64_t>(sizeof(ByteStepPlace));
    right = lists[i].places == layout.places() + own &&
            lists[i].weights == layout.weights(steps) + before * kListBytes;
    before += lists[i].steps();
  }
  if (right) {
    const auto* place = reinterpret_cast<const ByteStepPlace*>(memory + layout.places());
    const int64_t segments = segments_of_run(filter), all = filter.runs() * segments;
    const int64_t rest = filter.steps() * 4 - (segments - 1) * kListSegment;  // of a run's last
    int beyond = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const bool is_last = segments == 1 || place[i].segment % segments == segments - 1;
      beyond |= place[i].segment >= all || (is_last && place[i].byte >= rest);
    }
    right = beyond == 0;
  }
  FR_CHECK(right, op, ": packed has ", numel, " elements, which are not this weight's lists");
}

std::vector<int64_t> segment_offsets(const ByteFilter& filter, int64_t tap_h, int64_t tap_w) {
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r < filter.R; ++r) {
    for (int64_t s = 0; s < (filter.joined ? 1 : filter.S); ++s) {
      for (int64_t i = 0; i < segments_of_run(filter); ++i) {
        offsets.push_back(r * tap_h + s * tap_w + i * kListSegment);
      }
    }
  }
  return offsets;
}

}  // namespace fused_resnet::cpu
