// The convolution of bytes on vectors. The including file has defined, in its anonymous namespace,
// vectors (bytes_*.h) and
//
//   dot(sums, pixels, weights)   adds to each of kLanes sums four products of unsigned and signed
//                                bytes, exactly
//   kDotPixels, kDotChannels     how many pixels and output channels are summed in registers
//
// A task's output pixels are taken kDotPixels at a time, each by its own address, so that no
// product is without an output but for the task's last few pixels, of which up to kDotFew are
// taken kDotFew at a time. Sums of 64 channels wait in the first-level cache for the step behind
// them, which is taken between the products of the next tile; others go there from registers. A
// projection's sums meet the others' of their pixels and channels in that cache.
//
// Nothing but <stdint.h> is included: see cpu/isa.h.

#include "cpu/quantized/finish.inl"
#include "cpu/quantized/walk.inl"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotFew = kDotPixels < 3 ? 1 : kDotPixels / 3;

// The taps of a filter, from a pixel on: R x S runs of `steps` times four bytes.
struct DotTaps {
  int64_t R, S, run_h, run_w, steps;
  int64_t block_bytes;  // from a block of 32 output channels' weights to the next one's
  // The bytes of a pixel, where those of the next tile come next in memory and no tap was there
  // before, or 0.
  int64_t next_pixel;
};

// Where the weights of a vector of output channels are, from those of the first.
FR_BYTES_INLINE int64_t weights_of(int64_t vector, int64_t block_bytes) {
  const int64_t k = vector * kLanes;
  return k / kByteBlockK * block_bytes + k % kByteBlockK / 16 * kByteTile + k % 16 * 4;
}

// Lines to ask for ahead: those of a step are `pitch` bytes apart.
struct Lines {
  const void* at;
  int64_t pitch;
};

// Weights of the next output channels, the filter's and a projection's, which lie in a slower
// cache: each step asks for a line of them, as long as there are some.
struct Ahead {
  const int8_t *at, *end;
  const int8_t *other, *other_end;

  // The lines for so many steps; where none are left, `otherwise`.
  FR_BYTES_INLINE Lines take(int64_t steps, Lines otherwise) {
    if (at >= end) {
      at = other;
      end = other_end;
      other = other_end = nullptr;
    }
    if (at >= end) return otherwise;
    const Lines lines = {at, 64};
    at += steps * 64;
    return lines;
  }
};

// Sums of the last tile, whose step is taken between the products of this one: that needs other
// units of the processor, and would take a third as long again as the products of 64 channels.
template <bool kOffset, ByteShortcut kShortcut>
struct Waiting {
  static constexpr bool kProjection = kShortcut == ByteShortcut::projection;
  static constexpr int kVectors = kDotChannels / kLanes;

  DotStep step;
  int64_t next = 0, count = 0;  // the pixels that wait
  const uint8_t* added[kDotPixels];
  uint8_t* out[kDotPixels];
  // Of the filter, and of a projection.
  alignas(64) int32_t sums[kDotPixels * kDotChannels];
  alignas(64) int32_t others[kProjection ? kDotPixels * kDotChannels : 1];
  alignas(64) int32_t offsets[kOffset ? 2 * kDotChannels : 1];

  FR_BYTES_INLINE void finish_next() {
    const int64_t at = next++ * kDotChannels;
    Ints last[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      last[v] = load_ints((kProjection ? others : sums) + at + v * kLanes);
    }
    finish<kOffset, kShortcut>(step, last, sums + at, added[next - 1], out[next - 1]);
  }
  FR_BYTES_INLINE void finish_all() {
    while (next < count) finish_next();
  }
};

// What is done between the products: nothing, or with every other step of them a pixel that waits.
struct Nothing {
  FR_BYTES_INLINE void step() {}
};
template <class Wait>
struct FinishWaiting {
  Wait& waiting;
  int64_t steps = waiting.next < waiting.count ? 2 : INT64_MAX;

  FR_BYTES_INLINE void step() {
    if (__builtin_expect(--steps == 0, 0)) {
      waiting.finish_next();
      steps = waiting.next < waiting.count ? 2 : INT64_MAX;
    }
  }
};

