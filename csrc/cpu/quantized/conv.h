// What the convolutions of bytes (tile_run.inl, dot.inl, lists.inl), a linear layer of bytes
// (linear.inl) and those who call them share.
//
// With q the input's bytes, z its zero point, w the weight, all sums exact in 32 bits,
//
//   sum[n, p, q, k] = sum over r, s, c of (q[n, p', q', c] - z) * w[k, c, r, s],
//   t   = float(sum) * scale[k] + shift[k] + shortcut,
//   out = clamp(round to nearest even(t), 0, 255),
//
// each float32 operation rounded on its own, so that every instruction set gives the same bytes;
// shortcut is (x - zero point) * shortcut_scale of a byte x, or float(sum') * scale'[k] of a second
// convolution, a 1x1, whose sums are never in memory beyond a block's.
//
// Memory traffic, once each: the input's bytes, the weight's, the shortcut's or the second
// convolution's input and weight, the output's.
//
// No header but <stdint.h> is included, see cpu/isa.h.
#pragma once

#include <stdint.h>

// The linker would keep one copy of an inline function, compiled for any instruction set
// (cpu/isa.h).
#define FR_BYTES_INLINE inline __attribute__((always_inline))

namespace fused_resnet::cpu {

constexpr int64_t kByteRows = 16;    // pixels of a tile
constexpr int64_t kByteChunk = 64;   // bytes of the reduction that a tile's row has
constexpr int64_t kByteTile = 1024;  // bytes of a tile
constexpr int64_t kByteBlockK = 32;  // output channels of a block: two tiles
constexpr int64_t kBytePixel = 16;   // what the bytes of a written pixel are a multiple of

static FR_BYTES_INLINE int64_t bytes_div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static FR_BYTES_INLINE int64_t bytes_round_up(int64_t a, int64_t b) {
  return bytes_div_up(a, b) * b;
}

// Images in bytes, channels innermost, with as many pixels of zero point around them as the filter
// that reads them looks beyond their edges. A line ends where the next begins, an image too: what
// is right of a line is left of the next, what is below an image above the next. So the pixels
// under any one tap of a filter of stride 1 are one evenly spaced sequence through all images.
// Channels beyond C hold anything; the weight is zero there.
struct ByteImages {
  uint8_t* data;
  int64_t N, C, H, W;
  int64_t halo_h, halo_w;
  int64_t unit = kBytePixel;  // what a pixel's bytes are a multiple of

  FR_BYTES_INLINE int64_t pixel() const { return bytes_round_up(C, unit); }
  FR_BYTES_INLINE int64_t pitch() const { return W + halo_w; }
  FR_BYTES_INLINE int64_t lines() const { return H + halo_h; }
  FR_BYTES_INLINE int64_t pixels() const { return (N * lines() + halo_h) * pitch() + halo_w; }
  // Of line h and column w of image n, from -halo_h and -halo_w on.
  FR_BYTES_INLINE int64_t position(int64_t n, int64_t h, int64_t w) const {
    return (n * lines() + halo_h + h) * pitch() + halo_w + w;
  }
};

// A filter as the products run through it: `runs` stretches of consecutive bytes of the input. With
// one group and no dilation across, the taps of a filter row are one run.
struct ByteFilter {
  int64_t K, C, R, S, groups;  // C channels a group
  bool joined;
  int64_t unit = kBytePixel;  // its input's

  FR_BYTES_INLINE int64_t pixel() const { return bytes_round_up(C * groups, unit); }
  FR_BYTES_INLINE int64_t runs() const { return joined ? R : R * S; }
  FR_BYTES_INLINE int64_t blocks() const { return bytes_div_up(K, kByteBlockK); }
  // The input channels that a block of output channels reads: its groups' from `base` on.
  FR_BYTES_INLINE int64_t base(int64_t block) const {
    return block * kByteBlockK / (K / groups) * C;
  }
  FR_BYTES_INLINE int64_t span() const {
    if (groups == 1) return C;
    int64_t most = 0;
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t end = (b + 1) * kByteBlockK < K ? (b + 1) * kByteBlockK : K;
      const int64_t channels = ((end - 1) / (K / groups) + 1) * C - base(b);
      most = channels > most ? channels : most;
    }
    return most;
  }
  // Steps of four bytes, the last of which may go beyond the channels, and chunks of a run.
  FR_BYTES_INLINE int64_t steps() const {
    return bytes_div_up(joined ? (S - 1) * pixel() + C : span(), 4);
  }
  FR_BYTES_INLINE int64_t chunks() const { return bytes_div_up(steps() * 4, kByteChunk); }
  FR_BYTES_INLINE int64_t block_bytes() const { return runs() * chunks() * 2 * kByteTile; }

