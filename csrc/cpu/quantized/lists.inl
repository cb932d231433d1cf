// The convolution of bytes on vectors whose instruction for bytes, vpmaddubsw, adds two products in
// 16 bits and saturates: an unsigned byte times a signed one reaches 255 * 128, and two of these
// reach twice what 16 bits hold. Yet for most weights a sum of a few products never leaves 16 bits,
// whatever the pixels: it does not if the positive weights add up to at most 128 and the negative
// ones to at least -128. So a packed weight is a list of steps (ByteList, made in lists.cpp):
//
// - In no step are two weights added that are too large together. Where they would be, it has three
//   weights a channel, in place of four.
// - Two steps whose sums may be added in 16 bits, of any two places of the filter, are a pair.
//   It is widened to 32 bits once: 64 exact products for three multiplications, where kernels
//   that saturate take four, on the two units that multiply.
//
// Of weights with a normal distribution nearly all steps find a partner from 576 weights a filter
// on, and multiplications are 0.78 to 0.82 of such a kernel's (0.96 for 256 weights a filter,
// 1.2 for 64); of distributions with longer tails, 0.75. Sums are of integers, so that their order
// says nothing. Where all weights of a vector are zero, those of other groups for one, is no step.
//
// Tiles are kDotPixels pixels times one vector of output channels: with one vector only its own
// weights make its list. Ten sums, two vectors of weights, two pixels and the ones are 15 of the 16
// registers; the 50 vector instructions of a pair wait for 22 loads of pixels and weights.
//
// The including file has defined vectors (bytes_*.h), kDotPixels, and
//   multiply_bytes(pixel, weights)   vpmaddubsw
//   add_words(a, b)                  vpaddw
//   add_widened(sums, words)         the sum of each two words, vpmaddwd by ones, added

#include "cpu/quantized/finish.inl"
#include "cpu/quantized/walk.inl"

namespace fused_resnet::cpu {
namespace {

static_assert(kLanes == kListChannels);

// A task takes so many bytes of weights against all its pixels before the next.
constexpr int64_t kListedAtOnce = 96 * 1024;

// All products of kPixels pixels and the output channels of one list.
template <int kPixels>
FR_BYTES_INLINE void sum_list(const ByteWeight& packed, int64_t index, const int64_t* segments,
                              const uint8_t* const (&in)[kDotPixels], Ints (&total)[kPixels]) {
  const ByteList& list = packed.lists[index];
  const auto* place = reinterpret_cast<const ByteStepPlace*>(packed.packed + list.places);
  const auto* weight = reinterpret_cast<const int32_t*>(packed.packed + list.weights);
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) total[i] = broadcast_int(0);
  for (const ByteStepPlace* end = place + 2 * list.pairs; place != end; place += 2) {
    const int64_t first = segments[place[0].segment] + place[0].byte;
    const int64_t second = segments[place[1].segment] + place[1].byte;
    const Ints first_weights = load_ints(weight), second_weights = load_ints(weight + kLanes);
    weight += 2 * kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      const Ints words = add_words(multiply_bytes(broadcast_four(in[i] + first), first_weights),
                                   multiply_bytes(broadcast_four(in[i] + second), second_weights));
      total[i] = add_widened(total[i], words);
      // One pixel after the other: GCC would load several, and keep sums in memory for them.
      asm volatile("" : "+x"(total[i]));
    }
  }
  for (const ByteStepPlace* end = place + list.singles; place != end; ++place) {
    const int64_t at = segments[place->segment] + place->byte;
    const Ints weights = load_ints(weight);
    weight += kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      total[i] = add_widened(total[i], multiply_bytes(broadcast_four(in[i] + at), weights));
      asm volatile("" : "+x"(total[i]));
    }
  }
}

// kPixels of `pixels` and the output channels from `channel` on.
template <bool kOffset, ByteShortcut kShortcut, int kPixels>
void convolve(const ByteConv& conv, const DotPixels& pixels, int64_t channel) {
  constexpr bool kProjection = kShortcut == ByteShortcut::projection;
  const ByteWeight &weight = conv.weight, &other = conv.projection_weight;
  alignas(64) int32_t first[kProjection ? kPixels * kLanes : 1];
  const int64_t base = conv.filter.groups == 1 ? 0 : conv.filter.base(channel / kByteBlockK);
  const uint8_t* in[kDotPixels];
  for (int i = 0; i < kPixels; ++i) in[i] = pixels.in[i] + base;
  const int64_t index = channel / kListChannels;
  Ints sums[kPixels];
  sum_list(weight, index, conv.segments, in, sums);
  if constexpr (kProjection) {
    for (int i = 0; i < kPixels; ++i) store_ints(first + i * kLanes, sums[i]);
    sum_list(other, index, conv.projection_segments, conv.doubled ? pixels.in : pixels.projected,
             sums);
  }
  alignas(64) int32_t offsets[kOffset ? 2 * kLanes : 1];
  const DotStep step = {weight.scale + channel,
                        weight.shift + channel,
                        kProjection ? other.scale + channel : nullptr,
                        offsets,
                        offsets + (kOffset ? kLanes : 0),
                        broadcast_int(conv.added_zero_point),
                        broadcast(conv.shortcut_scale)};
  if constexpr (kOffset) {
    find_offsets(weight, channel, kLanes, offsets);
    if constexpr (kProjection) find_offsets(other, channel, kLanes, offsets + kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    if (i < pixels.count) {
      const Ints own[1] = {sums[i]};
      finish<kOffset, kShortcut>(
          step, own, first + (kProjection ? i * kLanes : 0),
          kShortcut == ByteShortcut::bytes ? pixels.added[i] + channel : nullptr,
          pixels.out[i] + channel);
    }
  }
}

// Some output channels times all pixels of a task, of which few are taken together at its end.
template <bool kOffset, ByteShortcut kShortcut>
void convolve_channels(const ByteConv& conv, int64_t begin, int64_t end, int64_t first,
                       int64_t last) {
  DotPixels pixels;
  for (DotWalk walk(conv, begin, end); walk.next(pixels);) {
    for (int64_t channel = first; channel < last; channel += kLanes) {
      if (pixels.count <= kDotPixels / 2) {
        convolve<kOffset, kShortcut, kDotPixels / 2>(conv, pixels, channel);
      } else {
        convolve<kOffset, kShortcut, kDotPixels>(conv, pixels, channel);
      }
    }
  }
}

template <ByteShortcut kShortcut>
void run_task(const ByteConv& conv, const ByteTask& task, bool offset) {
  const int64_t pixels_end = conv.in.N * conv.P * conv.Q, blocks_end = task.block_end * kByteBlockK;
  const int64_t begin = task.begin * kDotPixels, whole = task.end * kDotPixels;
  const int64_t end = whole < pixels_end ? whole : pixels_end;
  const int64_t last = blocks_end < conv.filter.K ? blocks_end : conv.filter.K;
  int64_t list_bytes = conv.filter.runs() * conv.filter.steps() * kListBytes;
  if (kShortcut == ByteShortcut::projection) {
    list_bytes += conv.projection.runs() * conv.projection.steps() * kListBytes;
  }
  const int64_t lists = kListedAtOnce / list_bytes;
  const int64_t at_once = (lists > 1 ? lists : 1) * kListChannels;
  for (int64_t channel = task.block_begin * kByteBlockK; channel < last; channel += at_once) {
    const int64_t stop = channel + at_once < last ? channel + at_once : last;
    offset ? convolve_channels<true, kShortcut>(conv, begin, end, channel, stop)
           : convolve_channels<false, kShortcut>(conv, begin, end, channel, stop);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot_tasks.inl"