// All products of some pixels and kVectors vectors of output channels, whose first weights are at
// `weight`.
template <int kPixels, int kVectors, class Meanwhile>
FR_BYTES_INLINE void sum_products(const DotTaps& taps, const uint8_t* const (&in)[kDotPixels],
                                  const int8_t* weight, Ahead& ahead, Meanwhile meanwhile,
                                  Ints (&total)[kPixels][kVectors]) {
  const int64_t block_bytes = taps.block_bytes;
  // A step asks for half a line of the next tile's pixels, which is more than its share.
  const Lines pixels = {in[kPixels - 1] + taps.next_pixel, taps.next_pixel == 0 ? 0 : 32};
  const Lines lines = ahead.take(taps.R * taps.S * taps.steps, pixels);
  const char* asked = static_cast<const char*>(lines.at);
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) total[i][v] = broadcast_int(0);
  }
  for (int64_t r = 0; r < taps.R; ++r) {
    for (int64_t s = 0; s < taps.S; ++s) {
      int64_t at = r * taps.run_h + s * taps.run_w;
      for (int64_t left = taps.steps; left > 0; left -= 16, weight += 2 * kByteTile) {
        const int8_t* four = weight;
        const int8_t* const end = four + (left < 16 ? left : 16) * 64;
        for (; four != end; four += 64, at += 4) {
          __builtin_prefetch(asked, 0, 2);
          asked += lines.pitch;
          Ints weights[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            weights[v] =
                load_ints(reinterpret_cast<const int32_t*>(four + weights_of(v, block_bytes)));
          }
#pragma GCC unroll 8
          for (int i = 0; i < kPixels; ++i) {
            const Ints pixel = broadcast_four(in[i] + at);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v) total[i][v] = dot(total[i][v], pixel, weights[v]);
          }
          meanwhile.step();
        }
      }
    }
  }
}

// A task's convolution, and what of it does not change from pixel to pixel.
struct DotRun {
  const ByteConv& conv;
  DotTaps taps, projection;

  explicit DotRun(const ByteConv& c) : conv(c) {
    const ByteFilter& filter = c.filter;
    const int64_t pixel = c.in.pixel();
    taps = {filter.R,
            filter.joined ? 1 : filter.S,
            c.dil_h * c.in.pitch() * pixel,
            c.dil_w * pixel,
            filter.steps(),
            filter.block_bytes(),
            0};
    // A last convolution's pixels have just been written, and are read for many output channels.
    const bool is_pointwise = filter.R == 1 && filter.S == 1 && c.stride_h == 1 && c.stride_w == 1;
    if (is_pointwise && c.shortcut == ByteShortcut::none) taps.next_pixel = pixel;
    projection = taps;
    if (!c.doubled) {
      projection = {1, 1, 0, 0, c.projection.steps(), c.projection.block_bytes(), 0};
    }
  }

  // Those of some blocks of output channels.
  template <ByteShortcut kShortcut>
  FR_BYTES_INLINE Ahead weights_ahead(int64_t begin, int64_t end) const {
    const int8_t *own = conv.weight.packed, *other = conv.projection_weight.packed;
    Ahead ahead = {own + begin * taps.block_bytes, own + end * taps.block_bytes, nullptr, nullptr};
    if (kShortcut == ByteShortcut::projection) {
      ahead.other = other + begin * projection.block_bytes;
      ahead.other_end = other + end * projection.block_bytes;
    }
    return ahead;
  }
};

FR_BYTES_INLINE const int8_t* weight_at(const ByteWeight& weight, int64_t channel,
                                        int64_t block_bytes) {
  return weight.packed + channel / kByteBlockK * block_bytes +
         channel % kByteBlockK / 16 * kByteTile;
}

