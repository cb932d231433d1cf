// One task of the native convolution on a unit that multiplies tiles (conv_tiles.h), for the
// including file, which defines
//   Element           vectors of the tensors' elements; see vectors.h
//   Storage           such an element in memory
//   kParts            how many bfloat16 stand for a value: 1 for bfloat16, 2 for float16, up to 3
//                     for float32
// includes one of tiles_amx.h and tiles_emulated.h, with
//   Value             vectors of float32
//   square_root()     of such a vector
//   copy()            of elements
//   store_block()     of 32 values, or 16, rounded to an element
//   split()           32 float32 into their parts, cut off or rounded
//   is_doubtful()     see load_sums()
//   TileState         whose life is the time in which the unit's registers are ours
//   zero_sums(), load_pixels(i), load_weights(j), multiply_add(i, j), multiply_add_to(s, i, j),
//   store_sums(i, j)
//                     the registers: 2 x 2 tiles of sums, 2 of pixels, 2 of weights
// and ends with the exported ConvIsa. No standard header beyond <cstdint> may be included here: an
// inline library function compiled for this instruction set could replace the portable one at link
// time.
//
// A block is 32 pixels times 32 output channels. For each chunk of the reduction it loads two tiles
// of pixels and two of weights, 4 KiB, for four products: 64 cycles of the unit, in which the
// second-level cache can deliver about 3 KiB. So one of the two has to come from the first-level
// cache. For 1x1 convolutions, pixels do: all blocks of output channels take the same ones in turn.
// For larger filters, they mostly do: the taps of one chunk of channels read the same lines. The
// weights stream from the second-level cache, 32 bytes a cycle.
//
// Pixels are tiles as they lie in memory wherever possible: a tile's rows need only be evenly
// spaced. Hence the slab (below), in which the outputs of a whole image are one evenly spaced
// sequence, so that tiles run across the ends of lines.
//
// A float32 is the sum of three bfloat16, its parts: x = x0 + x1 + x2, exactly, each at most 2^-7
// of the one before. Of the nine products of parts six matter: x0 w0, and x0 w1, x1 w0, x0 w2, x1
// w1 and x2 w0, which are small. What is left out is below 2^-22 of the first, and of any sign,
// since weights are rounded to their parts. A block goes through the reduction twice, first for the
// small products, 20 a step, then for the large, 4 a step, which go on with the same sums: so small
// products are rounded as small sums are, and the large ones once for 32. It never waits for a sum.
// Where the user has torch be less exact, there are two parts and the products x0 w1, x1 w0 and x0
// w0, or one. A float16 is the sum of two parts, exactly; the product of the second ones, below
// 2^-16 of the first's, is left out. In memory weights are float32 in both cases; pixels are split
// when they are gathered, and weights, which are packed as for the vector kernels, when a task
// comes to them. Where its pixels fit four tiles, all of these are multiplied at once, by 16 output
// channels in turn, and a step's weights are split while the step before is multiplied: late in a
// network at batch 1, where there is little to do for each weight.
//
// Memory traffic: as conv.h says; the slab is written and read in the second-level cache.
//
// Reading order: slab -> gather -> operands -> epilogue -> product, which finishes the block before
// -> task -> pool.

#include "cpu/conv_axis.h"

namespace fused_resnet::cpu {
namespace {

#define FR_INLINE inline __attribute__((always_inline))
// An unrolled loop.
#define FR_FOR(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); ++i)

constexpr int kBlockPixels = 2 * kTileRows;
constexpr int64_t kChunkBytes = kTileDepth * 2;  // a tile's row
constexpr int kWidth = Value::width;

using Part = uint16_t;  // of a value, in tiles: a bfloat16's bits
constexpr int64_t kItem = sizeof(Storage);
// Whether values are split into their parts.
constexpr bool kSplit = kParts > 1 || kItem != sizeof(Part);

FR_INLINE Element::Register load(const Storage* p) {
  return Element::load(reinterpret_cast<const Element::Element*>(p));
}
FR_INLINE Element::Register load(const Storage* p, int64_t count) {
  return Element::load(reinterpret_cast<const Element::Element*>(p), count);
}
FR_INLINE void store(Storage* p, Element::Register x) {
  Element::store(reinterpret_cast<Element::Element*>(p), x);
}
FR_INLINE void store(Storage* p, Element::Register x, int64_t count) {
  Element::store(reinterpret_cast<Element::Element*>(p), x, count);
}

FR_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FR_INLINE int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}
FR_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- slab --------------------------------------------------------------------------------------

// How the pixels of a task are laid out for the tiles.
//
// kInPlace: as the input has them. kSlab: gathered into [chunks of 32 channels][planes of rows]
// [planes of columns][rows][pitch][32], with the image's padding as zeros; the zeros at the end of
// a row are those at the beginning of the next. Output (p, q) is at position p * pitch + q and
// meets every tap at a constant offset from there; positions with q >= Q are computed and dropped,
// few of them: 1 of 57, of 29, of 15, of 8 in a 3x3 convolution. A tile is 1 KiB in one piece:
// pixels that are a power of two apart would share few sets of the first-level cache. kDense:
// gathered into [outputs][R][S][C], the weight's order, padded to whole chunks.
enum class Form { kInPlace, kSlab, kDense };

struct Layout {
  Form form;
  Axis h, w;
  TiledWeight weight;
  int64_t chunks;                  // of a pixel
  int64_t pixel;                   // bytes from one position to the next
  int64_t columns, shared, pitch;  // of a slab's row: pitch = columns - shared

  explicit Layout(const Conv& conv)
      : h(conv.stride_h, conv.dil_h, conv.pad_h, conv.R),
        w(conv.stride_w, conv.dil_w, conv.pad_w, conv.S),
        weight(tiled_weight(group_k(conv), group_c(conv), conv.R * conv.S)) {
    const bool in_place =
        !kSplit && is_pointwise(conv) && conv.stride_h == 1 && conv.stride_w == 1 &&
        conv.pad_h == 0 && conv.pad_w == 0 && conv.in_scale == nullptr && conv.in.c == 1 &&
        group_c(conv) % kTileDepth == 0 && (conv.in.h == conv.W * conv.in.w || conv.P == 1);
    form = in_place ? Form::kInPlace : weight.dense ? Form::kDense : Form::kSlab;
    chunks = weight.dense ? weight.chunks : div_up(weight.C, kTileDepth);
    const bool slab = form == Form::kSlab;
    pixel = in_place ? conv.in.w * 2 : slab ? kChunkBytes : chunks * kChunkBytes;
    columns = conv.Q + (slab ? w.reach() : 0);
    shared = slab ? w.shared(conv.Q, conv.W) : 0;
    pitch = columns - shared;
  }
  int64_t taps() const { return weight.dense ? 1 : weight.taps; }
};

// Where an output pixel, and what is added to it, begins: element offsets of channel 0. A position
// that no output belongs to has a negative `out`.
struct Position {
  int64_t out, res;
};

// Sixteen positions, `stride` bytes apart.
struct Tile {
  const char* in;
  int64_t stride;
};

int64_t image_row_count(const Conv& conv, const Task& task) {
  if (!conv.has_pool) return task.row_end - task.row_begin;
  return least(conv.P,
               (task.row_end - task.row_begin - 1) * conv.pool.stride_h + conv.pool.kernel_h);
}

// bfloat16 values of a chunk and block's weights, or of one of their parts.
constexpr int64_t kTiledPart = kTileDepth * kTileBlockK;
constexpr int64_t kPartBytes = kTiledPart * 2;

// Floats of a block's sums.
constexpr int64_t kSums = kBlockPixels * kTileBlockK;

// How many tiles of pixels are multiplied at once by 16 output channels, and the floats of their
// sums with a block.
constexpr int64_t kFewTiles = kParts == 3 ? 4 : 0;
constexpr int64_t kTaskSums = kFewTiles > 0 ? kFewTiles * kTileRows * kTileBlockK : kSums;

// Scratch memory of a task: [tiles][positions][scale, shift and bias][offsets of taps][sums of two
// blocks][slab][input rows of a dense gather, and a pixel of it]
// [weights in parts]// [convolution rows awaiting the pool].
struct Scratch {
  Tile* tiles;
  Position* positions;
  float *scale, *shift, *bias, *sums;
  int64_t* offsets;
  char* slab;
  Storage *input_rows, *pixel, *conv_rows;
  char* weights;
  // Bytes from one plane of the slab to the next, from a part of a chunk to the next, from a chunk
  // to the next.
  int64_t plane, part, chunk;
  int64_t bytes;

