// One task of the native convolution, for the instruction set of the including file, which defines
//   FR_VECTOR_BYTES   width of a vector register
//   FR_TILE_GROUPS    groups of pixels in a register tile, at most
//   FR_TILE_PIXELS    pixels in a group, at most; they are evenly spaced in every tensor
//   FR_NARROW_GROUPS  the same of a tile of one vector of output channels, for layers
//   FR_NARROW_PIXELS  that have no more in a group
//   FR_UNROLLED_STEPS steps of the product between two branches
//   FR_SUMMED_STEPS   steps whose products are summed one after the other
//   FR_ITEM_CHANNELS  channels in an item, the four bytes that a lane multiplies at once: 1, in
//                     float32, or 2, in bfloat16. With 2 the kernel is one for bfloat16 alone.
// and what the vector extension has no expression for: broadcast() of a float and of an item,
// square_root(), multiply_add(), which adds items' products to sums, and load_f16() and
// store_f16(), or with pairs store_bf16(). No standard header beyond <cstdint> may be included
// here: an inline library function compiled for this instruction set could replace the portable one
// at link time.
//
// Reading order, which is execution order: gather -> product -> epilogue -> pool -> run.

namespace fused_resnet::cpu {
namespace {

constexpr int kLanes = FR_VECTOR_BYTES / 4;
constexpr int kVectors = 2;  // vectors of output channels in a tile
constexpr int kBlockK = kVectors * kLanes;
int64_t block_k(const Conv& conv) {
  return conv.expanded ? kLanes : kBlockK;
}
constexpr int kTilePixels = FR_TILE_PIXELS;
constexpr int kGroups = FR_TILE_GROUPS;
constexpr int kNarrowPixels = FR_NARROW_PIXELS;
constexpr int kNarrowGroups = FR_NARROW_GROUPS;
constexpr int kUnrolled = FR_UNROLLED_STEPS;
constexpr int64_t kChunk = FR_SUMMED_STEPS;

typedef float Vec __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef float VecUnaligned __attribute__((vector_size(FR_VECTOR_BYTES), aligned(4)));
typedef int32_t VecInt __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint32_t VecUint __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(FR_VECTOR_BYTES / 2)));
typedef uint16_t VecHalfUnaligned __attribute__((vector_size(FR_VECTOR_BYTES / 2), aligned(2)));

#define FR_INLINE inline __attribute__((always_inline))
// An unrolled loop.
#define FR_FOR(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)

// Element types: storage and its conversion to and from float32, a vector at a time.

struct Float32 {
  using Storage = float;
  static FR_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
  static FR_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static FR_INLINE Vec load(const uint16_t* p) {
    const VecHalf raw = *reinterpret_cast<const VecHalfUnaligned*>(p);
    return (Vec)(__builtin_convertvector(raw, VecUint) << 16);
  }
#if FR_ITEM_CHANNELS == 1
  static FR_INLINE void store(uint16_t* p, Vec v) {
    const VecUint bits = (VecUint)v;
    const VecUint nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // Rounding would carry a NaN's mantissa into infinity or beyond.
    const VecUint rounded = v != v ? (VecUint{} + 0x7fc0u) : nearest_even;
    *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(rounded, VecHalf);
  }
#else
  static FR_INLINE void store(uint16_t* p, Vec v) { store_bf16(p, v); }
#endif
};

#if FR_ITEM_CHANNELS == 1
struct Float16 {
  using Storage = uint16_t;
  static FR_INLINE Vec load(const uint16_t* p) { return load_f16(p); }
  static FR_INLINE void store(uint16_t* p, Vec v) { store_f16(p, v); }
};

using Gathered = Float32;  // a channel as an item has it
typedef float Item;
#else
using Gathered = BFloat16;
// Pairs of channels in a tensor begin where any channel may.
typedef uint32_t Item __attribute__((aligned(2), may_alias));
#endif
constexpr int kItemChannels = FR_ITEM_CHANNELS;

FR_INLINE Vec load_items(const Item* p) {
  return *reinterpret_cast<const VecUnaligned*>(p);
}
FR_INLINE void store_items(Item* p, Vec v) {
  *reinterpret_cast<VecUnaligned*>(p) = v;
}

// Items that the product takes of an input pixel of a group, and of all taps.
int64_t group_items(const Conv& conv) {
  return div_up(group_c(conv), kItemChannels);
}
int64_t depth(const Conv& conv) {
  return conv.R * conv.S * group_items(conv);
}

template <class T>
FR_INLINE float load_one(const typename T::Storage* p) {
  alignas(64) typename T::Storage lane[kLanes] = {};
  lane[0] = *p;
  return T::load(lane)[0];
}

template <>
FR_INLINE float load_one<Float32>(const float* p) {
  return *p;
}

template <class T>
FR_INLINE void store_one(typename T::Storage* p, float value) {
  alignas(64) typename T::Storage lane[kLanes];
  T::store(lane, broadcast(value));
  *p = lane[0];
}

template <>
FR_INLINE void store_one<Float32>(float* p, float value) {
  *p = value;
}

// `x <= 0 ? 0 : x` rather than max(x, 0): a NaN compares false and stays.
FR_INLINE Vec relu(Vec x) {
  return x <= 0.0f ? Vec{} : x;
}
FR_INLINE float relu(float x) {
  return x <= 0.0f ? 0.0f : x;
}

// ---- tiles of pixels ----------------------------------------------------------------------------

// The most groups in a tile, and pixels in a group.
struct TileShape {
  int groups, pixels;
};

// Whether one vector holds the output channels of a group.
bool is_narrow(const Conv& conv) {
  return conv.expanded || group_k(conv) <= kLanes;
}

TileShape tile_shape(const Conv& conv) {
  if (is_narrow(conv)) return {kNarrowGroups, kNarrowPixels};
  return {kGroups, kTilePixels};
}

constexpr int64_t kLineItems = 64 / sizeof(Item);

// Whether a tile's pixels, so many items apart, are too many for the only set of the first-level
// cache that they have. With every step of the product an item is read of each pixel, and a line
// for 16 steps, which has to stay that long. Lines 4096 bytes apart share a set, of 8 lines or, on
// later processors, 12.
bool share_one_set(const Conv& conv, int64_t items) {
  const TileShape tile = tile_shape(conv);
  return items * static_cast<int64_t>(sizeof(Item)) % 4096 == 0 && tile.groups * tile.pixels > 8;
}

constexpr int kShuffledTaps = 3;

// Whether groups that share a vector are multiplied by multiply_shuffled(), whose sums have no
// parts. Groups of one channel have nothing to shuffle.
bool is_shuffled(const Conv& conv) {
  return kLanes == 16 && kItemChannels == 1 && conv.expanded && conv.S == kShuffledTaps &&
         group_c(conv) > 1 && conv.dil_w == 1 && conv.stride_w <= 2 && reduction(conv) <= kChunk;
}

