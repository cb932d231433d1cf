// One task of a gradient in a weight (weight_gradient.h) on a unit that multiplies tiles, or in
// vectors that multiply pairs, for the including file, which defines Element, Storage and kParts as
// for conv_tiles.inl, includes one of transposed_tiles_avx512.h and transposed_tiles_emulated.h,
// with
//   pair_rows(), transpose_rows()  tiles of the two factors, of pixels as they lie in memory
//   transpose_block()              32 x 32 float32
//   has_nonfinite()                of vectors
// beside what tiles_amx.h and tiles_emulated.h have, and ends with the exported WeightGradientIsa.
// Where it defines FR_PAIRS the product of tiles is that of pairs_avx512bf16.h or
// pairs_emulated.h:
//   multiply_pairs()               rows of two tiles by columns of two, over all steps
// No standard header beyond <cstdint> may be included here.
//
// A block is 32 channels of one tensor by 32 of the other for one tap, 2 x 2 tiles of sums. A step
// of its product takes 32 pixels: pixels are the reduction here, so that neither tensor is tiles as
// it lies in memory. A factor's tiles are made once for all blocks of the other's channels, and for
// all taps:
//
// - Rows: a tile's row is 32 pixels of one channel, a transposition. The tiles of 32 channels are
//   made when their blocks come, and stay in the first-level cache.
// - Columns, of all channels of the task: pairs of pixels, channel by channel. The pixels of a pair
//   are 16 apart. With several taps every pixel begins a pair and ends another, twice the bytes, so
//   that a tile may begin with any pixel; each tap is a constant offset then, as in the slab of
//   conv_tiles.inl, by which positions are laid out.
//
// Pixels that no output belongs to are rows' zeros, whatever the columns have there. That is NaN
// where they have an infinity: a sum that is not finite is taken again in float32, without padding,
// and in parts one that is small as well, for conv_tiles.inl's reasons.
//
// A chunk's sums begin at zero and are added to those of the chunks before beside the next block's
// product. float32 in parts takes small products first, as convolutions do.
//
// Memory traffic: both tensors once for each task, in chunks that fit the caches.
//
// Reading order: layout -> factors -> product -> result -> task.

#include "cpu/conv_axis.h"

namespace fused_resnet::cpu {
namespace {

#define FR_INLINE inline __attribute__((always_inline))
// An unrolled loop.
#define FR_FOR(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); ++i)

constexpr int kWidth = Value::width;
constexpr int64_t kBlock = 32;  // channels of a block, in both directions
constexpr int64_t kLag = 16;    // between the pixels of a pair
constexpr int64_t kStep = kTileDepth;

using Part = uint16_t;

FR_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
FR_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
FR_INLINE Element::Register load(const Storage* p) {
  return Element::load(reinterpret_cast<const Element::Element*>(p));
}
FR_INLINE Element::Register load(const Storage* p, int64_t count) {
  return Element::load(reinterpret_cast<const Element::Element*>(p), count);
}
FR_INLINE float load_one(const Storage* p) {
  float lanes[kWidth];
  Value::store(lanes, load(p, 1));
  return lanes[0];
}

// ---- layout ------------------------------------------------------------------------------------

// A tensor as a factor: the channels of its blocks, `channels` of a group.
struct Factor {
  const Storage* data;
  Strides strides;
  int64_t channels;
};

Factor grad_of(const WeightGradient& g) {
  return {static_cast<const Storage*>(g.grad), g.grad_strides, g.K / g.groups};
}
Factor input_of(const WeightGradient& g) {
  return {static_cast<const Storage*>(g.input), g.in_strides, g.C / g.groups};
}

// Positions of a chunk: its images one after another, each with so many rows of outputs, `pitch`
// positions each, and planes of columns' pixels for them.
struct Layout {
  Axis h, w;
  int64_t pitch, planes;
  bool overlap;   // whether columns' tiles may begin with any pixel
  int64_t rows;   // of an image in a chunk
  int64_t steps;  // of an image
  int64_t plane;  // columns' rows of tiles in a plane
  int64_t image;  // and of an image