  Scratch(const Conv& conv, const Task& task, const Layout& layout, void* memory) {
    const int64_t rows = image_row_count(conv, task);
    const int64_t images =
        conv.has_pool ? 1 : (task.row_end - 1) / conv.P - task.row_begin / conv.P + 1;
    const int64_t tile_count = rows * layout.pitch / kTileRows + images + 1;
    const int64_t channels = (task.block_end - task.block_begin) * kTileBlockK;
    char* next = static_cast<char*>(memory);
    auto take = [&](int64_t size) {
      char* taken = next;
      next += round_up(size, 64);
      return taken;
    };
    tiles = reinterpret_cast<Tile*>(take(tile_count * static_cast<int64_t>(sizeof(Tile))));
    positions = reinterpret_cast<Position*>(
        take(tile_count * kTileRows * static_cast<int64_t>(sizeof(Position))));
    scale = reinterpret_cast<float*>(take(channels * 4));
    shift = reinterpret_cast<float*>(take(channels * 4));
    bias = reinterpret_cast<float*>(take(channels * 4));
    offsets = reinterpret_cast<int64_t*>(take(layout.taps() * 8));
    sums = reinterpret_cast<float*>(take(2 * kTaskSums * 4));
    plane = part = 0;
    chunk = kChunkBytes;
    int64_t slab_bytes = 0, input_bytes = 0;
    switch (layout.form) {
      case Form::kInPlace:  // the last pixels of each image
        slab_bytes = images * kTileRows * layout.chunks * kChunkBytes;
        break;
      case Form::kSlab:
        plane = (rows + images * layout.h.reach()) * layout.pitch * layout.pixel;
        // The last tile may go on behind the last row, with every tap.
        part =
            layout.h.planes * layout.w.planes * plane + (kTileRows + layout.columns) * layout.pixel;
        chunk = kParts * part;
        slab_bytes = layout.chunks * chunk;
        break;
      case Form::kDense:
        part = (rows * conv.Q + images * kTileRows) * layout.pixel + kChunkBytes;
        slab_bytes = kParts * part;
        input_bytes = ((rows - 1) * conv.stride_h + layout.h.dil * (conv.R - 1) + 1) *
                          ((conv.Q - 1) * conv.stride_w + layout.w.dil * (conv.S - 1) + 1) *
                          group_c(conv) * kItem +
                      kTileDepth * kItem;
        break;
    }
    slab = take(slab_bytes);
    input_rows = reinterpret_cast<Storage*>(take(input_bytes));
    pixel = reinterpret_cast<Storage*>(take((layout.chunks + 1) * kTileDepth * kItem));
    conv_rows =
        reinterpret_cast<Storage*>(take(conv.has_pool ? rows * conv.Q * conv.K * kItem : 0));
    const int64_t split_blocks = conv.keeps_weight ? task.block_end - task.block_begin : 1;
    weights = take(kSplit ? split_blocks * layout.weight.chunks * kParts * kPartBytes : 0);
    bytes = next - static_cast<char*>(memory);
  }
};

int64_t scratch_bytes(const Conv& conv, const Task& task) {
  return Scratch(conv, task, Layout(conv), nullptr).bytes;
}

// ---- gather ------------------------------------------------------------------------------------

FR_INLINE void zero(Storage* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(dst + i, Value::broadcast(0));
  if (i < count) store(dst + i, Value::broadcast(0), count - i);
}

// As many chunks as hold `count` elements.
FR_INLINE void copy_chunks(Storage* dst, const Storage* src, int64_t count) {
  for (int64_t i = 0; i < count; i += kTileDepth) copy(dst + i, src + i, kTileDepth);
}

FR_INLINE Value::Register normalised(Value::Register x, const float* scale, const float* shift) {
  return Value::relu(Value::multiply_add(x, Value::load(scale), Value::load(shift)));
}

// As it would be read back from a tensor.
FR_INLINE Value::Register rounded(Value::Register x) {
  if constexpr (kItem == sizeof(float)) return x;
  alignas(64) Storage lanes[kWidth];
  store(lanes, x);
  return load(lanes);
}

// 32 results, or 16.
template <int kN>
FR_INLINE void store_results(Storage* dst, const Value::Register* y) {
  if constexpr (kSplit && kItem == 2) {
    FR_FOR (v, kN * 16 / kWidth) store(dst + v * kWidth, y[v]);
  } else {
    store_block<kN>(dst, y);
  }
}

// Channels of one pixel, through the prologue if there is one.
FR_INLINE void copy_channels(Storage* dst, const Storage* src, int64_t count, const float* scale,
                             const float* shift) {
  if (scale == nullptr) {
    copy(dst, src, count);
    return;
  }
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) {
    store(dst + c, normalised(load(src + c), scale + c, shift + c));
  }
  if (c < count) {
    store(dst + c, normalised(load(src + c, count - c), scale + c, shift + c), count - c);
  }
}

// What gather_row() writes: elements as they are,
struct Whole {
  using Unit = Storage;
  static constexpr bool kWhole = true;

  static void clear(Storage* dst, int64_t count) { zero(dst, count); }
  static FR_INLINE void put(Storage* dst, int64_t pixel, const Storage* src, int64_t count,
                            const float* scale, const float* shift) {
    copy_channels(dst, src, count, scale, shift);
    zero(dst + count, pixel - count);
  }
};

// or a chunk's parts, so many apart.
struct InParts {
  using Unit = Part;
  static constexpr bool kWhole = false;
  int64_t part;

  void clear(Part* dst, int64_t count) const {
    for (int p = 0; p < kParts; ++p, dst += part) __builtin_memset(dst, 0, count * sizeof(Part));
  }
  FR_INLINE void put(Part* dst, int64_t, const Storage* src, int64_t count, const float* scale,
                     const float* shift) const {
    constexpr int kVectors = kTileDepth / kWidth;
    Value::Register x[kVectors];
    if (count == kTileDepth) {
      FR_FOR (v, kVectors) {
        x[v] = load(src + v * kWidth);
        if (scale == nullptr) continue;
        x[v] = rounded(normalised(x[v], scale + v * kWidth, shift + v * kWidth));
      }
    } else {
      FR_FOR (v, kVectors) {
        const int64_t first = v * kWidth, rest = least(count - first, kWidth);
        x[v] = Value::broadcast(0);
        if (rest <= 0) continue;
        x[v] = load(src + first, rest);
        if (scale == nullptr) continue;
        const Value::Register y = rounded(normalised(x[v], scale + first, shift + first));
        x[v] = Value::where_bits((1u << rest) - 1, y);
      }
    }
    // What is rounded may overflow, but not a float16.
    split<kParts, kItem == 2>(dst, part, x);
  }
};