// The channel, of the vector of inputs that a block of expanded groups meets, that a lane's output
// meets first.
VecInt first_source(const Conv& conv) {
  const int64_t c_per_group = group_c(conv), k_per_group = conv.K / conv.groups;
  VecInt source;
  for (int k = 0; k < kLanes; ++k) source[k] = static_cast<int32_t>(k / k_per_group * c_per_group);
  return source;
}

// ---- gather: input rows -> slab ---------------------------------------------------------------

// The slab holds the input pixels a task reads, as items [row][column][channels of the group], with
// the padding written out as zeros, as is the partner of an odd last channel. In it every tap of
// the filter is a constant offset, and the taps of one filter row are one run of consecutive items,
// unless there is a gap behind each pixel, by which a tile's pixels get sets of the cache of their
// own. For expanded groups "item" is a vector: lane k of it is the input channels that meet output
// channel k of the task's block. A prologue is applied on the way, so to every pixel a task reads
// and to no padding.
struct Slab {
  int64_t columns;
  int64_t pixel, pitch;        // items from a pixel and from a row to the next
  bool has_gaps;               // whether pixels have less
  int64_t row_step, col_step;  // input pixels between neighbours in the slab
  int64_t p_step, q_step;      // slab rows and columns between neighbouring outputs

  explicit Slab(const Conv& conv) {
    // Of a strided pointwise convolution's input only the pixels that are read are gathered.
    const bool sample_rows = conv.R == 1, sample_cols = conv.S == 1;
    row_step = sample_rows ? conv.stride_h : 1;
    col_step = sample_cols ? conv.stride_w : 1;
    p_step = sample_rows ? 1 : conv.stride_h;
    q_step = sample_cols ? 1 : conv.stride_w;
    columns = (conv.Q - 1) * q_step + (conv.S - 1) * conv.dil_w + 1;
    pixel = conv.expanded ? kLanes : 1;
    if (!is_shuffled(conv)) pixel *= group_items(conv);
    has_gaps = share_one_set(conv, q_step * pixel);
    if (has_gaps) pixel += kLineItems;
    pitch = columns * pixel;
  }

  int64_t rows(const Conv& conv, int64_t p_count) const {
    return (p_count - 1) * p_step + (conv.R - 1) * conv.dil_h + 1;
  }
};

using Channel = Gathered::Storage;  // one of the slab's

FR_INLINE void zero(Item* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_items(dst + i, Vec{});
  for (; i < count; ++i) dst[i] = 0;
}

template <class T>
FR_INLINE void gather_one(Channel* dst, const typename T::Storage* src) {
  if constexpr (kItemChannels == 1) {
    *dst = load_one<T>(src);
  } else {
    *dst = *src;
  }
}

template <class T>
FR_INLINE void gather_run(Channel* dst, const typename T::Storage* src, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if constexpr (kItemChannels == 1) {
      Float32::store(dst + i, T::load(src + i));
    } else {
      *reinterpret_cast<VecHalfUnaligned*>(dst + i) =
          *reinterpret_cast<const VecHalfUnaligned*>(src + i);
    }
  }
  for (; i < count; ++i) gather_one<T>(dst + i, src + i);
}

// Whoever has written so many channels of a pixel ends it so.
FR_INLINE void finish_pixel(Channel* pixel, int64_t channels) {
  if (channels % kItemChannels != 0) pixel[channels] = 0;
}

// The prologue of some channels, the first of which is at both pointers; null: none.
struct Affine {
  const float *scale, *shift;
};

// A value as it would be read back from a tensor of dtype T.
template <class T>
FR_INLINE Vec rounded_to(Vec x) {
  alignas(64) typename T::Storage lane[kLanes];
  T::store(lane, x);
  return T::load(lane);
}

template <>
FR_INLINE Vec rounded_to<Float32>(Vec x) {
  return x;
}

FR_INLINE Vec normalised(Vec x, const Affine& norm, int64_t c) {
  return relu(x * Float32::load(norm.scale + c) + Float32::load(norm.shift + c));
}

// Values of a tensor of dtype T that is not written.
template <class T>
FR_INLINE void store_gathered(Channel* dst, Vec x) {
  if constexpr (kItemChannels == 1) {
    Float32::store(dst, rounded_to<T>(x));
  } else {
    T::store(dst, x);
  }
}

// The channels of one pixel, read as Source and rounded to T. The slack behind scale and shift lets
// a last vector be computed that is not full.
template <class Source, class T>
FR_INLINE void normalise_pixel(Channel* dst, const typename Source::Storage* src, int64_t channels,
                               const Affine& norm) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    store_gathered<T>(dst + c, normalised(Source::load(src + c), norm, c));
  }
  if (c == channels) return;
  alignas(64) typename Source::Storage rest[kLanes] = {};
  alignas(64) Channel result[kLanes];
  for (int64_t i = c; i < channels; ++i) rest[i - c] = src[i];
  store_gathered<T>(result, normalised(Source::load(rest), norm, c));
  for (int64_t i = c; i < channels; ++i) dst[i] = result[i - c];
}

// Channels that are not adjacent in memory: pixels of one channel are read along the row. Those of
// the slab are `next` channels apart.
template <class T>
void transpose_row(Channel* dst, int64_t next, const typename T::Storage* src, const Conv& conv,
                   int64_t count, int64_t col_step) {
  const int64_t channels = group_c(conv), step = col_step * conv.in.w;
  for (int64_t c = 0; c < channels; ++c) {
    const typename T::Storage* pixel = src + c * conv.in.c;
    for (int64_t j = 0; j < count; ++j) gather_one<T>(dst + j * next + c, pixel + j * step);
  }
}

// One pixel of a block of expanded groups: `channels` input channels, of which output channel k
// meets source[k] and the ones that follow.
template <class T, bool kShuffled>
FR_INLINE void expand_pixel(Item* dst, const typename T::Storage* src, const Conv& conv,
                            int64_t channels, const VecInt& source, const Affine& norm) {
  const int64_t c_per_group = group_c(conv);
  Vec pixel;
  if (conv.in.c == 1 && channels == kLanes) {
    pixel = T::load(src);
  } else {
    pixel = Vec{};
    for (int64_t c = 0; c < channels; ++c) pixel[c] = load_one<T>(src + c * conv.in.c);
  }
  if (norm.scale != nullptr) pixel = rounded_to<T>(normalised(pixel, norm, 0));
  if (kShuffled) return store_items(dst, pixel);
  for (int64_t c = 0; c < c_per_group; c += kItemChannels, dst += kLanes) {
    const int32_t first = static_cast<int32_t>(c);
    const Vec channel = __builtin_shuffle(pixel, source + first);
    if constexpr (kItemChannels == 1) {
      store_items(dst, channel);
    } else {
      // A bfloat16 is the upper half of a float32.
      const bool single = c + 1 == c_per_group;
      const VecUint second =
          single ? VecUint{} : (VecUint)__builtin_shuffle(pixel, source + (first + 1));
      store_items(dst, (Vec)((VecUint)channel >> 16 | second));
    }
  }
}