  Layout(const WeightGradient& g)
      : h(g.stride_h, g.dil_h, g.pad_h, g.R), w(g.stride_w, g.dil_w, g.pad_w, g.S) {
    pitch = g.Q + w.reach() - w.shared(g.Q, g.W);
    planes = h.planes * w.planes;
    overlap = g.R * g.S > 1;
    rows = g.chunk_rows;
    steps = div_up(rows * pitch, kStep);
    plane = overlap ? steps * kStep + h.reach() * pitch + w.reach() : steps * kLag;
    image = planes * plane;
  }
  // Positions in a plane that pairs are made of.
  int64_t positions() const { return overlap ? plane + kLag : steps * kStep; }
  // The row of tiles that begins with a position.
  int64_t first_row(int64_t step) const { return step * (overlap ? kStep : kLag); }
  int64_t tap_row(int64_t r, int64_t s) const {
    return (h.plane(r) * w.planes + w.plane(s)) * plane + h.offset(r) * pitch + w.offset(s);
  }
};

constexpr int64_t kRowBytes = 64;  // of a tile
constexpr int64_t kStepBytes = 2 * kParts * kTileBytes;

// Scratch memory of a task: [element offset of rows' pixel][of columns' pixel][row of columns'
// tiles for each step][offset of each tap][zeros][32 pixels of rows][a plane of columns' pixels, 32
// channels][rows' tiles][columns' tiles][sums of two blocks][sums of the blocks of 32 rows].
struct Scratch {
  int64_t *row_pixels, *column_pixels, *steps, *taps;
  Storage *zeros, *few, *plane;
  char *rows, *columns;
  float *sums, *blocks;
  // Bytes of the columns' tiles from a part to the next, from a half of a block, from a block.
  int64_t part, half, block;
  int64_t bytes;

  Scratch(const WeightGradient& g, const GradientTask& task, const Layout& layout, void* memory) {
    char* next = static_cast<char*>(memory);
    auto take = [&](int64_t size) {
      char* taken = next;
      next += round_up(size, 64);
      return taken;
    };
    const int64_t images = g.chunk_images, count = images * layout.steps;
    const int64_t item = sizeof(Storage), word = sizeof(int64_t);
    row_pixels = reinterpret_cast<int64_t*>(take(count * kStep * word));
    column_pixels =
        reinterpret_cast<int64_t*>(take(images * layout.planes * layout.positions() * word));
    steps = reinterpret_cast<int64_t*>(take(count * word));
    taps = reinterpret_cast<int64_t*>(take(g.R * g.S * word));
    zeros = reinterpret_cast<Storage*>(take(kBlock * item));
    few = reinterpret_cast<Storage*>(take(kStep * kBlock * item));
    plane = reinterpret_cast<Storage*>(take(layout.positions() * kBlock * item));
    rows = take(count * kStepBytes);
    // An odd number of lines: streams a power of two apart would share few sets of the cache.
    part = (images * layout.image | 1) * kRowBytes;
    half = kParts * part;
    block = 2 * half;
    columns = take((task.column_end - task.column_begin) * block);
    sums = reinterpret_cast<float*>(take(2 * kGradientBlock * 4));
    const int64_t kept = (task.column_end - task.column_begin) * g.R * g.S;
    blocks = reinterpret_cast<float*>(take(g.sums == nullptr ? kept * kGradientBlock * 4 : 0));
    bytes = next - static_cast<char*>(memory);
  }
};

int64_t scratch_bytes(const WeightGradient& g, const GradientTask& task) {
  return Scratch(g, task, Layout(g), nullptr).bytes;
}

int64_t slab_bytes(const WeightGradient& g) {
  return 2 * kParts * g.chunk_images * Layout(g).image * kRowBytes;
}

// ---- factors -----------------------------------------------------------------------------------

// Which pixels a chunk has: rows [p_begin, p_end) of images [n_begin, n_end).
struct Chunk {
  int64_t n_begin, n_end, p_begin, p_end;