// Row h of image n, its columns first, first + step and so on: 32 channels of column j to dst[j *
// pixel], the next 32 `chunk` elements further. What lies outside of the image, and behind the
// channels up to `pixel`, is zero.
template <class To>
void gather_row(const To& target, const Conv& conv, int64_t group, int64_t n, int64_t h,
                int64_t first, int64_t step, int64_t count, typename To::Unit* dst, int64_t pixel,
                int64_t chunk) {
  constexpr bool kWhole = To::kWhole;
  const int64_t channels = group_c(conv);
  const int64_t begin = first < 0 ? least(div_up(-first, step), count) : 0;
  const int64_t width = h + 1 == conv.H ? conv.last_w : conv.W;
  const int64_t end = least(count, width > first ? div_up(width - first, step) : 0);
  const bool outside = h < 0 || h >= conv.H || end <= begin;
  // A row of one that is all there is may have any stride.
  const int64_t row = outside ? 0 : h * conv.in.h + (first + begin * step) * conv.in.w;
  const Storage* src =
      static_cast<const Storage*>(conv.input) + n * conv.in.n + row + group * channels * conv.in.c;
  const int64_t src_step = step * conv.in.w;
  for (int64_t c = 0; c < channels; c += kTileDepth, dst += chunk, src += kTileDepth * conv.in.c) {
    if (outside) {
      target.clear(dst, count * pixel);
      continue;
    }
    const int64_t valid = least(kTileDepth, channels - c);
    const float *scale = nullptr, *shift = nullptr;
    if (conv.in_scale != nullptr) {
      scale = conv.in_scale + group * channels + c;
      shift = conv.in_shift + group * channels + c;
    }
    auto* inside = dst + begin * pixel;
    target.clear(dst, begin * pixel);
    if (conv.in.c != 1 && kWhole) {
      // Pixels of one channel are read along the row.
      for (int64_t i = 0; i < valid; ++i) {
        for (int64_t j = 0; j < end - begin; ++j) {
          inside[j * pixel + i] = src[j * src_step + i * conv.in.c];
        }
      }
      if constexpr (kWhole) {
        for (int64_t j = 0; j < end - begin; ++j) {
          auto* to = inside + j * pixel;
          target.put(to, pixel, to, valid, scale, shift);
        }
      }
    } else if (conv.in.c != 1) {
      Storage channel[kTileDepth];
      for (int64_t j = 0; j < end - begin; ++j) {
        for (int64_t i = 0; i < valid; ++i) channel[i] = src[j * src_step + i * conv.in.c];
        target.put(inside + j * pixel, pixel, channel, valid, scale, shift);
      }
    } else if (kWhole && scale == nullptr && pixel == valid && src_step == pixel) {
      if constexpr (kWhole) copy(inside, src, (end - begin) * pixel);
    } else {
      for (int64_t j = 0; j < end - begin; ++j) {
        target.put(inside + j * pixel, pixel, src + j * src_step, valid, scale, shift);
      }
    }
    target.clear(dst + end * pixel, (count - end) * pixel);
  }
}

auto slab_target(const Scratch& scratch) {
  if constexpr (!kSplit) {
    return Whole{};
  } else {
    return InParts{scratch.part / 2};
  }
}

// Rows [p_begin, p_end) of image n to row `row` and the following of the slab's planes.
void gather_slab(const Conv& conv, const Task& task, const Layout& layout, int64_t n,
                 int64_t p_begin, int64_t p_end, int64_t row, const Scratch& scratch) {
  const int64_t rows = p_end - p_begin + layout.h.reach();
  const int64_t row_bytes = layout.pitch * layout.pixel;
  const auto target = slab_target(scratch);
  for (int64_t i = 0; i < layout.h.planes; ++i) {
    for (int64_t j = 0; j < layout.w.planes; ++j) {
      char* to = scratch.slab + (i * layout.w.planes + j) * scratch.plane + row * row_bytes;
      for (int64_t y = 0; y < rows; ++y, to += row_bytes) {
        const int64_t h = (p_begin + y) * layout.h.stride + layout.h.first_input(i);
        gather_row(target, conv, task.group, n, h, layout.w.first_input(j), layout.w.stride,
                   layout.pitch, reinterpret_cast<Part*>(to), kTileDepth, scratch.chunk / 2);
      }
      // The zeros at the end of the last row; rows that follow begin with them.
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk, to += scratch.chunk) {
        target.clear(reinterpret_cast<Part*>(to), layout.shared * kTileDepth);
      }
    }
  }
}

// Rows [p_begin, p_end) of image n as outputs' neighbourhoods.
void gather_dense(const Conv& conv, const Task& task, const Layout& layout, int64_t n,
                  int64_t p_begin, int64_t p_end, const Scratch& scratch, char* slab) {
  const int64_t channels = group_c(conv);
  const int64_t columns = (conv.Q - 1) * conv.stride_w + (conv.S - 1) * conv.dil_w + 1;
  const int64_t rows = (p_end - p_begin - 1) * conv.stride_h + (conv.R - 1) * conv.dil_h + 1;
  const int64_t pitch = columns * channels;
  for (int64_t y = 0; y < rows; ++y) {
    gather_row(Whole{}, conv, task.group, n, p_begin * conv.stride_h - conv.pad_h + y, -conv.pad_w,
               1, columns, scratch.input_rows + y * pitch, channels, 0);
  }
  const bool adjacent = conv.dil_w == 1;
  const int64_t run = adjacent ? conv.S * channels : channels;
  const int64_t size = layout.chunks * kTileDepth;
  Part* pixel = reinterpret_cast<Part*>(slab);
  for (int64_t p = 0; p < p_end - p_begin; ++p) {
    for (int64_t q = 0; q < conv.Q; ++q, pixel += size) {
      const Storage* from =
          scratch.input_rows + p * conv.stride_h * pitch + q * conv.stride_w * channels;
      Storage* const begin = !kSplit ? reinterpret_cast<Storage*>(pixel) : scratch.pixel;
      Storage *to = begin, *const end = begin + size;
      // What a copy writes behind its run the next one overwrites.
      for (int64_t r = 0; r < conv.R; ++r, from += conv.dil_h * pitch) {
        for (int64_t s = 0; s < (adjacent ? 1 : conv.S); ++s, to += run) {
          copy_chunks(to, from + s * conv.dil_w * channels, run);
        }
      }
      zero(to, end - to);
      if constexpr (kSplit) {
        for (int64_t i = 0; i < size; i += kTileDepth) {
          InParts{scratch.part / 2}.put(pixel + i, 0, begin + i, kTileDepth, nullptr, nullptr);
        }
      }
    }
  }
}

// The tiles and positions of a task, in order.
struct TileList {
  Tile* tiles;
  Position* positions;
  int64_t count = 0;

  // `rows` rows of `pitch` positions from `in` on, of which q belong to outputs, in the last row
  // last_q. out and res are where the first output begins.
  void add(const char* in, int64_t stride, int64_t rows, int64_t pitch, int64_t q, int64_t last_q,
           int64_t out, int64_t out_h, int64_t out_w, int64_t res, int64_t res_h, int64_t res_w) {
    Position* next = positions + count * kTileRows;
    for (int64_t p = 0; p < rows; ++p) {
      const bool last = p + 1 == rows;
      const int64_t valid = last ? last_q : q;
      for (int64_t i = 0; i < valid; ++i) {
        *next++ = {out + p * out_h + i * out_w, res + p * res_h + i * res_w};
      }
      for (int64_t i = valid; i < pitch && !last; ++i) *next++ = {-1, 0};
    }
    const int64_t length = next - (positions + count * kTileRows);
    for (int64_t i = length; i % kTileRows != 0; ++i) *next++ = {-1, 0};
    for (int64_t i = 0; i < length; i += kTileRows) tiles[count++] = {in + i * stride, stride};
  }
};