// The same of `count` pixels.
template <class T, bool kShuffled>
void expand_pixels(Item* dst, int64_t pixel, const typename T::Storage* src, int64_t src_pixel,
                   int64_t count, const Conv& conv, int64_t channels, const Affine& norm) {
  const VecInt source = first_source(conv);
  for (int64_t j = 0; j < count; ++j) {
    expand_pixel<T, kShuffled>(dst + j * pixel, src + j * src_pixel, conv, channels, source, norm);
  }
}

template <class T>
void gather(const Conv& conv, const Slab& slab, int64_t n, int64_t p_begin, int64_t p_end,
            const Task& task, Item* dst) {
  using Storage = typename T::Storage;
  int64_t channels = group_c(conv), first_channel = task.group * channels;
  if (conv.expanded) {
    const int64_t per_block = kLanes / (conv.K / conv.groups) * channels;
    first_channel = task.block_begin * per_block;
    channels = conv.C - first_channel < per_block ? conv.C - first_channel : per_block;
  }
  Affine norm{nullptr, nullptr};
  if (conv.in_scale != nullptr) {
    norm = {conv.in_scale + first_channel, conv.in_shift + first_channel};
  }
  const int64_t rows = slab.rows(conv, p_end - p_begin);
  // Columns [first, last) of a slab row lie inside the image.
  const int64_t first = conv.pad_w > 0 ? div_up(conv.pad_w, slab.col_step) : 0;
  int64_t last = div_up(conv.W + conv.pad_w, slab.col_step);
  if (last > slab.columns) last = slab.columns;
  const int64_t count = last > first ? last - first : 0;

  const Storage* image =
      static_cast<const Storage*>(conv.input) + n * conv.in.n + first_channel * conv.in.c;
  for (int64_t i = 0; i < rows; ++i, dst += slab.pitch) {
    const int64_t h = p_begin * conv.stride_h - conv.pad_h + i * slab.row_step;
    if (h < 0 || h >= conv.H || count == 0) {
      zero(dst, slab.pitch);
      continue;
    }
    const Storage* src = image + h * conv.in.h + (first * slab.col_step - conv.pad_w) * conv.in.w;
    Item* inside = dst + first * slab.pixel;
    Channel* to = reinterpret_cast<Channel*>(inside);
    const int64_t next = slab.pixel * kItemChannels;
    const int64_t present = h + 1 == conv.H && count > conv.last_w ? conv.last_w : count;
    zero(dst, first * slab.pixel);
    if (conv.expanded) {
      const auto expand = is_shuffled(conv) ? expand_pixels<T, true> : expand_pixels<T, false>;
      expand(inside, slab.pixel, src, slab.col_step * conv.in.w, present, conv, channels, norm);
    } else if (conv.in.c != 1) {
      transpose_row<T>(to, next, src, conv, present, slab.col_step);
      for (int64_t j = 0; j < present; ++j, to += next) {
        if (norm.scale != nullptr) normalise_pixel<Gathered, T>(to, to, channels, norm);
        finish_pixel(to, channels);
      }
    } else if (norm.scale != nullptr) {
      for (int64_t j = 0; j < present; ++j, to += next) {
        normalise_pixel<T, T>(to, src + j * slab.col_step * conv.in.w, channels, norm);
        finish_pixel(to, channels);
      }
    } else if (slab.col_step == 1 && conv.in.w == channels && channels == next) {
      gather_run<T>(to, src, present * channels);
    } else {
      for (int64_t j = 0; j < present; ++j, to += next) {
        gather_run<T>(to, src + j * slab.col_step * conv.in.w, channels);
        finish_pixel(to, channels);
      }
    }
    zero(inside + count * slab.pixel, (slab.columns - last) * slab.pixel);
  }
}

// ---- product and epilogue ----------------------------------------------------------------------

// Some groups of `pixels` output pixels, each group evenly spaced in every tensor.
struct Tile {
  static constexpr int kMost = kGroups > kNarrowGroups ? kGroups : kNarrowGroups;

  const Item* in[kMost];
  int64_t out[kMost], res[kMost];  // element offsets of the first pixel, channel 0
  int32_t pixels, groups;
};

struct Product {
  int64_t pixel_stride;  // items between a tile's pixels in the slab (or the input itself)
  int64_t runs, run_length;
  const int64_t* run_offset;
  VecInt first_source;  // of shuffled groups: the channel of a vector that each lane begins with
  // What to bring into the second-level cache meanwhile: with every step of the product what lies
  // prefetch_step bytes further on; a step of 0 asks for nothing.
  const char* prefetch;
  int64_t prefetch_step;
};

// Where results go. `channels` counts the valid ones of this block, of which those in [res_begin,
// res_end) have a residual, the first of them at `residual`.
template <class T>
struct Epilogue {
  const float *scale, *shift;
  const float* bias;  // added before the scale; null: it is in the shift
  const typename T::Storage* residual;
  typename T::Storage* output;
  int64_t out_pixel, res_pixel, out_channel, res_channel;
  int64_t channels, res_begin, res_end;
  // Whether channels are whole vectors that lie together, and if so, whether only some of them have
  // a residual.
  bool vectorised, padded;
  bool relu;
  Activation act;

  // What is neither nothing nor a ReLU is done in memory.
  bool in_registers() const { return vectorised && !padded && !is_other(act); }
};

// Scale and shift of a block of output channels, from `channel` on, `count` of them. The
// convolution's bias is in the shift but where the scale is infinite, since eps and the variance
// are both 0 or the weight is infinite: with its sign it would decide what is NaN. Returns whether
// there are such channels, with their bias in `bias`, and zeros for the others.
FR_INLINE bool scale_and_shift(const Conv& conv, int64_t channel, int64_t count, float* scale,
                               float* shift, float* bias) {
  // A tensor's channels of this block; what lies behind the last channel is not read.
  alignas(64) float partial[kBlockK];
  auto load = [&](const float* tensor, float absent, int v) {
    if (tensor == nullptr) return broadcast(absent);
    const int64_t first = v * kLanes;
    if (first + kLanes <= count) return Float32::load(tensor + channel + first);
    for (int64_t k = first; k < first + kLanes; ++k) {
      partial[k] = k < count ? tensor[channel + k] : absent;
    }
    return Float32::load(partial + first);
  };
  for (int v = 0; v < kVectors; ++v) {
    const Vec deviation = square_root(load(conv.norm.var, 1.0f, v) + conv.norm.eps);
    const Vec a = load(conv.norm.weight, 1.0f, v) / deviation;
    const Vec own = load(conv.bias, 0.0f, v);
    const auto infinite = a - a != 0.0f;
    const Vec before = infinite ? own : Vec{};
    const Vec centre = (infinite ? Vec{} : own) - load(conv.norm.mean, 0.0f, v);
    Float32::store(scale + v * kLanes, a);
    Float32::store(shift + v * kLanes, load(conv.norm.bias, 0.0f, v) + centre * a);
    Float32::store(bias + v * kLanes, before);
  }
  bool found = false;
  for (int64_t k = 0; k < kBlockK; ++k) found |= bias[k] != 0.0f;
  return found;
}