  // As tiles a packed weight is [blocks of K][runs][chunks][2][16][16][4] bytes: the last three are
  // fours of the reduction, output channels, and the four. Zero where K, a run or a group ends.
  FR_BYTES_INLINE int64_t place(int64_t k, int64_t c, int64_t r, int64_t s) const {
    const int64_t block = k / kByteBlockK, column = k % kByteBlockK;
    const int64_t channel = k / (K / groups) * C + c - (groups == 1 ? 0 : base(block));
    const int64_t run = joined ? r : r * S + s, byte = (joined ? s * pixel() : 0) + channel;
    const int64_t chunk = run * chunks() + byte / kByteChunk, in_chunk = byte % kByteChunk;
    return block * block_bytes() + (chunk * 2 + column / 16) * kByteTile + in_chunk / 4 * 64 +
           column % 16 * 4 + in_chunk % 4;
  }
  // Behind it, padded to whole blocks: scale and shift, float32, and each filter's sum, int32.
  FR_BYTES_INLINE int64_t vectors() const { return blocks() * block_bytes(); }
  FR_BYTES_INLINE int64_t padded_k() const { return blocks() * kByteBlockK; }
  FR_BYTES_INLINE int64_t packed_bytes() const { return vectors() + 3 * 4 * padded_k(); }
};

// How a packed weight lies: as tiles, see ByteFilter::place, or as lists.
enum class ByteLayout { tiles, lists };

// Lists are for lists.inl: for every kListChannels output channels the steps of the reduction. A
// step is four neighbouring bytes of an input pixel's run, beginning with any of them, and the
// weights [kListChannels][4] that they meet. First come pairs of steps.
constexpr int64_t kListChannels = 8;
constexpr int64_t kListBytes = 4 * kListChannels;  // of a step's weights
struct ByteStepPlace {
  uint16_t segment, byte;
};
struct ByteList {
  int64_t places, weights;  // where they begin in the packed weight
  int64_t pairs, singles;

  FR_BYTES_INLINE int64_t steps() const { return 2 * pairs + singles; }
};

// A run's bytes are numbered in segments.
constexpr int64_t kListSegment = 65536;
static FR_BYTES_INLINE int64_t segments_of_run(const ByteFilter& filter) {
  return bytes_div_up(filter.steps() * 4, kListSegment);
}

// Where things are in a weight packed as lists: [scale][shift][filter sums][ByteList of every
// kListChannels channels][the lists' places, up to a multiple of 64 bytes][the lists' weights].
struct ByteListsLayout {
  int64_t padded_k;

  FR_BYTES_INLINE int64_t count() const { return padded_k / kListChannels; }
  FR_BYTES_INLINE int64_t lists() const { return 3 * 4 * padded_k; }
  FR_BYTES_INLINE int64_t places() const {
    return lists() + count() * static_cast<int64_t>(sizeof(ByteList));
  }
  FR_BYTES_INLINE int64_t weights(int64_t steps) const {
    return bytes_round_up(places() + steps * static_cast<int64_t>(sizeof(ByteStepPlace)), 64);
  }
};

// A packed weight to be multiplied with.
struct ByteWeight {
  const int8_t* packed;  // its tiles, or what lists count from
  const ByteList* lists;
  const float* scale;
  const float* shift;
  const int32_t* filter_sums;
  int32_t zero_point;  // of what it is multiplied with
};

static FR_BYTES_INLINE ByteWeight byte_weight(const void* memory, const ByteFilter& filter,
                                              ByteLayout layout, int64_t zero_point) {
  const bool lists = layout == ByteLayout::lists;
  const int8_t* packed = static_cast<const int8_t*>(memory);
  const int64_t padded_k = filter.padded_k();
  const float* scale = reinterpret_cast<const float*>(packed + (lists ? 0 : filter.vectors()));
  const float* shift = scale + padded_k;
  const int32_t* sums = reinterpret_cast<const int32_t*>(shift + padded_k);
  const ByteList* first = nullptr;
  if (lists) first = reinterpret_cast<const ByteList*>(packed + ByteListsLayout{padded_k}.lists());
  return {packed, first, scale, shift, sums, static_cast<int32_t>(zero_point)};
}