// kPixels of `pixels` and kVectors vectors of output channels, from `channel` on.
template <bool kOffset, ByteShortcut kShortcut, int kVectors, int kPixels>
void convolve(const DotRun& run, const DotPixels& pixels, int64_t channel, Ahead& ahead) {
  constexpr bool kProjection = kShortcut == ByteShortcut::projection;
  constexpr int64_t kChannels = kVectors * kLanes;
  const ByteConv& conv = run.conv;
  const ByteWeight &weight = conv.weight, &other = conv.projection_weight;
  alignas(64) int32_t first[kProjection ? kPixels * kChannels : 1];
  const int64_t base = conv.filter.groups == 1 ? 0 : conv.filter.base(channel / kByteBlockK);
  const uint8_t* in[kDotPixels];
  for (int i = 0; i < kDotPixels; ++i) in[i] = pixels.in[i] + base;
  Ints sums[kPixels][kVectors];
  sum_products(run.taps, in, weight_at(weight, channel, run.taps.block_bytes), ahead, Nothing(),
               sums);
  if constexpr (kProjection) {
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) store_ints(first + i * kChannels + v * kLanes, sums[i][v]);
    }
    sum_products(run.projection, conv.doubled ? pixels.in : pixels.projected,
                 weight_at(other, channel, run.projection.block_bytes), ahead, Nothing(), sums);
  }
  alignas(64) int32_t offsets[kOffset ? 2 * kChannels : 1];
  DotStep step = {weight.scale + channel,
                  weight.shift + channel,
                  kProjection ? other.scale + channel : nullptr,
                  offsets,
                  offsets + (kOffset ? kChannels : 0),
                  broadcast_int(conv.added_zero_point),
                  broadcast(conv.shortcut_scale)};
  if constexpr (kOffset) {
    find_offsets(weight, channel, kChannels, offsets);
    if constexpr (kProjection) find_offsets(other, channel, kChannels, offsets + kChannels);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
    if (i < pixels.count) {
      finish<kOffset, kShortcut>(
          step, sums[i], first + (kProjection ? i * kChannels : 0),
          kShortcut == ByteShortcut::bytes ? pixels.added[i] + channel : nullptr,
          pixels.out[i] + channel);
    }
  }
}

// kPixels of `pixels` and kDotChannels output channels, which then wait.
template <bool kOffset, ByteShortcut kShortcut, int kPixels>
void convolve_and_wait(const DotRun& run, const DotPixels& pixels, int64_t channel, Ahead& ahead,
                       Waiting<kOffset, kShortcut>& waiting) {
  using Wait = Waiting<kOffset, kShortcut>;
  constexpr bool kProjection = Wait::kProjection;
  constexpr int kVectors = Wait::kVectors;
  const ByteConv& conv = run.conv;
  const ByteWeight &weight = conv.weight, &other = conv.projection_weight;
  Ints sums[kPixels][kVectors];
  const auto store = [&](int32_t* to) {
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        store_ints(to + i * kDotChannels + v * kLanes, sums[i][v]);
      }
    }
  };
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
    if (kShortcut == ByteShortcut::bytes) __builtin_prefetch(pixels.added[i] + channel);
    __builtin_prefetch(pixels.out[i] + channel, 1);
  }
  sum_products(run.taps, pixels.in, weight_at(weight, channel, run.taps.block_bytes), ahead,
               FinishWaiting<Wait>{waiting}, sums);
  waiting.finish_all();
  store(waiting.sums);
  if constexpr (kProjection) {
    sum_products(run.projection, conv.doubled ? pixels.in : pixels.projected,
                 weight_at(other, channel, run.projection.block_bytes), ahead, Nothing(), sums);
    store(waiting.others);
  }
  waiting.step = {weight.scale + channel,
                  weight.shift + channel,
                  kProjection ? other.scale + channel : nullptr,
                  waiting.offsets,
                  waiting.offsets + (kOffset ? kDotChannels : 0),
                  broadcast_int(conv.added_zero_point),
                  broadcast(conv.shortcut_scale)};
  if constexpr (kOffset) {
    find_offsets(weight, channel, kDotChannels, waiting.offsets);
    if constexpr (kProjection) {
      find_offsets(other, channel, kDotChannels, waiting.offsets + kDotChannels);
    }
  }
  waiting.next = 0;
  waiting.count = pixels.count;
  for (int64_t i = 0; i < pixels.count; ++i) {
    if (kShortcut == ByteShortcut::bytes) waiting.added[i] = pixels.added[i] + channel;
    waiting.out[i] = pixels.out[i] + channel;
  }
}