// Any strides and any number of channels, one value at a time.
template <class T, int kPixels>
__attribute__((noinline)) void store_strided(float* tile, int64_t width, int64_t out, int64_t res,
                                             const Epilogue<T>& e) {
  for (int64_t k = e.res_begin; k < e.res_end; ++k) {
    const typename T::Storage* residual = e.residual + res + (k - e.res_begin) * e.res_channel;
    for (int64_t i = 0; i < kPixels; ++i) {
      tile[i * width + k] += load_one<T>(residual + i * e.res_pixel);
    }
  }
  if (is_other(e.act)) activate<FR_VECTOR_BYTES>(e.act, tile, kPixels * width);
  for (int64_t k = 0; k < e.channels; ++k) {
    for (int64_t i = 0; i < kPixels; ++i) {
      const float y = tile[i * width + k];
      store_one<T>(e.output + out + i * e.out_pixel + k * e.out_channel, e.relu ? relu(y) : y);
    }
  }
}

// Whole vectors of channels, of which all or some have a residual, or none has.
template <class T, int kPixels, int kV>
__attribute__((noinline)) void store_from_memory(float* tile, int64_t out, int64_t res,
                                                 const Epilogue<T>& e) {
  for (int64_t i = 0; i < kPixels && e.residual != nullptr; ++i) {
    float* y = tile + i * kV * kLanes;
    const typename T::Storage* residual = e.residual + res + i * e.res_pixel;
    if (e.padded) {
      for (int64_t k = e.res_begin; k < e.res_end; ++k) y[k] += load_one<T>(residual++);
      continue;
    }
    for (int64_t k = 0; k < kV * kLanes; k += kLanes) {
      Float32::store(y + k, Float32::load(y + k) + T::load(residual + k));
    }
  }
  if (is_other(e.act)) activate<FR_VECTOR_BYTES>(e.act, tile, kPixels * kV * kLanes);
  for (int64_t i = 0; i < kPixels; ++i) {
    for (int64_t v = 0; v < kV; ++v) {
      const Vec y = Float32::load(tile + (i * kV + v) * kLanes);
      T::store(e.output + out + i * e.out_pixel + v * kLanes, e.relu ? relu(y) : y);
    }
  }
}

// What a tile's epilogue reads and writes is needed in a thousand cycles or so; by then it has
// arrived.
template <class T, int kG, int kM, int kV>
FR_INLINE void ask_for_outputs(const Tile& tile, const Epilogue<T>& e) {
  // A pixel's channels of a block are in one line where pixels begin at a line.
  constexpr bool kTwoLines = kV * kLanes * sizeof(typename T::Storage) > 64;
  if (!e.vectorised) return;
  FR_FOR (g, kG)
    FR_FOR (i, kM) {
      const typename T::Storage* out = e.output + tile.out[g] + i * e.out_pixel;
      __builtin_prefetch(out, 1);
      if (kTwoLines) __builtin_prefetch(out + (kV - 1) * kLanes, 1);
      if (e.residual) {
        const typename T::Storage* residual = e.residual + tile.res[g] + i * e.res_pixel;
        __builtin_prefetch(residual);
        if (kTwoLines) __builtin_prefetch(residual + (kV - 1) * kLanes);
      }
    }
}

// From a tile's sums to its outputs.
template <class T, int kG, int kM, int kV>
FR_INLINE void finish_tile(Vec (&acc)[kG][kM][kV], const Tile& tile, const Epilogue<T>& e) {
  if (e.bias != nullptr) {
    FR_FOR (v, kV) {
      const Vec bias = Float32::load(e.bias + v * kLanes);
      FR_FOR (g, kG)
        FR_FOR (i, kM) acc[g][i][v] += bias;
    }
  }
  FR_FOR (v, kV) {
    const Vec scale = Float32::load(e.scale + v * kLanes);
    const Vec shift = Float32::load(e.shift + v * kLanes);
    FR_FOR (g, kG)
      FR_FOR (i, kM) acc[g][i][v] = acc[g][i][v] * scale + shift;
  }
  if (!e.in_registers()) {
    FR_FOR (g, kG) {
      alignas(64) float spill[kM][kV * kLanes];
      FR_FOR (i, kM)
        FR_FOR (v, kV) Float32::store(&spill[i][v * kLanes], acc[g][i][v]);
      if (e.vectorised) {
        store_from_memory<T, kM, kV>(&spill[0][0], tile.out[g], tile.res[g], e);
      } else {
        store_strided<T, kM>(&spill[0][0], kV * kLanes, tile.out[g], tile.res[g], e);
      }
    }
    return;
  }
  FR_FOR (g, kG)
    FR_FOR (i, kM) {
      typename T::Storage* out = e.output + tile.out[g] + i * e.out_pixel;
      FR_FOR (v, kV) {
        Vec y = acc[g][i][v];
        if (e.residual) y += T::load(e.residual + tile.res[g] + i * e.res_pixel + v * kLanes);
        if (e.relu) y = relu(y);
        T::store(out + v * kLanes, y);
      }
    }
}