// Adds the tiles of rows [p_begin, p_end) of image n. `row` counts the slab's rows that are taken,
// in kDense and kInPlace its pixels.
void add_rows(const Conv& conv, const Task& task, const Layout& layout, const Scratch& scratch,
              int64_t n, int64_t p_begin, int64_t p_end, const Strides& out, int64_t out_base,
              int64_t& row, TileList& list) {
  const int64_t rows = p_end - p_begin;
  const int64_t last_q = p_end == conv.P ? conv.last_q : conv.Q;
  const char* in = nullptr;
  switch (layout.form) {
    case Form::kSlab:
      gather_slab(conv, task, layout, n, p_begin, p_end, row, scratch);
      in = scratch.slab + row * layout.pitch * layout.pixel;
      row += rows + layout.h.reach();
      break;
    case Form::kDense: {
      char* slab = scratch.slab + row * layout.pixel;
      gather_dense(conv, task, layout, n, p_begin, p_end, scratch, slab);
      in = slab;
      row += round_up(rows * conv.Q, kTileRows);
      break;
    }
    case Form::kInPlace:
      in = reinterpret_cast<const char*>(static_cast<const Storage*>(conv.input) + n * conv.in.n +
                                         p_begin * conv.in.h + task.group * group_c(conv));
      break;
  }
  list.add(in, layout.pixel, rows, layout.pitch, conv.Q, last_q, out_base, out.h, out.w,
           n * conv.res.n + p_begin * conv.res.h, conv.res.h, conv.res.w);
  if (layout.form == Form::kInPlace) {
    // A tile must not go on behind the last pixel, where the tensor may end: that one is copied.
    const int64_t rest = ((rows - 1) * conv.Q + last_q) % kTileRows;
    if (rest == 0) return;
    Tile& tile = list.tiles[list.count - 1];
    const int64_t size = layout.chunks * kChunkBytes;
    char* slab = scratch.slab + row * size;
    for (int64_t i = 0; i < rest; ++i) {
      copy(reinterpret_cast<Storage*>(slab + i * size),
           reinterpret_cast<const Storage*>(tile.in + i * tile.stride), group_c(conv));
    }
    tile = {slab, size};
    row += kTileRows;
  }
}

// ---- operands -----------------------------------------------------------------------------------

// A block of float32 weights as vector kernels have them: rows of its output channels, in halves of
// 16, for every value of the reduction in the order [R][S][C].
struct WeightRows {
  const float* first;
  int64_t row, half;  // floats from row to row and from half to half
  bool has_both;
  int64_t taps, channels, reduction;
  bool dense;

  // A half of the row of a chunk's i-th value; null behind the last.
  FR_INLINE const float* at(int64_t chunk, int64_t tap, int64_t i, int64_t which) const {
    const int64_t c = chunk * kTileDepth + i;
    if (c >= (dense ? reduction : channels) || (which == 1 && !has_both)) return nullptr;
    return first + (dense ? c : tap * channels + c) * row + which * half;
  }
};

// Half a row; zeros where there is none.
FR_INLINE void load_half(const float* row, Value::Register* x) {
  FR_FOR (v, 16 / kWidth) {
    x[v] = row == nullptr ? Value::broadcast(0) : Value::load(row + v * kWidth);
  }
}

// All of a block's weights in parts: tiles for each chunk and tap, in order.
void split_weights(const WeightRows& rows, int64_t chunks, int64_t taps, char* to) {
  constexpr int kVectors = 16 / kWidth;
  Value::Register x[2 * kVectors];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t tap = 0; tap < taps; ++tap, to += kParts * kPartBytes) {
      Part* row = reinterpret_cast<Part*>(to);
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t i = 0; i < kTileDepth / 2; ++i, row += kTileDepth) {
          load_half(rows.at(chunk, tap, i, half), x);
          load_half(rows.at(chunk, tap, i + kTileDepth / 2, half), x + kVectors);
          split<kParts, true>(row, kTiledPart, x);
        }
      }
    }
  }
}

struct Product {
  const Tile* tiles;
  const char* weight;
  WeightRows rows;  // of float32
  int64_t taps, chunks;
  const int64_t* offsets;  // of the taps, in bytes
  int64_t part, chunk;     // bytes from one part of a pixel to the next, and from one chunk
  // What to bring into the second-level cache meanwhile: `lines` for every chunk.
  const char* prefetch;
  int64_t lines;
  // And of the next layer's weights.
  const char* ahead;
  int64_t ahead_lines;
};