// As many of them as there are, or more.
template <bool kOffset, ByteShortcut kShortcut, int kVectors>
FR_BYTES_INLINE void convolve(const DotRun& run, const DotPixels& pixels, int64_t channel,
                              Ahead& ahead) {
  if (pixels.count <= kDotFew) {
    convolve<kOffset, kShortcut, kVectors, kDotFew>(run, pixels, channel, ahead);
  } else {
    convolve<kOffset, kShortcut, kVectors, kDotPixels>(run, pixels, channel, ahead);
  }
}

// The next output channels, up to kDotChannels of them; returns how many. Beyond 16 they begin
// where a block of weights does. With groups, blocks read different input channels.
template <bool kOffset, ByteShortcut kShortcut>
int64_t convolve(const DotRun& run, const DotPixels& pixels, int64_t channel, int64_t end,
                 Ahead& ahead, Waiting<kOffset, kShortcut>& waiting) {
  const int64_t left = end - channel;
  if constexpr (kDotChannels >= 64) {
    if (left > 48 && run.conv.filter.groups == 1) {
      if (pixels.count <= kDotFew) {
        convolve_and_wait<kOffset, kShortcut, kDotFew>(run, pixels, channel, ahead, waiting);
      } else {
        convolve_and_wait<kOffset, kShortcut, kDotPixels>(run, pixels, channel, ahead, waiting);
      }
      return 64;
    }
  }
  if constexpr (kDotChannels >= 32) {
    if (left > 16) {
      convolve<kOffset, kShortcut, 32 / kLanes>(run, pixels, channel, ahead);
      return 32;
    }
  }
  convolve<kOffset, kShortcut, 16 / kLanes>(run, pixels, channel, ahead);
  return 16;
}

template <bool kOffset, ByteShortcut kShortcut>
void run_task(const ByteConv& conv, const ByteTask& task) {
  const DotRun run(conv);
  const int64_t pixels_end = conv.in.N * conv.P * conv.Q, blocks_end = task.block_end * kByteBlockK;
  const int64_t begin = task.begin * kDotPixels, whole = task.end * kDotPixels;
  const int64_t end = whole < pixels_end ? whole : pixels_end;
  const int64_t first = task.block_begin * kByteBlockK;
  const int64_t last = blocks_end < conv.filter.K ? blocks_end : conv.filter.K;
  DotPixels pixels;
  Waiting<kOffset, kShortcut> waiting;
  Ahead ahead = {task.later, task.later_end, nullptr, nullptr};
  // Either some pixels take all output channels in turn, or, with weights that do not stay in the
  // cache, some channels take all pixels.
  if (conv.keeps_weight && last - first > kDotChannels) {
    for (DotWalk walk(conv, begin, end); walk.next(pixels);) {
      for (int64_t channel = first; channel < last;) {
        channel += convolve<kOffset, kShortcut>(run, pixels, channel, last, ahead, waiting);
      }
    }
    waiting.finish_all();
    return;
  }
  for (int64_t channel = first, taken = 0; channel < last; channel += taken) {
    ahead = {};
    DotWalk walk(conv, begin, end);
    if (!walk.next(pixels)) return;
    taken = convolve<kOffset, kShortcut>(run, pixels, channel, last, ahead, waiting);
    const int64_t next = (channel + taken) / kByteBlockK, then = next + taken / kByteBlockK;
    ahead = {task.later, task.later_end, nullptr, nullptr};
    if (then <= task.block_ahead) ahead = run.weights_ahead<kShortcut>(next, then);
    while (walk.next(pixels)) {
      convolve<kOffset, kShortcut>(run, pixels, channel, last, ahead, waiting);
    }
  }
  waiting.finish_all();
}

template <ByteShortcut kShortcut>
void run_task(const ByteConv& conv, const ByteTask& task, bool offset) {
  offset ? run_task<true, kShortcut>(conv, task) : run_task<false, kShortcut>(conv, task);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot_tasks.inl"