// kG groups of kM pixels times kV vectors of output channels. With AVX-512 and kM = 7 that is 28
// accumulators, 2 registers of weights and 1 input item broadcast to all lanes: 28 multiply-adds
// for 16 loads, so the two multiply-add units are what limits it. With kExpanded the slab holds
// vectors, and each meets one vector of weights: 15 loads for 14 multiply-adds.
template <class T, bool kExpanded, int kG, int kM, int kV>
void multiply(const Product& product, const Tile& tile, const Item* weight, const Epilogue<T>& e) {
  constexpr int64_t kNext = kExpanded ? kLanes : 1;  // items between steps
  const int64_t stride = product.pixel_stride;
  Vec acc[kG][kM][kV];
  FR_FOR (g, kG)
    FR_FOR (i, kM)
      FR_FOR (v, kV) acc[g][i][v] = Vec{};

  ask_for_outputs<T, kG, kM, kV>(tile, e);

  // Sums of more than kChunk items' products are made of sums of so many: the error of one long
  // chain would grow with its length.
  Vec total[kG][kM][kV];
  // Kept in memory: GCC gives it the registers that small tiles leave, and the weights none.
  asm volatile("" : : "r"(total) : "memory");
  int64_t steps = 0;
  bool has_total = false;
  const char* prefetch = product.prefetch;
  for (int64_t run = 0; run < product.runs; ++run) {
    const Item* in[kG];
    FR_FOR (g, kG) in[g] = tile.in[g] + product.run_offset[run];
    for (int64_t rest = product.run_length; rest > 0;) {
      const int64_t count = rest < kChunk ? rest : kChunk;
      if (steps + count > kChunk) {
        FR_FOR (g, kG)
          FR_FOR (i, kM)
            FR_FOR (v, kV) {
              total[g][i][v] = has_total ? total[g][i][v] + acc[g][i][v] : acc[g][i][v];
              acc[g][i][v] = Vec{};
            }
        has_total = true;
        steps = 0;
      }
      const auto step = [&](int64_t j) __attribute__((always_inline)) {
        Vec w[kV];
        FR_FOR (v, kV) w[v] = load_items(weight + v * kLanes);
        FR_FOR (g, kG)
          FR_FOR (i, kM) {
            const Item* item = in[g] + i * stride + j * kNext;
            const Vec x = kExpanded ? load_items(item) : broadcast(*item);
            FR_FOR (v, kV) acc[g][i][v] = multiply_add(acc[g][i][v], x, w[v]);
          }
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += product.prefetch_step;
        weight += (kExpanded ? kLanes : kBlockK);
      };
#pragma GCC unroll kUnrolled
      for (int64_t j = 0; j < count; ++j) step(j);
      FR_FOR (g, kG) in[g] += count * kNext;
      steps += count;
      rest -= count;
    }
  }
  if (has_total) {
    FR_FOR (g, kG)
      FR_FOR (i, kM)
        FR_FOR (v, kV) acc[g][i][v] += total[g][i][v];
  }

  finish_tile<T, kG, kM, kV>(acc, tile, e);
}

// The same of groups that share a vector, by filters three taps wide. The slab has a vector of
// input channels for each pixel, and a lane's input is fetched from its group's: 4 shuffles for
// groups of 4 channels, each of which meets the taps of all outputs that it is under. With kM = 7
// that is 9 loads and shuffles for 21 multiply-adds.
template <class T, int kStride, int kG, int kM>
void multiply_shuffled(const Product& product, const Tile& tile, const Item* weight,
                       const Epilogue<T>& e) {
  constexpr int kTaps = kShuffledTaps, kColumns = (kM - 1) * kStride + kTaps;
  const int64_t channels = product.run_length, pixel = product.pixel_stride / kStride;
  Vec acc[kG][kM][1];
  FR_FOR (g, kG)
    FR_FOR (i, kM) acc[g][i][0] = Vec{};
  ask_for_outputs<T, kG, kM, 1>(tile, e);
  for (int64_t run = 0; run < product.runs; ++run, weight += kTaps * channels * kLanes) {
    VecInt source = product.first_source;
    for (int64_t c = 0; c < channels; ++c, source += 1) {
      Vec w[kTaps];
      FR_FOR (s, kTaps) w[s] = load_items(weight + (s * channels + c) * kLanes);
      FR_FOR (g, kG) {
        const Item* in = tile.in[g] + product.run_offset[run];
        FR_FOR (column, kColumns) {
          const Vec x = __builtin_shuffle(load_items(in + column * pixel), source);
          FR_FOR (s, kTaps) {
            const int from = column - s;  // of the output's first column
            if (from >= 0 && from % kStride == 0 && from / kStride < kM) {
              Vec& sum = acc[g][from / kStride][0];
              sum = multiply_add(sum, x, w[s]);
            }
          }
        }
      }
    }
  }
  finish_tile<T, kG, kM, 1>(acc, tile, e);
}

template <class T>
using Multiply = void (*)(const Product&, const Tile&, const Item*, const Epilogue<T>&);

// multiply<> for a tile of `groups` x `pixels`, at most kMostG x kMostM, and kV vectors of output
// channels.
template <class T, bool kExpanded, int kV, int kMostG, int kMostM, int kG = 1, int kM = 1>
Multiply<T> multiply_for_tile(int groups, int pixels) {
  if constexpr (kG < kMostG) {
    if (groups > kG) {
      return multiply_for_tile<T, kExpanded, kV, kMostG, kMostM, kG + 1, kM>(groups, pixels);
    }
  }
  if constexpr (kM < kMostM) {
    if (pixels > kM) {
      return multiply_for_tile<T, kExpanded, kV, kMostG, kMostM, kG, kM + 1>(groups, pixels);
    }
  }
  return multiply<T, kExpanded, kG, kM, kV>;
}

template <class T, int kStride, int kG = 1, int kM = 1>
Multiply<T> multiply_shuffled_for_tile(int groups, int pixels) {
  if constexpr (kG < kNarrowGroups) {
    if (groups > kG) {
      return multiply_shuffled_for_tile<T, kStride, kG + 1, kM>(groups, pixels);
    }
  }
  if constexpr (kM < kNarrowPixels) {
    if (pixels > kM) {
      return multiply_shuffled_for_tile<T, kStride, kG, kM + 1>(groups, pixels);
    }
  }
  return multiply_shuffled<T, kStride, kG, kM>;
}

template <class T>
Multiply<T> multiply_for(const Conv& conv, int groups, int pixels, int vectors) {
  if constexpr (kLanes == 16 && kItemChannels == 1) {
    if (is_shuffled(conv)) {
      return conv.stride_w == 1 ? multiply_shuffled_for_tile<T, 1>(groups, pixels)
                                : multiply_shuffled_for_tile<T, 2>(groups, pixels);
    }
  }
  if (conv.expanded) {
    return multiply_for_tile<T, true, 1, kNarrowGroups, kNarrowPixels>(groups, pixels);
  }
  if (is_narrow(conv)) {
    return multiply_for_tile<T, false, 1, kNarrowGroups, kNarrowPixels>(groups, pixels);
  }
  return vectors == 1 ? multiply_for_tile<T, false, 1, kGroups, kTilePixels>(groups, pixels)
                      : multiply_for_tile<T, false, 2, kGroups, kTilePixels>(groups, pixels);
}

// ---- a task ------------------------------------------------------------------------------------

// A pointwise convolution reads its pixels where they are, if they are items as they are and do not
// push each other out of the cache.
bool reads_input_in_place(const Conv& conv) {
  const bool is_gathered = kItemChannels == 1
                               ? conv.dtype == Dtype::kFloat32
                               : (group_c(conv) | conv.in.n | conv.in.h | conv.in.w) % 2 == 0;
  return is_gathered && conv.in_scale == nullptr && !conv.expanded && is_pointwise(conv) &&
         conv.stride_h == 1 && conv.stride_w == 1 && conv.pad_h == 0 && conv.pad_w == 0 &&
         conv.in.c == 1 && !share_one_set(conv, conv.in.w / kItemChannels);
}