  Chunk(const WeightGradient& g, int64_t index) {
    const int64_t in_image = div_up(g.P, g.chunk_rows);
    n_begin = g.chunk_images == 1 ? index / in_image : index * g.chunk_images;
    n_end = least(g.N, n_begin + g.chunk_images);
    p_begin = g.chunk_images == 1 ? index % in_image * g.chunk_rows : 0;
    p_end = least(g.P, p_begin + g.chunk_rows);
  }
};

// Where the pixels are, as element offsets; -1: nowhere, zeros. Outputs':
void find_outputs(const WeightGradient& g, const Layout& layout, const Chunk& chunk,
                  const Strides& at, int64_t* to) {
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    int64_t* const end = to + layout.steps * kStep;
    for (int64_t p = chunk.p_begin; p < chunk.p_end; ++p) {
      const int64_t count = p + 1 == g.P ? g.last_q : g.Q, first = n * at.n + p * at.h;
      for (int64_t q = 0; q < layout.pitch; ++q) *to++ = q < count ? first + q * at.w : -1;
    }
    while (to < end) *to++ = -1;
  }
}

// and the input's, for every plane.
void find_inputs(const WeightGradient& g, const Layout& layout, const Chunk& chunk,
                 const Strides& at, int64_t* to) {
  for (int64_t n = chunk.n_begin; n < chunk.n_end; ++n) {
    for (int64_t plane = 0; plane < layout.planes; ++plane) {
      int64_t* const end = to + layout.positions();
      const int64_t first_h = layout.h.first_input(plane / layout.w.planes);
      const int64_t first_w = layout.w.first_input(plane % layout.w.planes);
      const int64_t rows = chunk.p_end - chunk.p_begin + layout.h.reach();
      for (int64_t y = 0; y < rows; ++y) {
        const int64_t h = (chunk.p_begin + y) * g.stride_h + first_h;
        const int64_t width = h < 0 || h >= g.H ? 0 : h + 1 == g.H ? g.last_w : g.W;
        const int64_t first = n * at.n + h * at.h;
        for (int64_t x = 0; x < layout.pitch; ++x) {
          const int64_t w = x * g.stride_w + first_w;
          *to++ = w >= 0 && w < width ? first + w * at.w : -1;
        }
      }
      while (to < end) *to++ = -1;
    }
  }
}

// The 32 channels of a block that pixels have.
struct Channels {
  const Storage* data;  // of the first
  int64_t stride, valid;

  Channels(const Factor& factor, int64_t group, int64_t block)
      : data(factor.data + (group * factor.channels + block * kBlock) * factor.strides.c),
        stride(factor.strides.c),
        valid(least(kBlock, factor.channels - block * kBlock)) {}
  bool in_place() const { return stride == 1 && valid == kBlock; }
  FR_INLINE void copy_to(Storage* to, int64_t pixel) const {
    for (int64_t c = 0; c < kBlock; ++c) {
      to[c] = pixel >= 0 && c < valid ? data[pixel + c * stride] : Storage{};
    }
  }
};

void make_rows(const Channels& channels, const int64_t* pixels, int64_t steps,
               const Scratch& scratch) {
  Part* to = reinterpret_cast<Part*>(scratch.rows);
  const Storage* rows[kStep];
  for (int64_t step = 0; step < steps; ++step, pixels += kStep, to += kStepBytes / 2) {
    for (int64_t i = 0; i < kStep; ++i) {
      rows[i] = scratch.few + i * kBlock;
      if (!channels.in_place()) {
        channels.copy_to(scratch.few + i * kBlock, pixels[i]);
      } else {
        rows[i] = pixels[i] < 0 ? scratch.zeros : channels.data + pixels[i];
      }
    }
    transpose_rows(to, kTileBytes / 2, kTileBytes, rows);
  }
}

// Blocks [begin, end), each `scratch.block` bytes after the one before.
void make_columns(const Factor& factor, int64_t group, int64_t begin, int64_t end,
                  const Layout& layout, int64_t images, const Scratch& scratch) {
  const int64_t half = scratch.half / 2, part = scratch.part / 2, row = kRowBytes / 2;
  const auto pair = [&](int64_t i) { return layout.overlap ? i : i / kLag * kStep + i % kLag; };
  const auto first_row = [&](int64_t block) {
    return reinterpret_cast<Part*>(scratch.columns + (block - begin) * scratch.block);
  };
  // All blocks of a pixel in turn, as they lie in memory,
  int64_t whole = begin;
  while (whole < end && Channels(factor, group, whole).in_place()) ++whole;
  const Storage* data = Channels(factor, group, begin).data;
  const int64_t* pixels = scratch.column_pixels;
  int64_t to = 0;
  for (int64_t plane = 0; plane < images * layout.planes && whole > begin; ++plane) {
    for (int64_t i = 0; i < layout.plane; ++i, to += row) {
      const int64_t first = pixels[pair(i)], second = pixels[pair(i) + kLag];
      const Storage* a = first < 0 ? scratch.zeros : data + first;
      const Storage* b = second < 0 ? scratch.zeros : data + second;
      const int64_t next_a = first < 0 ? 0 : kBlock, next_b = second < 0 ? 0 : kBlock;
      Part* at = first_row(begin) + to;
      for (int64_t block = begin; block < whole; ++block, a += next_a, b += next_b) {
        pair_rows(at, half, part, a, b);
        at += scratch.block / 2;
      }
    }
    pixels += layout.positions();
  }
  // but channels that lie apart, or are fewer, by way of a copy.
  for (int64_t block = whole; block < end; ++block) {
    const Channels channels(factor, group, block);
    Part* at = first_row(block);
    pixels = scratch.column_pixels;
    for (int64_t plane = 0; plane < images * layout.planes; ++plane) {
      for (int64_t i = 0; i < layout.positions(); ++i) {
        channels.copy_to(scratch.plane + i * kBlock, pixels[i]);
      }
      for (int64_t i = 0; i < layout.plane; ++i, at += row) {
        const Storage* a = scratch.plane + pair(i) * kBlock;
        pair_rows(at, half, part, a, a + kLag * kBlock);
      }
      pixels += layout.positions();
    }
  }
}

// ---- product -----------------------------------------------------------------------------------

// The sums of a block whose product is through, to be added to what is there already.
struct Pending {
  const float* from;
  float* to;
  bool first;  // nothing is there
  int64_t rows = 0;