constexpr int64_t kLine = 64;
FR_INLINE float part_value(const char* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// The value whose parts are so many bytes apart. An infinity's other parts are zeros.
FR_INLINE float whole_value(const char* p, int64_t part) {
  if constexpr (kParts == 1) return part_value(p);
  if constexpr (kParts == 2) return part_value(p) + part_value(p + part);
  return part_value(p) + (part_value(p + part) + part_value(p + 2 * part));
}

// The unit takes subnormals for zeros, and infinity times a part that is zero is NaN: pixels with a
// sum that is not finite, or so small that part of it may have been lost, are multiplied again, in
// float32. A sum that is zero though its products, all below 2^-126, were not is not found.
__attribute__((noinline)) void multiply_again(const Product& product, int64_t pixel, float* sums) {
  constexpr int kHalf = 16 / kWidth, kVectors = 2 * kHalf;
  const Tile& tile = product.tiles[pixel / kTileRows];
  Value::Register total[kVectors], sum[kVectors], weights[kVectors];
  FR_FOR (v, kVectors) total[v] = Value::broadcast(0);
  for (int64_t chunk = 0; chunk < product.chunks; ++chunk) {
    for (int64_t tap = 0; tap < product.taps; ++tap) {
      const char* in =
          tile.in + pixel % kTileRows * tile.stride + product.offsets[tap] + chunk * product.chunk;
      // A sum of sums: the error of one long chain would grow with its length.
      FR_FOR (v, kVectors) sum[v] = Value::broadcast(0);
      // In the order of a tile's row.
      for (int64_t j = 0; j < kTileDepth; ++j, in += sizeof(Part)) {
        const int64_t i = j / 2 + (j % 2 == 0 ? kTileDepth / 2 : 0);
        load_half(product.rows.at(chunk, tap, i, 0), weights);
        load_half(product.rows.at(chunk, tap, i, 1), weights + kHalf);
        const Value::Register x = Value::broadcast(whole_value(in, product.part));
        FR_FOR (v, kVectors) sum[v] = Value::multiply_add(x, weights[v], sum[v]);
      }
      FR_FOR (v, kVectors) total[v] = Value::add(total[v], sum[v]);
    }
  }
  FR_FOR (v, kVectors) Value::store(sums + v * kWidth, total[v]);
}

// A pixel's sums, kN times 16.
template <int kN>
FR_INLINE void load_sums(const Product& product, int64_t pixel, const float* sums,
                         Value::Register* y) {
  constexpr int kVectors = kN * 16 / kWidth;
  FR_FOR (v, kVectors) y[v] = Value::load(sums + v * kWidth);
  if constexpr (kSplit) {
    if (__builtin_expect(is_doubtful<kVectors>(y), 0)) {
      alignas(64) float again[kTileBlockK];
      multiply_again(product, pixel, again);
      FR_FOR (v, kVectors) y[v] = Value::load(again + v * kWidth);
    }
  }
}

// ---- epilogue ----------------------------------------------------------------------------------

// Where results go. `channels` counts the valid ones of this block, of which those in [res_begin,
// res_end) have a residual, the first of them at `residual`.
struct Epilogue {
  const float *scale, *shift;
  const float* bias;  // added before the scale; null: it is in the shift
  const Storage* residual;
  Storage* output;
  int64_t out_channel, res_channel;
  int64_t channels, res_begin, res_end;
  bool relu;
  Activation act;
};

// Other activations than ReLU are applied in memory.
template <int kVectors>
FR_INLINE void activate_results(const Activation& act, Value::Register* y) {
  alignas(64) float results[kVectors * kWidth];
  FR_FOR (v, kVectors) Value::store(results + v * kWidth, y[v]);
  activate<kWidth == 1 ? 16 : 4 * kWidth>(act, results, kVectors * kWidth);
  FR_FOR (v, kVectors) y[v] = Value::load(results + v * kWidth);
}

// Scale and shift of a block of output channels, from `channel` on, `count` of them. The
// convolution's bias is in the shift but where the scale is infinite, since eps and the variance
// are both 0 or the weight is infinite: with its sign it would decide what is NaN. Returns whether
// there are such channels, with their bias in `bias`, and zeros for the others.
bool scale_and_shift(const Conv& conv, int64_t channel, int64_t count, float* scale, float* shift,
                     float* bias) {
  auto load_channels = [&](const float* tensor, float absent, int64_t k) {
    if (tensor == nullptr || k >= count) return Value::broadcast(absent);
    if (k + kWidth <= count) return Value::load(tensor + channel + k);
    return Value::load(tensor + channel + k, count - k);
  };
  const Value::Register zero = Value::broadcast(0), one = Value::broadcast(1);
  for (int64_t k = 0; k < kTileBlockK; k += kWidth) {
    const Value::Register deviation =
        square_root(load_channels(conv.norm.var, 1.0f, k) + Value::broadcast(conv.norm.eps));
    const Value::Register a = load_channels(conv.norm.weight, 1.0f, k) / deviation;
    const Value::Register own = load_channels(conv.bias, 0.0f, k);
    const Value::Register finite = Value::where_equal(a - a, zero, one);
    const Value::Register centre =
        Value::where_equal(finite, one, own) - load_channels(conv.norm.mean, 0.0f, k);
    const Value::Register b =
        Value::multiply_add(centre, a, load_channels(conv.norm.bias, 0.0f, k));
    Value::store(scale + k, a);
    Value::store(shift + k, b);
    Value::store(bias + k, Value::where_equal(finite, zero, own));
  }
  bool found = false;
  for (int64_t k = 0; k < count; ++k) found |= bias[k] != 0.0f;
  return found;
}

// Whole vectors of channels, kN times 16.
template <int kN, bool kResidual>
void finish(const Epilogue& e, const Product& product, const float* sums, const Position* positions,
            int64_t first, int64_t count) {
  constexpr int kVectors = kN * 16 / kWidth;
  Value::Register scale[kVectors], shift[kVectors];
  FR_FOR (v, kVectors) {
    scale[v] = Value::load(e.scale + v * kWidth);
    shift[v] = Value::load(e.shift + v * kWidth);
  }
  sums += first * kTileBlockK;
  for (int64_t i = first; i < first + count; ++i, sums += kTileBlockK) {
    const Position& position = positions[i];
    if (position.out < 0) continue;
    Value::Register y[kVectors];
    load_sums<kN>(product, i, sums, y);
    FR_FOR (v, kVectors) {
      y[v] = Value::multiply_add(y[v], scale[v], shift[v]);
      if constexpr (kResidual) {
        y[v] = Value::add(y[v], load(e.residual + position.res + v * kWidth));
      }
      if (e.relu) y[v] = Value::relu(y[v]);
    }
    if (is_other(e.act)) activate_results<kVectors>(e.act, y);
    store_results<kN>(e.output + position.out, y);
  }
}

// Any strides and any number of channels.
template <int kN>
__attribute__((noinline)) void finish_strided(const Epilogue& e, const Product& product,
                                              const float* sums, const Position* positions,
                                              int64_t first, int64_t count) {
  constexpr int kVectors = kN * 16 / kWidth;
  alignas(64) Storage residual[kTileBlockK], result[kTileBlockK];
  // -0: adding it changes nothing.
  for (int k = 0; k < kTileBlockK; k += kWidth) store(residual + k, Value::broadcast(-0.0f));
  sums += first * kTileBlockK;
  for (int64_t i = first; i < first + count; ++i, sums += kTileBlockK) {
    const Position& position = positions[i];
    if (position.out < 0) continue;
    for (int64_t k = e.res_begin; k < e.res_end; ++k) {
      residual[k] = e.residual[position.res + (k - e.res_begin) * e.res_channel];
    }
    Value::Register y[kVectors];
    load_sums<kN>(product, i, sums, y);
    FR_FOR (v, kVectors) {
      if (e.bias != nullptr) y[v] = Value::add(y[v], Value::load(e.bias + v * kWidth));
      y[v] = Value::multiply_add(y[v], Value::load(e.scale + v * kWidth),
                                 Value::load(e.shift + v * kWidth));
      y[v] = Value::add(y[v], load(residual + v * kWidth));
      if (e.relu) y[v] = Value::relu(y[v]);
    }
    if (is_other(e.act)) activate_results<kVectors>(e.act, y);
    store_results<kN>(result, y);
    Storage* out = e.output + position.out;
    if (e.out_channel == 1) {
      copy(out, result, e.channels);
    } else {
      for (int64_t k = 0; k < e.channels; ++k) out[k * e.out_channel] = result[k];
    }
  }
}

using Finish = void (*)(const Epilogue&, const Product&, const float*, const Position*, int64_t,
                        int64_t);

template <int kN>
Finish finish_for(const Epilogue& e) {
  const bool has_residual = e.res_begin < e.res_end;
  const bool whole = e.channels == kN * 16 && e.out_channel == 1 && e.bias == nullptr;
  if (whole && !has_residual) return finish<kN, false>;
  if (whole && e.res_channel == 1 && e.res_end - e.res_begin == e.channels) return finish<kN, true>;
  return finish_strided<kN>;
}

// The sums of a block whose product is through. They are finished while the next block's product
// runs, a few pixels with every step: the unit would stand still meanwhile, and that for longer
// than the product takes where the reduction is short.
struct Pending {
  Finish finish;
  Epilogue epilogue;
  Product product;
  const float* sums;
  const Position* positions;
  int64_t first = 0, pixels = 0;

  FR_INLINE void take(int64_t count) {
    count = least(count, pixels);
    finish(epilogue, product, sums, positions, first, count);
    first += count;
    pixels -= count;
  }
};

// One instruction for each of kM tiles of pixels and kN of output channels, with what is loaded for
// it.
template <int kM, int kN, bool kPixels, bool kWeights>
FR_INLINE void multiply_step(const char* in0, int64_t stride0, const char* in1, int64_t stride1,
                             const char* weight) {
  if constexpr (kWeights) load_weights<0>(weight);
  if constexpr (kPixels) load_pixels<0>(in0, stride0);
  multiply_add<0, 0>();
  if constexpr (kN == 2) {
    if constexpr (kWeights) load_weights<1>(weight + kTileBytes);
    multiply_add<0, 1>();
  }
  if constexpr (kM == 2) {
    if constexpr (kPixels) load_pixels<1>(in1, stride1);
    multiply_add<1, 0>();
    if constexpr (kN == 2) multiply_add<1, 1>();
  }
}

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

// The first parts of kM tiles of pixels times the weights that are loaded in that place.
template <int kM, int j>
FR_INLINE void multiply_tiles_by(const Product& product, int64_t offset, Index<j>) {
  const Tile* tiles = product.tiles;
  load_pixels<0>(tiles[0].in + offset, tiles[0].stride);
  multiply_add_to<0, 0, j>();
  if constexpr (kM > 1) {
    load_pixels<1>(tiles[1].in + offset, tiles[1].stride);
    multiply_add_to<1, 1, j>();
  }
  if constexpr (kM > 2) {
    load_pixels<0>(tiles[2].in + offset, tiles[2].stride);
    multiply_add_to<2, 0, j>();
  }
  if constexpr (kM > 3) {
    load_pixels<1>(tiles[3].in + offset, tiles[3].stride);
    multiply_add_to<3, 1, j>();
  }
}

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Sums of kM tiles of pixels times kN of output channels, to [pixel][32]. After every few products
// a share of what is pending.
template <int kM, int kN>
void multiply(const Product& product, float* sums, Pending& pending) {
  constexpr int64_t kProducts = kParts * (kParts + 1) / 2;
  const int64_t share = div_up(pending.pixels, product.chunks * product.taps * kProducts);
  const char *in0 = product.tiles[0].in, *in1 = product.tiles[kM - 1].in;
  const int64_t stride0 = product.tiles[0].stride, stride1 = product.tiles[kM - 1].stride;
  const char *prefetch = product.prefetch, *ahead = product.ahead, *weight = product.weight;
  const auto step = [&](auto pixels, auto weights, int64_t offset, const char* at) {
    multiply_step<kM, kN, pixels.value, weights.value>(in0 + offset, stride0, in1 + offset, stride1,
                                                       at);
    if (pending.pixels > 0) pending.take(share);
  };
  const Constant<true> load;
  const Constant<false> keep;
  // What was gathered has been stored: the compiler does not know that tiles are loaded from
  // memory.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  zero_sums();
  for (int64_t chunk = 0; chunk < product.chunks; ++chunk) {
    for (int64_t tap = 0; tap < product.taps; ++tap, weight += kParts * kPartBytes) {
      const int64_t offset = product.offsets[tap] + chunk * product.chunk;
      if constexpr (kParts == 1) {
        step(load, load, offset, weight);
      } else if constexpr (kParts == 2) {
        step(load, load, offset, weight + kPartBytes);
        step(keep, load, offset, weight);
        step(load, keep, offset + product.part, nullptr);
      } else {
        step(load, load, offset, weight + 2 * kPartBytes);
        step(keep, load, offset, weight + kPartBytes);
        step(load, keep, offset + product.part, nullptr);
        step(keep, load, offset, weight);
        step(load, keep, offset + 2 * product.part, nullptr);
      }
      for (int64_t i = 0; i < product.lines; ++i, prefetch += kLine) {
        __builtin_prefetch(prefetch, 0, 2);
      }
      for (int64_t i = 0; i < product.ahead_lines; ++i, ahead += kLine) {
        __builtin_prefetch(ahead, 0, 2);
      }
    }
  }
  if constexpr (kParts == 3) {
    weight = product.weight;
    for (int64_t chunk = 0; chunk < product.chunks; ++chunk) {
      for (int64_t tap = 0; tap < product.taps; ++tap, weight += kParts * kPartBytes) {
        step(load, load, product.offsets[tap] + chunk * product.chunk, weight);
      }
    }
  }
  constexpr int64_t kRow = kTileBlockK * 4;
  store_sums<0, 0>(sums, kRow);
  if constexpr (kN == 2) store_sums<0, 1>(sums + 16, kRow);
  if constexpr (kM == 2) {
    store_sums<1, 0>(sums + kTileRows * kTileBlockK, kRow);
    if constexpr (kN == 2) store_sums<1, 1>(sums + kTileRows * kTileBlockK + 16, kRow);
  }
}

// Half the rows of one step's weights in parts, from the `begin`-th pair of these on: tiles of the
// parts, one after another.
FR_INLINE void split_step(const WeightRows& rows, int64_t chunk, int64_t tap, int64_t half,
                          int64_t begin, int64_t end, Part* to) {
  constexpr int kVectors = 16 / kWidth;
  Value::Register x[2 * kVectors];
  for (int64_t i = begin; i < end; ++i) {
    load_half(rows.at(chunk, tap, i, half), x);
    load_half(rows.at(chunk, tap, i + kTileDepth / 2, half), x + kVectors);
    split<kParts, true>(to + i * kTileDepth, kTileBytes / 2, x);
  }
}

// The chunk and tap of a step.
struct Step {
  int64_t chunk = 0, tap = 0;

  FR_INLINE void advance(int64_t taps) {
    if (++tap < taps) return;
    tap = 0;
    ++chunk;
  }
};

// Sums of kM tiles of pixels times a block of output channels, to [pixel][32]: first one half of
// the channels, then the other. The parts of a half's weights, [step][part][tile], go to `parts`
// one step ahead of the products, and what will be split is asked for some steps before. Then come
// the large products, of the first parts that are there.
template <int kM>
void multiply_few(const Product& product, int64_t halves, char* parts, float* sums,
                  Pending& pending) {
  constexpr int64_t kAhead = 4, kStepBytes = kParts * kTileBytes, kPairs = kTileDepth / 2;
  const int64_t steps = product.chunks * product.taps;
  const int64_t share = div_up(pending.pixels, steps * halves);
  const char* ahead = product.ahead;
  for (int64_t half = 0; half < halves; ++half) {
    const auto step_parts = [&](int64_t i) { return parts + i * kStepBytes; };
    Step now, coming, asked;
    split_step(product.rows, 0, 0, half, 0, kPairs, reinterpret_cast<Part*>(parts));
    for (int64_t i = 0; i < least(kAhead, steps); ++i) asked.advance(product.taps);
    zero_sums();
    for (int64_t i = 0; i < steps; ++i) {
      coming = now;
      coming.advance(product.taps);
      const bool has_next = i + 1 < steps, has_asked = i + kAhead < steps;
      const char* const weight = step_parts(i);
      Part* const next = reinterpret_cast<Part*>(step_parts(i + 1));
      const int64_t offset = product.offsets[now.tap] + now.chunk * product.chunk;
      // A part of the split after each tile's products, which take the unit longer.
      const auto meanwhile = [&](int64_t begin, int64_t end) {
        if (has_next) split_step(product.rows, coming.chunk, coming.tap, half, begin, end, next);
        for (int64_t j = begin; j < end && has_asked; ++j) {
          const float* const line = product.rows.at(asked.chunk, asked.tap, j, half);
          const float* const other = product.rows.at(asked.chunk, asked.tap, j + kPairs, half);
          if (line != nullptr) __builtin_prefetch(line, 0, 2);
          if (other != nullptr) __builtin_prefetch(other, 0, 2);
        }
      };
      __atomic_signal_fence(__ATOMIC_SEQ_CST);
      // A sum's products in the order of `multiply`: how many tiles a task has depends on the
      // threads.
      load_weights<1>(weight + 2 * kTileBytes);
      multiply_tiles_by<kM>(product, offset, Index<1>{});
      load_weights<0>(weight);
      load_weights<1>(weight + kTileBytes);
      const auto multiply_small = [&](auto tile) {
        constexpr int m = decltype(tile)::value;
        if constexpr (m < kM) {
          const Tile& pixels = product.tiles[m];
          load_pixels<0>(pixels.in + offset, pixels.stride);
          multiply_add_to<m, 0, 1>();
          load_pixels<1>(pixels.in + offset + product.part, pixels.stride);
          multiply_add_to<m, 1, 1>();
          multiply_add_to<m, 1, 0>();
          load_pixels<0>(pixels.in + offset + 2 * product.part, pixels.stride);
          multiply_add_to<m, 0, 0>();
          meanwhile(kPairs * m / kM, kPairs * (m + 1) / kM);
        }
      };
      multiply_small(Index<0>{});
      multiply_small(Index<1>{});
      multiply_small(Index<2>{});
      multiply_small(Index<3>{});
      if (pending.pixels > 0) pending.take(share);
      for (int64_t j = 0; j < product.ahead_lines && half == 0; ++j, ahead += kLine) {
        __builtin_prefetch(ahead, 0, 2);
      }
      now.advance(product.taps);
      asked.advance(product.taps);
    }
    now = {};
    for (int64_t i = 0; i < steps; ++i, now.advance(product.taps)) {
      load_weights<0>(step_parts(i));
      multiply_tiles_by<kM>(product, product.offsets[now.tap] + now.chunk * product.chunk,
                            Index<0>{});
    }
    constexpr int64_t kRow = kTileBlockK * 4, kTile = kTileRows * kTileBlockK;
    float* const to = sums + half * 16;
    store_sums<0, 0>(to, kRow);
    if constexpr (kM > 1) store_sums<0, 1>(to + kTile, kRow);
    if constexpr (kM > 2) store_sums<1, 0>(to + 2 * kTile, kRow);
    if constexpr (kM > 3) store_sums<1, 1>(to + 3 * kTile, kRow);
  }
}

using MultiplyFew = void (*)(const Product&, int64_t, char*, float*, Pending&);

// The one for so many tiles, in a kernel that has it.
template <bool kHas>
MultiplyFew few_multiplier(int64_t tiles) {
  if constexpr (kHas) {
    constexpr MultiplyFew kAll[] = {multiply_few<1>, multiply_few<2>, multiply_few<3>,
                                    multiply_few<4>};
    return kAll[tiles - 1];
  }
  return nullptr;
}

// Lines that finish() will read and write: they come from further away than the second-level cache.
FR_INLINE void prefetch_results(const Epilogue& e, const Position* positions, int64_t count) {
  if (e.out_channel != 1) return;
  const bool residual = e.residual != nullptr && e.res_channel == 1;
  for (int64_t i = 0; i < count; ++i) {
    if (positions[i].out < 0) continue;
    __builtin_prefetch(e.output + positions[i].out, 1);
    if (residual) __builtin_prefetch(e.residual + positions[i].res);
  }
}

// ---- a task ------------------------------------------------------------------------------------

// What products bring into the second-level cache meanwhile: ranges of memory, in equal shares.
class Coming {
 public:
  void add(const void* begin, int64_t bytes) {
    if (bytes <= 0) return;
    const char* first = static_cast<const char*>(begin);
    ranges_[count_++] = {first, first + bytes};
    lines_ += div_up(bytes, kLine);
  }
  void add(const Storage* begin, const Storage* end) { add(begin, (end - begin) * kItem); }

  // From here on each of so many products takes a share.
  void divide(int64_t products) { share_ = div_up(lines_, most(products, 1)); }

  // One share, as far as it is in one piece, for a product of so many steps: where it begins, and
  // the lines for each of these.
  void take(int64_t steps, const char*& begin, int64_t& lines) {
    for (; current_ < count_; ++current_) {
      Range& range = ranges_[current_];
      if (range.next >= range.end) continue;
      begin = range.next;
      lines = div_up(least(share_, div_up(range.end - range.next, kLine)), steps);
      range.next += lines * steps * kLine;
      return;
    }
  }

 private:
  struct Range {
    const char *next, *end;
  };
  Range ranges_[4];
  int count_ = 0, current_ = 0;
  int64_t lines_ = 0, share_ = 0;
};

// The range from the first to the last of the positions' pixels in a tensor whose pixels follow
// each other.
FR_INLINE void add_pixels(Coming& coming, const Storage* tensor, int64_t Position::* offset,
                          const Position* positions, int64_t count, int64_t channels) {
  int64_t first = 0, last = count - 1;
  while (first < last && positions[first].out < 0) ++first;
  while (last > first && positions[last].out < 0) --last;
  const int64_t begin = positions[first].*offset, end = positions[last].*offset + channels;
  // Positions that are not in order, or of several images.
  if (begin < 0 || end - begin > count * channels || end <= begin) return;
  coming.add(tensor + begin, tensor + end);
}

// The beginning of a thread's share of the next layer's weights. Threads that divide the output
// channels among them do so in the next layer too.
void add_next_layer(Coming& coming, const Conv& conv, const Task& task, int64_t blocks) {
  if (conv.next_weight == nullptr) return;
  const int64_t begin = conv.next_weight_bytes * task.block_begin / blocks / kLine * kLine;
  const int64_t end = conv.next_weight_bytes * task.block_end / blocks;
  coming.add(static_cast<const char*>(conv.next_weight) + begin,
             least(end - begin, task.ahead_bytes));
}

// All tiles against all blocks of output channels of the task.
void multiply_tiles(const Conv& conv, const Task& task, const Layout& layout,
                    const Scratch& scratch, const TileList& list, Epilogue e) {
  for (int64_t r = 0; r < layout.h.taps && !layout.weight.dense; ++r) {
    for (int64_t s = 0; s < layout.w.taps; ++s) {
      scratch.offsets[r * layout.w.taps + s] =
          (layout.h.plane(r) * layout.w.planes + layout.w.plane(s)) * scratch.plane +
          (layout.h.offset(r) * layout.pitch + layout.w.offset(s)) * layout.pixel;
    }
  }
  if (layout.taps() == 1) scratch.offsets[0] = 0;
  const int64_t channels = group_k(conv), blocks = layout.weight.blocks;
  const int64_t reduction = layout.weight.taps * layout.weight.C;
  const int64_t split_bytes = layout.weight.chunks * kParts * kPartBytes;
  const int64_t block_bytes =
      !kSplit ? tiled_block_size(layout.weight) * 2 : reduction * kTileBlockK * 4;
  // Packed blocks of 16 channels or of 32.
  const int64_t narrow = kSplit ? kTileBlockK / conv.weight_block : 1;
  const int64_t group_bytes =
      !kSplit ? blocks * block_bytes : div_up(channels, conv.weight_block) * block_bytes / narrow;
  WeightRows rows{nullptr,   kTileBlockK / narrow, narrow == 1 ? 16 : reduction * 16,
                  true,      layout.weight.taps,   layout.weight.C,
                  reduction, layout.weight.dense};
  auto valid = [&](int64_t block) { return least(kTileBlockK, channels - block * kTileBlockK); };
  bool has_bias = false;
  for (int64_t block = task.block_begin; block < task.block_end; ++block) {
    const int64_t at = (block - task.block_begin) * kTileBlockK;
    has_bias |= scale_and_shift(conv, task.group * channels + block * kTileBlockK, valid(block),
                                scratch.scale + at, scratch.shift + at, scratch.bias + at);
  }
  const Epilogue base = e;
  // Either the pixels of one block take all blocks of output channels in turn, or, with weights
  // that do not stay in the cache, each block of these takes all pixels.
  const bool pixels_first = conv.keeps_weight;
  Pending pending;
  float* sums = scratch.sums;
  const int64_t turn = pixels_first && list.count > kFewTiles ? 2 : list.count;
  const int64_t task_blocks = task.block_end - task.block_begin;
  // The next layer's weights come while memory would have nothing to do: when all of this one's are
  // here, and where these are streamed to the end with the last of them.
  Coming ahead;
  add_next_layer(ahead, conv, task, blocks);
  const int64_t ahead_turn = pixels_first && list.count > turn ? turn : 0;
  const int64_t ahead_block = pixels_first ? task.block_begin : task.block_end - 2;
  ahead.divide(div_up(list.count - ahead_turn, 2) *
               (task.block_end - most(ahead_block, task.block_begin)));
  for (int64_t begin = 0; begin < list.count; begin += turn) {
    const int64_t end = least(begin + turn, list.count), products = (end - begin + 1) / 2;
    Coming pixels;
    if (pixels_first && end < list.count) {
      const int64_t count = least(turn, list.count - end) * kTileRows;
      const Position* next = list.positions + end * kTileRows;
      if (layout.form == Form::kInPlace && conv.in.w == conv.C) {
        pixels.add(list.tiles[end].in, count * conv.in.w * 2);
      }
      if (base.residual != nullptr && base.res_channel == 1 && conv.res.w == conv.K) {
        add_pixels(pixels, base.residual, &Position::res, next, count, conv.K);
      }
      if (base.out_channel == 1) {
        add_pixels(pixels, base.output, &Position::out, next, count, conv.K);
      }
      pixels.divide(task_blocks);
    }
    for (int64_t block = task.block_begin; block < task.block_end; ++block) {
      const int64_t channel = task.group * channels + block * kTileBlockK;
      const int64_t at = (block - task.block_begin) * kTileBlockK;
      e.scale = scratch.scale + at;
      e.shift = scratch.shift + at;
      e.bias = has_bias ? scratch.bias + at : nullptr;
      e.output = base.output + channel * base.out_channel;
      e.channels = valid(block);
      // The block's first channel as the residual counts them.
      const int64_t first = channel - conv.res_skip;
      e.res_begin = first < 0 ? -first : 0;
      e.res_end = least(conv.res_channels - first, e.channels);
      if (base.residual == nullptr || e.res_begin >= e.res_end) e.res_begin = e.res_end = 0;
      e.residual = e.res_begin < e.res_end
                       ? base.residual + (first < 0 ? 0 : first) * base.res_channel
                       : nullptr;
      const char* weight =
          static_cast<const char*>(conv.weight) + task.group * group_bytes + block * block_bytes;
      // While the first pixels of a block are multiplied the next block's weights are asked for.
      Coming weights;
      if (begin == 0 && block + 1 < task.block_end) {
        weights.add(weight + block_bytes, block_bytes);
      }
      weights.divide(products);
      if constexpr (kSplit) {
        rows.first = reinterpret_cast<const float*>(weight);
        rows.has_both = narrow == 1 || e.channels > 16;
        weight = scratch.weights + (conv.keeps_weight ? block - task.block_begin : 0) * split_bytes;
        if (begin == 0 && list.count > kFewTiles) {
          split_weights(rows, layout.chunks, layout.taps(), const_cast<char*>(weight));
        }
      }
      const Finish finish = e.channels > 16 ? finish_for<2>(e) : finish_for<1>(e);
      if (list.count <= kFewTiles) {
        Product product{list.tiles + begin,
                        weight,
                        rows,
                        layout.taps(),
                        layout.chunks,
                        scratch.offsets,
                        scratch.part,
                        scratch.chunk,
                        nullptr,
                        0,
                        nullptr,
                        0};
        if (block >= ahead_block) {
          ahead.take(layout.weight.chunks, product.ahead, product.ahead_lines);
        }
        prefetch_results(e, list.positions, list.count * kTileRows);
        few_multiplier<(kFewTiles > 0)>(list.count)(product, e.channels > 16 ? 2 : 1,
                                                    scratch.weights, sums, pending);
        pending = {finish, e, product, sums, list.positions, 0, list.count * kTileRows};
        sums = sums == scratch.sums ? scratch.sums + kTaskSums : scratch.sums;
        continue;
      }
      for (int64_t t = begin; t < end; t += 2) {
        Product product{list.tiles + t, weight,
                        rows,           layout.taps(),
                        layout.chunks,  scratch.offsets,
                        scratch.part,   scratch.chunk,
                        nullptr,        0,
                        nullptr,        0};
        const int64_t steps = layout.weight.chunks;
        weights.take(steps, product.prefetch, product.lines);
        if (product.lines == 0) pixels.take(steps, product.prefetch, product.lines);
        if (begin >= ahead_turn && block >= ahead_block) {
          ahead.take(steps, product.ahead, product.ahead_lines);
        }
        const Position* positions = list.positions + t * kTileRows;
        const bool pair = t + 1 < end;
        if (!pixels_first) prefetch_results(e, positions, pair ? 2 * kTileRows : kTileRows);
        if (e.channels > 16) {
          (pair ? multiply<2, 2> : multiply<1, 2>)(product, sums, pending);
        } else {
          (pair ? multiply<2, 1> : multiply<1, 1>)(product, sums, pending);
        }
        pending = {finish, e, product, sums, positions, 0, pair ? 2 * kTileRows : kTileRows};
        sums = sums == scratch.sums ? scratch.sums + kTaskSums : scratch.sums;
      }
    }
  }
  pending.take(pending.pixels);
}

void run_conv(const Conv& conv, const Task& task, const Layout& layout, void* memory) {
  const Scratch scratch(conv, task, layout, memory);
  TileList list{scratch.tiles, scratch.positions};
  int64_t slab_row = 0;
  for (int64_t row = task.row_begin; row < task.row_end;) {
    const int64_t n = row / conv.P, p = row % conv.P;
    const int64_t count = least(conv.P - p, task.row_end - row);
    add_rows(conv, task, layout, scratch, n, p, p + count, conv.out,
             n * conv.out.n + p * conv.out.h, slab_row, list);
    row += count;
  }
  Epilogue e{};
  e.relu = is_relu(conv.act);
  e.act = conv.act;
  e.output = static_cast<Storage*>(conv.output);
  e.residual = static_cast<const Storage*>(conv.residual);
  e.out_channel = conv.out.c;
  e.res_channel = conv.res.c;
  multiply_tiles(conv, task, layout, scratch, list, e);
}

// ---- pool --------------------------------------------------------------------------------------

// Maximum over one window of convolution outputs; a NaN anywhere in it is the result. Rounding
// before the maximum instead of behind it does not change it.
void pool_pixel(const Storage* rows, int64_t row_pitch, int64_t h_count, int64_t w_count, int64_t K,
                Storage* out, int64_t out_channel) {
  auto largest = [&](auto load_at) {
    Value::Register best = load_at(rows);
    for (int64_t h = 0; h < h_count; ++h) {
      for (int64_t w = 0; w < w_count; ++w) {
        const Value::Register x = load_at(rows + h * row_pitch + w * K);
        best = Value::where_exceeds(x, best, x, best);
      }
    }
    return best;
  };
  alignas(64) Storage result[kWidth];
  for (int64_t k = 0; k < K; k += kWidth, rows += kWidth) {
    const int64_t rest = K - k;
    if (rest >= kWidth && out_channel == 1) {
      store(out + k, largest([](const Storage* p) { return load(p); }));
      continue;
    }
    const int64_t count = least(rest, kWidth);
    store(result, largest([&](const Storage* p) { return load(p, count); }), count);
    for (int64_t i = 0; i < count; ++i) out[(k + i) * out_channel] = result[i];
  }
}

// The stem: convolution rows go to scratch memory and leave it pooled.
void run_conv_pool(const Conv& conv, const Task& task, const Layout& layout, void* memory) {
  const MaxPool& pool = conv.pool;
  const Scratch scratch(conv, task, layout, memory);
  const int64_t row_pitch = conv.Q * conv.K;
  for (int64_t row = task.row_begin; row < task.row_end;) {
    const int64_t n = row / pool.P, p = row % pool.P;
    const int64_t count = least(pool.P - p, task.row_end - row);
    const int64_t h_begin = most(p * pool.stride_h - pool.pad_h, 0);
    const int64_t h_end =
        least((p + count - 1) * pool.stride_h - pool.pad_h + pool.kernel_h, conv.P);

    TileList list{scratch.tiles, scratch.positions};
    int64_t slab_row = 0;
    add_rows(conv, task, layout, scratch, n, h_begin, h_end, {0, 1, row_pitch, conv.K}, 0, slab_row,
             list);
    Epilogue e{};
    e.relu = is_relu(conv.act);
    e.act = conv.act;
    e.output = scratch.conv_rows;
    e.out_channel = 1;
    multiply_tiles(conv, task, layout, scratch, list, e);

    for (int64_t i = p; i < p + count; ++i) {
      const int64_t h0 = most(i * pool.stride_h - pool.pad_h, 0);
      const int64_t h1 = least(i * pool.stride_h - pool.pad_h + pool.kernel_h, conv.P);
      for (int64_t j = 0; j < pool.Q; ++j) {
        const int64_t w0 = most(j * pool.stride_w - pool.pad_w, 0);
        const int64_t w1 = least(j * pool.stride_w - pool.pad_w + pool.kernel_w, conv.Q);
        Storage* out =
            static_cast<Storage*>(conv.output) + n * conv.out.n + i * conv.out.h + j * conv.out.w;
        pool_pixel(scratch.conv_rows + (h0 - h_begin) * row_pitch + w0 * conv.K, row_pitch, h1 - h0,
                   w1 - w0, conv.K, out, conv.out.c);
      }
    }
    row += count;
  }
}

void run(const Conv& conv, const Task& task, void* memory) {
  const TileState state;
  const Layout layout(conv);
  if (conv.has_pool) {
    run_conv_pool(conv, task, layout, memory);
  } else {
    run_conv(conv, task, layout, memory);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