// Cuts rows into groups and puts groups of equal length together, so that nearly every tile has all
// of its groups whatever the width of the image.
struct TileList {
  static constexpr int kMostPixels = kTilePixels > kNarrowPixels ? kTilePixels : kNarrowPixels;

  TileShape shape;
  Tile* tiles;
  int64_t count = 0;
  int64_t open[kMostPixels + 1];  // by length: the tile with room for a group; -1: none

  TileList(const Conv& conv, Tile* storage) : shape(tile_shape(conv)), tiles(storage) {
    for (int64_t& tile : open) tile = -1;
  }

  // Of each length one tile may stay without some of its groups.
  static int64_t capacity(const Conv& conv, int64_t rows) {
    const TileShape shape = tile_shape(conv);
    return rows * div_up(conv.Q, shape.pixels) / shape.groups + shape.pixels;
  }

  void add(const Item* in, int64_t out, int64_t res, int64_t pixels) {
    int64_t& at = open[pixels];
    if (at < 0) {
      at = count++;
      tiles[at].pixels = static_cast<int32_t>(pixels);
      tiles[at].groups = 0;
    }
    Tile& tile = tiles[at];
    const int g = tile.groups++;
    tile.in[g] = in;
    tile.out[g] = out;
    tile.res[g] = res;
    if (tile.groups == shape.groups) at = -1;
  }

  // Where groups are pixels the last tile may be left with so few that each of their sums waits for
  // itself. It takes some from the tile before.
  void share_last() {
    if (shape.pixels > 1 || count < 2) return;
    Tile &before = tiles[count - 2], &last = tiles[count - 1];
    const int moved = (before.groups - last.groups) / 2;
    if (moved <= 0) return;
    before.groups -= moved;
    for (int g = 0; g < moved; ++g) {
      last.in[last.groups] = before.in[before.groups + g];
      last.out[last.groups] = before.out[before.groups + g];
      last.res[last.groups++] = before.res[before.groups + g];
    }
  }

  void add_row(const Item* in, int64_t in_step, int64_t out, int64_t out_step, int64_t res,
               int64_t res_step, int64_t q) {
    const int64_t parts = div_up(q, shape.pixels);
    for (int64_t part = 0, begin = 0; part < parts; ++part) {
      const int64_t end = q * (part + 1) / parts;
      add(in + begin * in_step, out + begin * out_step, res + begin * res_step, end - begin);
      begin = end;
    }
  }
};

// Floats of scale, shift and bias of all of a task's blocks.
int64_t norm_size(const Conv& conv, const Task& task) {
  // A block of expanded groups is narrower than what scale_and_shift() writes.
  return 3 * ((task.block_end - task.block_begin - 1) * block_k(conv) + kBlockK);
}

// What a task prefetches when its own weights are through: its share of the next layer's. Threads
// that divide the output channels among them do so in the next layer too.
const Item* next_layer(const Conv& conv, const Task& task, int64_t blocks) {
  if (conv.next_weight == nullptr || conv.expanded) return nullptr;
  return static_cast<const Item*>(conv.next_weight) +
         conv.next_weight_bytes / 4 * task.block_begin / blocks;
}

// Scale, shift and bias of all of a task's blocks of output channels.
struct TaskNorm {
  int64_t channels, width;  // of a group and of a block
  float *scale, *shift, *bias;
  bool has_bias = false;

  // `memory` has norm_size() floats.
  TaskNorm(const Conv& conv, const Task& task, float* memory)
      : channels(group_k(conv)), width(block_k(conv)) {
    const int64_t values = norm_size(conv, task) / 3;
    scale = memory - task.block_begin * width;
    shift = scale + values;
    bias = shift + values;
    for (int64_t block = task.block_begin; block < task.block_end; ++block) {
      has_bias |=
          scale_and_shift(conv, task.group * channels + block * width, valid(block),
                          scale + block * width, shift + block * width, bias + block * width);
    }
  }
  // The output channels of a block.
  int64_t valid(int64_t block) const {
    return channels - block * width < width ? channels - block * width : width;
  }
};

// The epilogue of all output channels.
template <class T>
Epilogue<T> epilogue_of(const Conv& conv) {
  Epilogue<T> e{};
  e.output = static_cast<typename T::Storage*>(conv.output);
  e.residual = static_cast<const typename T::Storage*>(conv.residual);
  e.out_pixel = conv.out.w;
  e.out_channel = conv.out.c;
  e.res_pixel = conv.res.w;
  e.res_channel = conv.res.c;
  e.relu = is_relu(conv.act);
  e.act = conv.act;
  return e;
}

// That of one block, whose first output channel is `channel`.
template <class T>
void begin_block(const Conv& conv, const Epilogue<T>& base, const TaskNorm& norm, int64_t block,
                 int64_t channel, Epilogue<T>& e) {
  e.scale = norm.scale + block * norm.width;
  e.shift = norm.shift + block * norm.width;
  e.bias = norm.has_bias ? norm.bias + block * norm.width : nullptr;
  e.output = base.output + channel * base.out_channel;
  e.channels = norm.valid(block);
  // The block's first channel as the residual counts them.
  const int64_t first = channel - conv.res_skip;
  e.res_begin = first < 0 ? -first : 0;
  e.res_end = conv.res_channels - first < e.channels ? conv.res_channels - first : e.channels;
  const bool has_residual = base.residual != nullptr && e.res_begin < e.res_end;
  if (!has_residual) e.res_begin = e.res_end = 0;
  e.residual = has_residual ? base.residual + (first < 0 ? 0 : first) * base.res_channel : nullptr;
  e.vectorised =
      e.channels % kLanes == 0 && base.out_channel == 1 && (!has_residual || base.res_channel == 1);
  e.padded = has_residual && e.res_end - e.res_begin < e.channels;
}

// Tiles that take all blocks of output channels in turn before the next ones do. Weights that stay
// in the second-level cache anyway let few tiles do so, which then write whole pixels, not a strip
// of each. Other weights are read once for all tiles.
int64_t tiles_in_turn(const Conv& conv, const TileList& list) {
  constexpr int64_t kFew = 4;
  return conv.keeps_weight && !conv.expanded ? kFew : list.count;
}

// What the coming tiles read and write in the tensors themselves, to be prefetched in portions.
class ComingPixels {
 public:
  // Tiles [begin, end) of the list; none where their pixels do not follow each other in memory.
  template <class T>
  ComingPixels(const Conv& conv, const Epilogue<T>& e, const TileList& list, int64_t begin,
               int64_t end) {
    if (begin >= end) return;
    constexpr int64_t kItem = sizeof(typename T::Storage);
    const Tile& first = list.tiles[begin];
    const int64_t pixels = (end - begin) * list.shape.groups * list.shape.pixels;
    if (reads_input_in_place(conv)) {
      add(first.in[0], conv.in.w == group_c(conv) ? pixels * conv.in.w * kItem : 0);
    }
    if (e.residual != nullptr && e.res_channel == 1) {
      add(e.residual + first.res[0], e.res_pixel == conv.K ? pixels * conv.K * kItem : 0);
    }
    if (e.out_channel == 1) {
      add(e.output + first.out[0], e.out_pixel == conv.K ? pixels * conv.K * kItem : 0);
    }
  }

