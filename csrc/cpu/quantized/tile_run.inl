// The convolution of bytes on tiles of 16 evenly spaced pixels. The including file has defined, in
// its anonymous namespace, vectors (bytes_*.h) and the unit (tiles.inl):
//
//   UnitState                  held while a task runs
//   multiply<kM, kN>(product, pending)   all products of kM tiles of pixels and kN of output
//                              channels into product.sums, with pending.take() in between.
//
// Nothing but <stdint.h> is included: see cpu/isa.h.

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kBlockSums = 2 * kByteRows * kByteBlockK;

// A block's output pixel: where it and its shortcut begin, from the tensors' first bytes. Negative
// where a tile's row is under no output.
struct Position {
  int64_t out, added;
};

// The step behind a block's products, a few pixels at a time.
struct Pending {
  void (*finish)(const Pending&, int64_t begin, int64_t end);
  const int32_t *sums, *other;
  const Position* positions;
  int64_t next, pixels;

  const float *scale, *shift, *other_scale;
  const int32_t *offset, *other_offset;  // zero point times the filters' sums, or null
  uint8_t* output;
  const uint8_t* added;
  int32_t added_zero_point;
  float shortcut_scale;

  FR_BYTES_INLINE void take(int64_t count) {
    if (next >= pixels) return;
    const int64_t end = next + count < pixels ? next + count : pixels;
    finish(*this, next, end);
    next = end;
  }
};

template <bool kOffset, ByteShortcut kShortcut, int kN>
void finish(const Pending& e, int64_t begin, int64_t end) {
  const Floats shortcut_scale = broadcast(e.shortcut_scale);
  const Ints zero_point = broadcast_int(e.added_zero_point);
  for (int64_t i = begin; i < end; ++i) {
    const Position& at = e.positions[i];
    if (at.out < 0) continue;
    Floats t[kN * 16 / kLanes];
    for (int v = 0; v < kN * 16 / kLanes; ++v) {
      const int64_t k = v * kLanes;
      Ints sum = load_ints(e.sums + i * kByteBlockK + k);
      if constexpr (kOffset) sum = subtract(sum, load_ints(e.offset + k));
      t[v] = add(multiply(to_floats(sum), load_floats(e.scale + k)), load_floats(e.shift + k));
      if constexpr (kShortcut == ByteShortcut::bytes) {
        Ints x = load_bytes(e.added + at.added + k);
        if constexpr (kOffset) x = subtract(x, zero_point);
        t[v] = add(t[v], multiply(to_floats(x), shortcut_scale));
      }
      if constexpr (kShortcut == ByteShortcut::projection) {
        Ints other = load_ints(e.other + i * kByteBlockK + k);
        if constexpr (kOffset) other = subtract(other, load_ints(e.other_offset + k));
        t[v] = add(t[v], multiply(to_floats(other), load_floats(e.other_scale + k)));
      }
    }
    store_rounded(e.output + at.out, t);
  }
}

using Finish = void (*)(const Pending&, int64_t, int64_t);

template <ByteShortcut kShortcut>
Finish finish_for(bool offset, int64_t halves) {
  if (halves == 2) return offset ? finish<true, kShortcut, 2> : finish<false, kShortcut, 2>;
  return offset ? finish<true, kShortcut, 1> : finish<false, kShortcut, 1>;
}

Finish finish_for(ByteShortcut shortcut, bool offset, int64_t halves) {
  switch (shortcut) {
    case ByteShortcut::bytes:
      return finish_for<ByteShortcut::bytes>(offset, halves);
    case ByteShortcut::projection:
      return finish_for<ByteShortcut::projection>(offset, halves);
    default:
      return finish_for<ByteShortcut::none>(offset, halves);
  }
}

// Up to two tiles of pixels.
struct Pixels {
  const uint8_t* in[2];
  const uint8_t* projected[2];
  int64_t tiles;
  Position positions[2 * kByteRows];
};