  FR_INLINE void take(int64_t count) {
    for (count = least(count, rows), rows -= count; count > 0; --count) {
      FR_FOR (v, kBlock / kWidth) {
        const Value::Register x = Value::load(from + v * kWidth);
        Value::store(to + v * kWidth, first ? x : Value::add(Value::load(to + v * kWidth), x));
      }
      from += kBlock, to += kBlock;
    }
  }
};

struct Product {
  const char *rows, *columns;
  const int64_t* steps;
  int64_t count, part, half;
};

#ifdef FR_PAIRS
template <int kM, int kN>
void multiply(const Product& product, float* sums, Pending& pending) {
  pending.take(pending.rows);
  multiply_pairs<kM, kN>(product.rows, product.columns, product.steps, product.count, product.half,
                         sums);
}
#else
// Tiles of one part each.
template <int kM, int kN, bool kRows, bool kColumns>
FR_INLINE void multiply_step(const char* rows, const char* columns, int64_t half) {
  if constexpr (kColumns) load_weights<0>(columns);
  if constexpr (kRows) load_pixels<0>(rows, kRowBytes);
  multiply_add<0, 0>();
  if constexpr (kN == 2) {
    if constexpr (kColumns) load_weights<1>(columns + half);
    multiply_add<0, 1>();
  }
  if constexpr (kM == 2) {
    if constexpr (kRows) load_pixels<1>(rows + kTileBytes / 2 * 2, kRowBytes);
    multiply_add<1, 0>();
    if constexpr (kN == 2) multiply_add<1, 1>();
  }
}

template <int kM, int kN>
void multiply(const Product& product, float* sums, Pending& pending) {
  const int64_t share = div_up(pending.rows, product.count);
  const int64_t part = product.part, half = product.half;
  // The compiler does not know that tiles are loaded from what was stored.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  zero_sums();
  const char* rows = product.rows;
  for (int64_t i = 0; i < product.count; ++i, rows += kStepBytes) {
    const char* columns = product.columns + product.steps[i];
    if constexpr (kParts == 1) {
      multiply_step<kM, kN, true, true>(rows, columns, half);
    } else {
      multiply_step<kM, kN, true, true>(rows, columns + 2 * part, half);
      multiply_step<kM, kN, false, true>(rows, columns + part, half);
      multiply_step<kM, kN, true, false>(rows + 2 * kTileBytes, columns, half);
      multiply_step<kM, kN, false, true>(rows, columns, half);
      multiply_step<kM, kN, true, false>(rows + 4 * kTileBytes, columns, half);
    }
    if (pending.rows > 0) pending.take(share);
  }
  if constexpr (kParts > 1) {
    rows = product.rows;
    for (int64_t i = 0; i < product.count; ++i, rows += kStepBytes) {
      multiply_step<kM, kN, true, true>(rows, product.columns + product.steps[i], half);
    }
  }
  store_sums<0, 0>(sums, kBlock * 4);
  if constexpr (kN == 2) store_sums<0, 1>(sums + 16, kBlock * 4);
  if constexpr (kM == 2) {
    store_sums<1, 0>(sums + 16 * kBlock, kBlock * 4);
    if constexpr (kN == 2) store_sums<1, 1>(sums + 16 * kBlock + 16, kBlock * 4);
  }
}
#endif

// ---- result ------------------------------------------------------------------------------------

// Pixels whose products are summed in float32 when sums are taken again; these sums' are of
// float64.
constexpr int64_t kSummedAgain = 16;

// Of one channel of the rows' tensor, the sums with 32 of the columns'.
__attribute__((noinline)) void sum_again(const WeightGradient& g, const Channels& rows, int64_t row,
                                         const Channels& columns, int64_t r, int64_t s,
                                         float* sums) {
  constexpr int kVectors = kBlock / kWidth;
  alignas(64) Storage few[kBlock];
  alignas(64) float part[kBlock];
  double total[kBlock] = {};
  Value::Register sum[kVectors];
  int64_t summed = 0;
  const auto add_to_total = [&] {
    FR_FOR (v, kVectors) {
      Value::store(part + v * kWidth, sum[v]);
      sum[v] = Value::broadcast(0);
    }
    for (int64_t k = 0; k < kBlock; ++k) total[k] += part[k];
    summed = 0;
  };
  FR_FOR (v, kVectors) sum[v] = Value::broadcast(0);
  for (int64_t n = 0; n < g.N; ++n) {
    for (int64_t p = 0; p < g.P; ++p) {
      const int64_t h = p * g.stride_h + r * g.dil_h - g.pad_h;
      if (h < 0 || h >= g.H) continue;
      const int64_t width = h + 1 == g.H ? g.last_w : g.W, count = p + 1 == g.P ? g.last_q : g.Q;
      for (int64_t q = 0; q < count; ++q) {
        const int64_t w = q * g.stride_w + s * g.dil_w - g.pad_w;
        if (w < 0 || w >= width) continue;
        const int64_t out = n * g.grad_strides.n + p * g.grad_strides.h + q * g.grad_strides.w;
        const int64_t in = n * g.in_strides.n + h * g.in_strides.h + w * g.in_strides.w;
        const Storage* pixel = columns.data + (g.swapped ? out : in);
        if (!columns.in_place()) {
          columns.copy_to(few, g.swapped ? out : in);
          pixel = few;
        }
        const Value::Register x =
            Value::broadcast(load_one(rows.data + (g.swapped ? in : out) + row * rows.stride));
        FR_FOR (v, kVectors) sum[v] = Value::multiply_add(x, load(pixel + v * kWidth), sum[v]);
        if (++summed == kSummedAgain) add_to_total();
      }
    }
  }
  add_to_total();
  for (int64_t k = 0; k < kBlock; ++k) sums[k] = static_cast<float>(total[k]);
}

// The result of one block and tap, from its sums over each split, `next` floats apart.
void finish_block(const WeightGradient& g, int64_t group, int64_t row_block, int64_t column_block,
                  int64_t tap, const float* sums, int64_t next) {
  constexpr int kVectors = kBlock / kWidth;
  const Factor grad = grad_of(g), input = input_of(g);
  const Channels rows(g.swapped ? input : grad, group, row_block);
  const Channels columns(g.swapped ? grad : input, group, column_block);
  const int64_t r = tap / g.S, s = tap % g.S;
  alignas(64) float block[kGradientBlock], turned[kGradientBlock];
  for (int64_t row = 0; row < rows.valid; ++row) {
    Value::Register y[kVectors];
    FR_FOR (v, kVectors) y[v] = Value::load(sums + row * kBlock + v * kWidth);
    for (int64_t split = 1; split < g.splits; ++split) {
      const float* more = sums + split * next + row * kBlock;
      FR_FOR (v, kVectors) y[v] = Value::add(y[v], Value::load(more + v * kWidth));
    }
    // Half of a block has no sums, which are anything, where it has no channels.
    const bool again =
        columns.valid > 16
            ? (kParts > 1 ? is_doubtful<kVectors>(y) : has_nonfinite<kVectors>(y))
            : (kParts > 1 ? is_doubtful<kVectors / 2>(y) : has_nonfinite<kVectors / 2>(y));
    if (__builtin_expect(again, 0)) {
      sum_again(g, rows, row, columns, r, s, block + row * kBlock);
    } else {
      FR_FOR (v, kVectors) Value::store(block + row * kBlock + v * kWidth, y[v]);
    }
  }
  const float* from = block;
  if (g.swapped) {
    transpose_block(turned, block);
    from = turned;
  }
  const int64_t outputs = g.swapped ? columns.valid : rows.valid;
  const int64_t inputs = g.swapped ? rows.valid : columns.valid;
  const int64_t first_k = group * grad.channels + (g.swapped ? column_block : row_block) * kBlock;
  const int64_t first_c = (g.swapped ? row_block : column_block) * kBlock;
  Storage* out = static_cast<Storage*>(g.output) + first_k * g.out.n + first_c * g.out.c +
                 r * g.out.h + s * g.out.w;
  alignas(64) Storage few[kBlock];
  for (int64_t k = 0; k < outputs; ++k, from += kBlock, out += g.out.n) {
    Value::Register y[kVectors];
    FR_FOR (v, kVectors) y[v] = Value::load(from + v * kWidth);
    if (inputs == kBlock && g.out.c == 1) {
      store_block<2>(out, y);
      continue;
    }
    store_block<2>(few, y);
    for (int64_t c = 0; c < inputs; ++c) out[c * g.out.c] = few[c];
  }
}

void combine(const WeightGradient& g, int64_t group, int64_t row_block) {
  const int64_t taps = g.R * g.S, next = sums_offset(g, 1, 0, 0, 0);
  for (int64_t column = 0; column < column_blocks(g); ++column) {
    const float* sums = g.sums + sums_offset(g, 0, group, row_block, column);
    for (int64_t tap = 0; tap < taps; ++tap) {
      finish_block(g, group, row_block, column, tap, sums + tap * kGradientBlock, next);
    }
  }
}

// ---- a task ------------------------------------------------------------------------------------

void run(const WeightGradient& g, const GradientTask& task, void* memory) {
#ifndef FR_PAIRS
  const TileState state;
#endif
  const Layout layout(g);
  const Scratch scratch(g, task, layout, memory);
  const int64_t taps = g.R * g.S, row_bytes = kRowBytes;
  for (int64_t c = 0; c < kBlock; ++c) scratch.zeros[c] = Storage{};
  for (int64_t tap = 0; tap < taps; ++tap) {
    scratch.taps[tap] = layout.tap_row(tap / g.S, tap % g.S) * row_bytes;
  }
  for (int64_t i = 0; i < g.chunk_images * layout.steps; ++i) {
    scratch.steps[i] =
        (i / layout.steps * layout.image + layout.first_row(i % layout.steps)) * row_bytes;
  }
  const Factor grad = grad_of(g), input = input_of(g);
  const int64_t begin = g.chunks * task.split / g.splits;
  const int64_t end = g.chunks * (task.split + 1) / g.splits;
  for (int64_t index = begin; index < end; ++index) {
    const Chunk chunk(g, index);
    const int64_t images = chunk.n_end - chunk.n_begin, steps = images * layout.steps;
    find_outputs(g, layout, chunk, g.grad_strides,
                 g.swapped ? scratch.column_pixels : scratch.row_pixels);
    if (g.swapped) {
      const Strides at{g.in_strides.n, g.in_strides.c, g.in_strides.h * g.stride_h,
                       g.in_strides.w * g.stride_w};
      find_outputs(g, layout, chunk, at, scratch.row_pixels);
    } else {
      find_inputs(g, layout, chunk, g.in_strides, scratch.column_pixels);
    }
    make_columns(g.swapped ? grad : input, task.group, task.column_begin, task.column_end, layout,
                 images, scratch);
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      const Channels channels(g.swapped ? input : grad, task.group, row);
      make_rows(channels, scratch.row_pixels, steps, scratch);
      float* blocks = g.sums == nullptr
                          ? scratch.blocks
                          : g.sums + sums_offset(g, task.split, task.group, row, task.column_begin);
      Pending pending{};
      float *to = blocks, *sums = scratch.sums;
      for (int64_t column = task.column_begin; column < task.column_end; ++column) {
        const char* slab = scratch.columns + (column - task.column_begin) * scratch.block;
        const bool wide = column_channels(g) - column * kBlock > 16, tall = channels.valid > 16;
        for (int64_t tap = 0; tap < taps; ++tap, to += kGradientBlock) {
          const Product product{scratch.rows,  slab + scratch.taps[tap],
                                scratch.steps, steps,
                                scratch.part,  scratch.half};
          if (tall) {
            (wide ? multiply<2, 2> : multiply<2, 1>)(product, sums, pending);
          } else {
            (wide ? multiply<1, 2> : multiply<1, 1>)(product, sums, pending);
          }
          pending = {sums, to, index == begin, kBlock};
          sums = sums == scratch.sums ? scratch.sums + kGradientBlock : scratch.sums;
        }
      }
      pending.take(pending.rows);
      if (g.splits > 1 || index + 1 < end) continue;
      for (int64_t i = 0; i < (task.column_end - task.column_begin) * taps; ++i) {
        finish_block(g, task.group, row, task.column_begin + i / taps, i % taps,
                     blocks + i * kGradientBlock, 0);
      }
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