  // The next so many lines; null when there are no more.
  const char* take(int64_t lines) {
    for (; range_ < count_; ++range_) {
      Range& range = ranges_[range_];
      if (range.next >= range.end) continue;
      const char* taken = range.next;
      range.next += lines * kLine;
      return taken;
    }
    return nullptr;
  }

  static constexpr int64_t kLine = 64;

 private:
  struct Range {
    const char *next, *end;
  };

  void add(const void* begin, int64_t bytes) {
    const char* first = static_cast<const char*>(begin);
    ranges_[count_++] = {first, first + bytes};
  }

  Range ranges_[3];
  int count_ = 0, range_ = 0;
};

// All tiles against all blocks of output channels of the task.
template <class T>
void multiply_tiles(const Conv& conv, const Task& task, const TileList& list, float* norm,
                    Epilogue<T> e) {
  const Slab slab(conv);
  int64_t offsets[kMaxRuns];
  Product product;
  product.pixel_stride =
      reads_input_in_place(conv) ? conv.in.w / kItemChannels : slab.q_step * slab.pixel;
  product.run_offset = offsets;
  if (is_shuffled(conv)) product.first_source = first_source(conv);
  if (conv.S == 1 || is_shuffled(conv) || (conv.dil_w == 1 && !slab.has_gaps)) {
    product.runs = conv.R;
    product.run_length = (is_shuffled(conv) ? 1 : conv.S) * group_items(conv);
    for (int64_t r = 0; r < conv.R; ++r) offsets[r] = r * conv.dil_h * slab.pitch;
  } else {
    product.runs = conv.R * conv.S;
    product.run_length = group_items(conv);
    for (int64_t r = 0; r < conv.R; ++r) {
      for (int64_t s = 0; s < conv.S; ++s) {
        offsets[r * conv.S + s] = r * conv.dil_h * slab.pitch + s * conv.dil_w * slab.pixel;
      }
    }
  }

  const int64_t width = block_k(conv), channels = group_k(conv), blocks = div_up(channels, width);
  const Epilogue<T> base = e;
  const TaskNorm task_norm(conv, task, norm);
  const int64_t turn = tiles_in_turn(conv, list), steps = depth(conv);
  for (int64_t begin = 0; begin < list.count; begin += turn) {
    const int64_t end = begin + turn < list.count ? begin + turn : list.count;
    const int64_t next_end = end + turn < list.count ? end + turn : list.count;
    ComingPixels coming(conv, base, list, end, next_end);
    for (int64_t block = task.block_begin; block < task.block_end; ++block) {
      const int64_t channel = task.group * channels + block * width;
      const int vectors = task_norm.valid(block) <= kLanes ? 1 : 2;
      begin_block(conv, base, task_norm, block, channel, e);
      const int64_t weight_items = width * steps;
      const Item* weight =
          static_cast<const Item*>(conv.weight) + (task.group * blocks + block) * weight_items;
      // Without help the first tile of a block would wait for its weights. So while the tiles of
      // one block run, the next block is asked for, a part of it by each of the first tiles. Once
      // all of the weights have been seen, it is the next tiles' pixels that are asked for.
      const Item* next =
          block + 1 < task.block_end ? weight + weight_items : next_layer(conv, task, blocks);
      int64_t parts = 1;
      while (parts < 8 && parts * 2 <= end - begin) parts *= 2;
      const int64_t share = width / parts;
      Multiply<T> kernel = nullptr;
      int32_t groups = 0, pixels = 0;
      for (int64_t t = begin; t < end; ++t) {
        const Tile& tile = list.tiles[t];
        const int64_t part = t - begin;
        product.prefetch = reinterpret_cast<const char*>(weight);
        product.prefetch_step = 0;
        const char* pixels_ahead = begin > 0 || next == nullptr ? coming.take(steps) : nullptr;
        if (pixels_ahead != nullptr) {
          product.prefetch = pixels_ahead;
          product.prefetch_step = ComingPixels::kLine;
        } else if (next != nullptr && part < parts) {
          product.prefetch = reinterpret_cast<const char*>(next + part * share * steps);
          product.prefetch_step = share * 4;
        }
        if (tile.groups != groups || tile.pixels != pixels) {
          groups = tile.groups;
          pixels = tile.pixels;
          kernel = multiply_for<T>(conv, groups, pixels, vectors);
        }
        kernel(product, tile, weight, e);
      }
    }
  }
}

int64_t image_row_count(const Conv& conv, const Task& task) {
  if (!conv.has_pool) return task.row_end - task.row_begin;
  const int64_t most =
      (task.row_end - task.row_begin - 1) * conv.pool.stride_h + conv.pool.kernel_h;
  return most < conv.P ? most : conv.P;
}

// Scratch memory: [tiles][scale, shift and bias][slab][convolution rows awaiting the pool].
struct Scratch {
  Tile* tiles;
  Item* slab;
  float *norm, *conv_rows;
  int64_t bytes;