// Finds the next one or two tiles that have an output, from `tile` on; returns where to go on.
int64_t next_pixels(const ByteConv& conv, int64_t tile, int64_t tile_end, Pixels& pixels) {
  const int64_t pitch = conv.in.pitch(), lines = conv.in.lines(), pixel = conv.in.pixel();
  const int64_t out_pixel = conv.out.pixel();
  const int64_t added_pixel = conv.shortcut == ByteShortcut::bytes ? conv.added.pixel() : 0;
  const uint8_t* const first = conv.in.data + conv.origin * pixel;
  for (pixels.tiles = 0; tile < tile_end && pixels.tiles < 2; ++tile) {
    Position* positions = pixels.positions + pixels.tiles * kByteRows;
    int64_t n, p, q, index;
    if (conv.even()) {
      index = tile * kByteRows;
      n = index / (lines * pitch);
      p = index / pitch - n * lines;
      q = index % pitch;
    } else {
      const int64_t line = tile / conv.tiles_per_line();
      n = line / conv.P;
      p = line % conv.P;
      q = tile % conv.tiles_per_line() * kByteRows;
      index = (n * lines + p * conv.stride_h) * pitch + q * conv.stride_w;
    }
    bool any = false;
    for (int64_t i = 0; i < kByteRows;) {
      const bool valid = n < conv.in.N && p < conv.P && q < conv.Q;
      // Up to the end of the outputs' line, or of the input's.
      const int64_t left = kByteRows - i, end = valid ? conv.Q : conv.even() ? pitch : q + left;
      const int64_t count = end - q < left ? end - q : left;
      if (valid) {
        any = true;
        int64_t out = conv.out.position(n, p, q) * out_pixel;
        int64_t added = added_pixel ? conv.added.position(n, p, q) * added_pixel : 0;
        for (int64_t j = i; j < i + count; ++j, out += out_pixel, added += added_pixel) {
          positions[j] = {out, added};
        }
      } else {
        for (int64_t j = i; j < i + count; ++j) positions[j].out = -1;
      }
      i += count;
      q += count;
      if (conv.even() && q == pitch) {
        q = 0;
        if (++p == lines) p = 0, ++n;
      }
    }
    if (!any) continue;
    pixels.in[pixels.tiles] = first + index * pixel;
    pixels.projected[pixels.tiles] =
        conv.projected == nullptr ? nullptr : conv.projected + index * conv.projection.pixel();
    ++pixels.tiles;
  }
  if (pixels.tiles == 1) {  // so that the second is somewhere
    pixels.in[1] = pixels.in[0];
    pixels.projected[1] = pixels.projected[0];
  }
  return tile;
}

// All products of one or two tiles of pixels and one block of output channels.
struct Product {
  const uint8_t *in0, *in1;
  int64_t row;  // bytes from one pixel to the next
  int64_t runs, chunks, steps;
  int64_t R, S, run_h, run_w;  // where runs begin: r * run_h + s * run_w
  const int8_t* weight;
  int32_t* sums;
  const char* prefetch;  // a line of this with every chunk, up to the end
  const char* prefetch_end;
};

template <int kM>
FR_BYTES_INLINE void multiply_block(const Product& product, int64_t halves, Pending& pending) {
  if (halves == 2) {
    multiply<kM, 2>(product, pending);
  } else {
    multiply<kM, 1>(product, pending);
  }
}

FR_BYTES_INLINE void multiply_block(const Product& product, int64_t tiles, int64_t halves,
                                    Pending& pending) {
  if (tiles == 2) {
    multiply_block<2>(product, halves, pending);
  } else {
    multiply_block<1>(product, halves, pending);
  }
}

struct Sums {
  alignas(64) int32_t main[2][kBlockSums];
  alignas(64) int32_t other[2][kBlockSums];
  alignas(64) int32_t offset[2][2][kByteBlockK];  // in turn, too; of both convolutions
};

// The zero point times the sums of a block's filters.
const int32_t* offsets(const ByteWeight& weight, int64_t channel, int32_t* memory) {
  for (int64_t k = 0; k < kByteBlockK; ++k) {
    memory[k] = weight.zero_point * weight.filter_sums[channel + k];
  }
  return memory;
}

int64_t pieces(const ByteConv& conv) {
  return bytes_div_up(conv.tiles(), 2);
}