enum class ByteShortcut { none, bytes, projection };

struct ByteConv {
  ByteImages in, out;
  ByteFilter filter;
  ByteWeight weight;
  int64_t P, Q, stride_h, stride_w, dil_h, dil_w;
  int64_t origin;  // the pixel of `in` under the first tap of the first output

  ByteShortcut shortcut;
  ByteImages added;  // of `bytes`, with the output's pixels, and their zero point
  int32_t added_zero_point;
  float shortcut_scale;
  // Of a projection: pixels that lie as those of `in` from `origin` on do, so many bytes apart; or,
  // if `doubled`, a second weight for the filter's own.
  bool doubled;
  const uint8_t* projected;
  ByteFilter projection;
  ByteWeight projection_weight;

  // For weights as lists: where each segment is, in bytes from the pixel under the first tap.
  const int64_t *segments, *projection_segments;

  bool keeps_weight;  // whether a task's weights stay in its second-level cache

  // Whether a zero point has to be taken from anything.
  FR_BYTES_INLINE bool has_offset() const {
    return weight.zero_point != 0 || added_zero_point != 0 || projection_weight.zero_point != 0;
  }
  // Output pixels lie under an evenly spaced sequence of the input's; or else each line does, as
  // where padding beyond the filter's reach gives a line more outputs than it has pixels.
  FR_BYTES_INLINE bool even() const {
    return stride_h == 1 && stride_w == 1 && Q <= in.pitch() && P <= in.lines();
  }
  FR_BYTES_INLINE int64_t tiles_per_line() const { return bytes_div_up(Q, kByteRows); }
  FR_BYTES_INLINE int64_t tiles() const {
    if (!even()) return in.N * P * tiles_per_line();
    // Up to the last output.
    return bytes_div_up(((in.N - 1) * in.lines() + P - 1) * in.pitch() + Q, kByteRows);
  }
};

// Some pieces of the output pixels times some blocks of output channels.
struct ByteTask {
  int64_t begin, end;
  int64_t block_begin, block_end;
  int64_t block_ahead;  // up to which the thread is to multiply with weights later, or block_end
  // Of the next layer's weight what the thread begins with there; null but in its last task.
  const int8_t *later, *later_end;
};

// Elements of the floating-point tensors at both ends.
enum class ByteFloats { float32, float16, bfloat16 };

struct ByteKernels {
  const char* name;
  // How many pieces a convolution's output pixels come in.
  int64_t (*pieces)(const ByteConv&);
  void (*run)(const ByteConv&, const ByteTask&);
  // clamp(round(source * inverse), -zero_point, 255 - zero_point) + zero_point; NaN becomes 0.
  void (*quantize)(ByteFloats type, const void* source, int64_t count, float inverse,
                   int32_t zero_point, uint8_t* target);
  // clamp(round(source * inverse), -32639, 32639) + 32896: both bytes of a signed number, its upper
  // and its lower part, with 128 added; NaN becomes the least.
  void (*quantize_words)(ByteFloats type, const void* source, int64_t count, float inverse,
                         uint16_t* target);
  // source * step
  void (*dequantize)(ByteFloats type, const uint8_t* source, int64_t count, float step,
                     void* target);
  // sums[n] = sum over i < count of inputs[n * pitch + i] * weights[i]. What an input has up to a
  // multiple of kByteChunk may hold anything.
  void (*multiply_row)(const uint8_t* inputs, int64_t images, int64_t pitch, const int8_t* weights,
                       int64_t count, int32_t* sums);
  // sums[i] += source[i]
  void (*add_bytes)(const uint8_t* source, int64_t count, int32_t* sums);
  ByteLayout layout = ByteLayout::tiles;  // of the weights that `run` takes
  bool shares = true;  // whether small tasks cost it nothing, so that threads share a layer's
};

#if defined(__x86_64__)
extern const ByteKernels kBytesAmx;
extern const ByteKernels kBytesAvx512Vnni;
extern const ByteKernels kBytesAvxVnni;
extern const ByteKernels kBytesAvx2;
#endif
extern const ByteKernels kBytesAmxEmulated;
extern const ByteKernels kBytesBaseline;

}  // namespace fused_resnet::cpu