  Scratch(const Conv& conv, const Task& task, void* memory) {
    const int64_t rows = image_row_count(conv, task);
    const int64_t tile_bytes =
        round_up(TileList::capacity(conv, rows) * static_cast<int64_t>(sizeof(Tile)));
    const int64_t norm_bytes = round_up(norm_size(conv, task) * 4);
    int64_t slab_bytes = 0;
    if (!reads_input_in_place(conv)) {
      // A task that crosses images gathers the rows above and below for each of them.
      const Slab shape(conv);
      const int64_t images =
          conv.has_pool ? 1 : (task.row_end - 1) / conv.P - task.row_begin / conv.P + 1;
      slab_bytes = round_up(((rows - images) * shape.p_step + images * shape.rows(conv, 1)) *
                            shape.pitch * 4);
    }
    const int64_t conv_row_bytes = conv.has_pool ? round_up(rows * conv.Q * conv.K * 4) : 0;
    char* base = static_cast<char*>(memory);
    tiles = reinterpret_cast<Tile*>(base);
    norm = reinterpret_cast<float*>(base + tile_bytes);
    slab = reinterpret_cast<Item*>(base + tile_bytes + norm_bytes);
    conv_rows = reinterpret_cast<float*>(base + tile_bytes + norm_bytes + slab_bytes);
    bytes = tile_bytes + norm_bytes + slab_bytes + conv_row_bytes;
  }

  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

int64_t scratch_bytes(const Conv& conv, const Task& task) {
  return Scratch(conv, task, nullptr).bytes;
}

// Tiles of rows [p_begin, p_end) of image n; the slab is filled for them. Returns the slab's end.
template <class T>
Item* add_rows(const Conv& conv, const Task& task, int64_t n, int64_t p_begin, int64_t p_end,
               const Strides& out, int64_t out_base, Item* slab_memory, TileList& list) {
  const int64_t res_base = n * conv.res.n;
  if (reads_input_in_place(conv)) {
    const Item* image = static_cast<const Item*>(conv.input) +
                        (n * conv.in.n + task.group * group_c(conv)) / kItemChannels;
    const int64_t row = conv.in.h / kItemChannels, pixel = conv.in.w / kItemChannels;
    for (int64_t p = p_begin; p < p_end; ++p) {
      list.add_row(image + p * row, pixel, out_base + (p - p_begin) * out.h, out.w,
                   res_base + p * conv.res.h, conv.res.w, p + 1 == conv.P ? conv.last_q : conv.Q);
    }
    return slab_memory;
  }
  const Slab slab(conv);
  gather<T>(conv, slab, n, p_begin, p_end, task, slab_memory);
  for (int64_t p = p_begin; p < p_end; ++p) {
    list.add_row(slab_memory + (p - p_begin) * slab.p_step * slab.pitch, slab.q_step * slab.pixel,
                 out_base + (p - p_begin) * out.h, out.w, res_base + p * conv.res.h, conv.res.w,
                 p + 1 == conv.P ? conv.last_q : conv.Q);
  }
  return slab_memory + slab.rows(conv, p_end - p_begin) * slab.pitch;
}

template <class T>
void run_conv(const Conv& conv, const Task& task, void* memory) {
  const Scratch scratch(conv, task, memory);
  TileList list(conv, scratch.tiles);
  Item* slab_memory = scratch.slab;
  for (int64_t row = task.row_begin; row < task.row_end;) {
    const int64_t n = row / conv.P, p = row % conv.P;
    const int64_t rest = conv.P - p, wanted = task.row_end - row;
    const int64_t count = wanted < rest ? wanted : rest;
    slab_memory = add_rows<T>(conv, task, n, p, p + count, conv.out,
                              n * conv.out.n + p * conv.out.h, slab_memory, list);
    row += count;
  }
  list.share_last();
  multiply_tiles<T>(conv, task, list, scratch.norm, epilogue_of<T>(conv));
}

// Maximum over one window of convolution outputs; a NaN anywhere in it is the result.
template <class T>
void pool_pixel(const float* rows, int64_t row_pitch, int64_t h_count, int64_t w_count, int64_t K,
                typename T::Storage* out, int64_t out_channel) {
  int64_t k = 0;
  if (out_channel == 1) {
    for (; k + kLanes <= K; k += kLanes) {
      Vec best = Float32::load(rows + k);
      for (int64_t h = 0; h < h_count; ++h) {
        for (int64_t w = 0; w < w_count; ++w) {
          const Vec x = Float32::load(rows + h * row_pitch + w * K + k);
          best = (x <= best) | (best != best) ? best : x;
        }
      }
      T::store(out + k, best);
    }
  }
  for (; k < K; ++k) {
    float best = rows[k];
    for (int64_t h = 0; h < h_count; ++h) {
      for (int64_t w = 0; w < w_count; ++w) {
        const float x = rows[h * row_pitch + w * K + k];
        if (!(x <= best) && best == best) best = x;
      }
    }
    store_one<T>(out + k * out_channel, best);
  }
}

// The stem: convolution rows go to scratch memory and leave it pooled.
template <class T>
void run_conv_pool(const Conv& conv, const Task& task, void* memory) {
  const MaxPool& pool = conv.pool;
  for (int64_t row = task.row_begin; row < task.row_end;) {
    const int64_t n = row / pool.P, p = row % pool.P;
    const int64_t rest = pool.P - p, wanted = task.row_end - row;
    const int64_t count = wanted < rest ? wanted : rest;
    int64_t h_begin = p * pool.stride_h - pool.pad_h;
    int64_t h_end = (p + count - 1) * pool.stride_h - pool.pad_h + pool.kernel_h;
    h_begin = h_begin < 0 ? 0 : h_begin;
    h_end = h_end > conv.P ? conv.P : h_end;

    const Scratch scratch(conv, task, memory);
    TileList list(conv, scratch.tiles);
    const int64_t row_pitch = conv.Q * conv.K;
    const Strides rows_layout{0, 1, row_pitch, conv.K};
    add_rows<T>(conv, task, n, h_begin, h_end, rows_layout, 0, scratch.slab, list);
    list.share_last();
    Epilogue<Float32> e{};
    e.relu = is_relu(conv.act);
    e.act = conv.act;
    e.output = scratch.conv_rows;
    e.out_pixel = conv.K;
    e.out_channel = 1;
    multiply_tiles<Float32>(conv, task, list, scratch.norm, e);

    for (int64_t i = p; i < p + count; ++i) {
      int64_t h0 = i * pool.stride_h - pool.pad_h, h1 = h0 + pool.kernel_h;
      h0 = h0 < 0 ? 0 : h0;
      h1 = h1 > conv.P ? conv.P : h1;
      for (int64_t j = 0; j < pool.Q; ++j) {
        int64_t w0 = j * pool.stride_w - pool.pad_w, w1 = w0 + pool.kernel_w;
        w0 = w0 < 0 ? 0 : w0;
        w1 = w1 > conv.Q ? conv.Q : w1;
        typename T::Storage* out = static_cast<typename T::Storage*>(conv.output) + n * conv.out.n +
                                   i * conv.out.h + j * conv.out.w;
        pool_pixel<T>(scratch.conv_rows + (h0 - h_begin) * row_pitch + w0 * conv.K, row_pitch,
                      h1 - h0, w1 - w0, conv.K, out, conv.out.c);
      }
    }
    row += count;
  }
}

template <class T>
void run_as(const Conv& conv, const Task& task, void* memory) {
  if (conv.has_pool) {
    run_conv_pool<T>(conv, task, memory);
  } else {
    run_conv<T>(conv, task, memory);
  }
}

#if FR_ITEM_CHANNELS == 1
void run(const Conv& conv, const Task& task, void* memory) {
  switch (conv.dtype) {
    case Dtype::kFloat32:
      return run_as<Float32>(conv, task, memory);
    case Dtype::kBFloat16:
      return run_as<BFloat16>(conv, task, memory);
    case Dtype::kFloat16:
      return run_as<Float16>(conv, task, memory);
  }
}
#else
void run(const Conv& conv, const Task& task, void* memory) {
  run_as<BFloat16>(conv, task, memory);
}
#endif

}  // namespace
}  // namespace fused_resnet::cpu