void run(const ByteConv& conv, const ByteTask& task) {
  const int64_t tile_begin = 2 * task.begin, tiles = conv.tiles();
  const int64_t tile_end = 2 * task.end < tiles ? 2 * task.end : tiles;
  const UnitState state;
  Sums sums;
  Pixels pixels[2];
  const ByteFilter &filter = conv.filter, &projection = conv.projection;
  const bool projects = conv.shortcut == ByteShortcut::projection;
  const bool offset = conv.has_offset();
  const int64_t pixel = conv.in.pixel();
  const int64_t block_bytes = filter.block_bytes();
  const int64_t runs = filter.runs(), chunks = filter.chunks(), steps = filter.steps();
  const int64_t projection_bytes = projects ? projection.block_bytes() : 0;
  const int64_t projection_chunks = projects ? projection.chunks() : 0;
  const int64_t projection_steps = projects ? projection.steps() : 0;
  Pending pending = {};
  int turn = 0;

  auto multiply_all = [&](const Pixels& at, int64_t block, bool first_pixels) {
    const int64_t channel = block * kByteBlockK;
    const int64_t halves = filter.K - channel > 16 ? 2 : 1;
    const int64_t base = filter.groups == 1 ? 0 : filter.base(block);
    Product product = {
        at.in[0] + base,
        at.in[1] + base,
        pixel * conv.stride_w,
        runs,
        chunks,
        steps,
        filter.R,
        filter.joined ? 1 : filter.S,
        conv.dil_h * conv.in.pitch() * pixel,
        conv.dil_w * pixel,
        conv.weight.packed + block * block_bytes,
        sums.main[turn],
        nullptr,
        nullptr,
    };
    if (first_pixels && block + 1 < task.block_end) {
      product.prefetch = reinterpret_cast<const char*>(product.weight + block_bytes);
      product.prefetch_end = product.prefetch + block_bytes;
    }
    multiply_block(product, at.tiles, halves, pending);
    if (projects) {
      Product second = {
          at.projected[0],
          at.projected[1],
          projection.pixel(),
          1,
          projection_chunks,
          projection_steps,
          1,
          1,
          0,
          0,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
      };
      if (conv.doubled) second = product;
      second.weight = conv.projection_weight.packed + block * projection_bytes;
      second.sums = sums.other[turn];
      second.prefetch = second.prefetch_end = nullptr;
      multiply_block(second, at.tiles, halves, pending);
    }
    pending.take(pending.pixels);
    pending.finish = finish_for(conv.shortcut, offset, halves);
    pending.sums = sums.main[turn];
    pending.other = sums.other[turn];
    pending.positions = at.positions;
    pending.next = 0;
    pending.pixels = at.tiles * kByteRows;
    pending.scale = conv.weight.scale + channel;
    pending.shift = conv.weight.shift + channel;
    pending.other_scale = projects ? conv.projection_weight.scale + channel : nullptr;
    if (offset) {
      pending.offset = offsets(conv.weight, channel, sums.offset[turn][0]);
      if (projects) {
        pending.other_offset = offsets(conv.projection_weight, channel, sums.offset[turn][1]);
      }
    }
    pending.output = conv.out.data + channel;
    pending.added = conv.shortcut == ByteShortcut::bytes ? conv.added.data + channel : nullptr;
    pending.added_zero_point = conv.added_zero_point;
    pending.shortcut_scale = conv.shortcut_scale;
    turn = 1 - turn;
  };

  // Either some pixels take all blocks of output channels in turn, or, with weights that do not
  // stay in the cache, each block of these takes all pixels.
  int flip = 0;
  if (conv.keeps_weight) {
    for (int64_t tile = tile_begin; tile < tile_end; flip = 1 - flip) {
      const bool first = tile == tile_begin;
      tile = next_pixels(conv, tile, tile_end, pixels[flip]);
      if (pixels[flip].tiles == 0) break;
      for (int64_t block = task.block_begin; block < task.block_end; ++block) {
        multiply_all(pixels[flip], block, first);
      }
    }
  } else {
    for (int64_t block = task.block_begin; block < task.block_end; ++block) {
      for (int64_t tile = tile_begin; tile < tile_end; flip = 1 - flip) {
        const bool first = tile == tile_begin;
        tile = next_pixels(conv, tile, tile_end, pixels[flip]);
        if (pixels[flip].tiles == 0) break;
        multiply_all(pixels[flip], block, first);
      }
    }
  }
  pending.take(pending.pixels);
}

}  // namespace
}  // namespace fused_resnet::cpu
