// One task of a 3x3 convolution of stride 1 by Winograd's minimal filtering, F(2 x 2, 3 x 3): Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4. Included behind
// conv_kernel.inl, whose slab, weights, epilogue and vectors it takes.
//
// Of a tile of 2 x 2 outputs, d being the 4 x 4 inputs under it and g the filter,
//
//   V = B' d B,  U = G g G',  M = sum over c of U V, element by element,  y = A' M A,
//
//        1  0 -1  0          1   0   0
//   B' = 0  1  1  0     G = 1/2 1/2 1/2     A' = 1  1  1  0
//        0 -1  1  0         1/2-1/2 1/2          0  1 -1 -1
//        0  1  0 -1          0   0   1
//
// so that 16 products a channel do for 36. V and M of a float32 are sums of four values and nine,
// which costs a bit, and sums over c are a ninth as long as the direct convolution's, which gains
// more; errors are in docs/winograd.md.
//
// Memory traffic is the direct convolution's. V of all of a task's tiles is in the second-level
// cache, and so is U of one block of output channels and up to kWinogradChunk input channels, which
// every task makes of the packed weight anew.
//
// An output depends, in its rounding too, on its own 3 x 3 inputs alone: the first output of a
// dimension is of V's first three values, which are of d's first three, the second of the last
// three. But of what is not finite, or so large that a sum of two may be infinite, there are
// differences. A tile with such a sum has its sums taken again, one product after the other.

namespace fused_resnet::cpu {
namespace {

constexpr int kPositions = 16;                     // of a tile's inputs, row by row
constexpr int64_t kWinogradChunk = 128;            // input channels whose U there is at a time
constexpr int kMostTiles = kGroups * kTilePixels;  // that are multiplied together
constexpr int64_t kTaps = 9;
constexpr float kLargestSum = 0x1p60f;

// 2 x 2 outputs, or as many of them as there are.
struct WinogradTile {
  const Item* in;    // of its first input, in the slab
  int64_t out, res;  // element offsets of its first output, channel 0
  int32_t rows, columns;
};

// V is [batches of tiles][kPositions][C / kLanes][kMostTiles][kLanes]: what is multiplied together
// is one stretch of memory.
int64_t position_size(int64_t channels) {
  return div_up(channels, kLanes) * kMostTiles * kLanes;
}

// Tiles that are multiplied together: so many that all batches of a task are about as large.
int64_t batch_tiles(int64_t tiles) {
  return div_up(tiles, div_up(tiles, kMostTiles));
}

// U of a block of output channels is [kPositions][kWinogradChunk][kBlockK]. A position's is no
// power of two, so that what is written at once does not share a few lines of the cache.
constexpr int64_t kPitchU = kWinogradChunk * kBlockK + kLanes;
// M of a batch is [kPositions][kMostTiles][kBlockK].
constexpr int64_t kPitchM = kMostTiles * kBlockK;

// One dimension of B' d.
FR_INLINE void transform_input(const Vec (&d)[4], Vec (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// One dimension of G g.
FR_INLINE void transform_weight(const Vec (&g)[3], Vec (&u)[4]) {
  const Vec outer = (g[0] + g[2]) * 0.5f, inner = g[1] * 0.5f;
  u[0] = g[0];
  u[1] = outer + inner;
  u[2] = outer - inner;
  u[3] = g[2];
}

// One dimension of A' m.
FR_INLINE void transform_output(const Vec (&m)[4], Vec (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

// V of a row of tiles, of which `in` has the first one's first input and `first` is the number.
// Whole vectors of channels are read; what is behind the last is multiplied with nothing.
void transform_tiles(const Item* in, int64_t pixel, int64_t pitch, int64_t channels, int64_t first,
                     int64_t count, int64_t batch, float* v) {
  const int64_t position = position_size(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    // Columns of a tile, each already transformed along itself. Two are the next tile's, too.
    Vec columns[4][4];
    auto column = [&](int64_t index, Vec(&to)[4]) {
      Vec d[4];
      FR_FOR (i, 4) d[i] = load_items(in + i * pitch + index * pixel + c);
      transform_input(d, to);
    };
    column(0, columns[2]);
    column(1, columns[3]);
    float* panel = v + first / batch * kPositions * position + c * kMostTiles;
    int64_t in_batch = first % batch;
    for (int64_t t = 0; t < count; ++t) {
      FR_FOR (i, 4) {
        columns[0][i] = columns[2][i];
        columns[1][i] = columns[3][i];
      }
      column(2 * t + 2, columns[2]);
      column(2 * t + 3, columns[3]);
      float* to = panel + in_batch * kLanes;
      FR_FOR (i, 4) {
        const Vec d[4] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
        Vec row[4];
        transform_input(d, row);
        FR_FOR (j, 4) Float32::store(to + (4 * i + j) * position, row[j]);
      }
      if (++in_batch == batch) {
        in_batch = 0;
        panel += kPositions * position;
      }
    }
  }
}

// U of a block of output channels and some input channels, whose weights are `tap` values apart
// from one tap to the next.
void transform_block(const Item* weight, int64_t tap, int64_t channels, float* u) {
  for (int64_t k = 0; k < channels * kBlockK; k += kLanes) {
    Vec columns[3][4];
    FR_FOR (s, 3) {
      Vec g[3];
      FR_FOR (r, 3) g[r] = load_items(weight + (3 * r + s) * tap + k);
      transform_weight(g, columns[s]);
    }
    FR_FOR (i, 4) {
      const Vec g[3] = {columns[0][i], columns[1][i], columns[2][i]};
      Vec row[4];
      transform_weight(g, row);
      FR_FOR (j, 4) Float32::store(u + (4 * i + j) * kPitchU + k, row[j]);
    }
  }
}

// Input channels whose products are summed one after the other. An output is a sum of nine sums of
// this kind, of larger values than the direct convolution's, so parts are shorter than there.
constexpr int64_t kPart = 32;

// What up to kWinogradChunk input channels add to M of kTiles tiles and kV vectors of output
// channels at one position, or begin it with. With every step a line of `ahead`, unless it is null,
// is brought into the second-level cache. (Of an address that is nowhere the translation would be
// looked for every time.)
template <int kTiles, int kV>
void multiply_position(const float* v, const float* u, int64_t channels, bool adds, float* m,
                       const char* ahead) {
  const int64_t line = ahead == nullptr ? 0 : 64;
  if (ahead == nullptr) ahead = reinterpret_cast<const char*>(u);
  for (int64_t part = 0; part < channels; part += kPart, adds = true) {
    const int64_t end = part + kPart < channels ? part + kPart : channels;
    Vec acc[kTiles][kV];
    FR_FOR (i, kTiles)
      FR_FOR (k, kV) acc[i][k] = Vec{};
    for (int64_t c = part; c < end; c += kLanes, v += kMostTiles * kLanes) {
      const int64_t rest = end - c, count = rest < kLanes ? rest : kLanes;
      for (int64_t j = 0; j < count; ++j) {
        Vec w[kV];
        FR_FOR (k, kV) w[k] = Float32::load(u + k * kLanes);
        FR_FOR (i, kTiles) {
          const Vec x = broadcast(v[i * kLanes + j]);
          FR_FOR (k, kV) acc[i][k] = multiply_add(acc[i][k], x, w[k]);
        }
        __builtin_prefetch(ahead, 0, 2);
        ahead += line;
        u += kBlockK;
      }
    }
    FR_FOR (i, kTiles)
      FR_FOR (k, kV) {
        float* to = m + i * kBlockK + k * kLanes;
        Float32::store(to, adds ? Float32::load(to) + acc[i][k] : acc[i][k]);
      }
  }
}

using MultiplyPosition = void (*)(const float*, const float*, int64_t, bool, float*, const char*);

template <int kV, int kTiles = 1>
MultiplyPosition multiply_position_for(int64_t tiles) {
  if constexpr (kTiles < kMostTiles) {
    if (tiles > kTiles) return multiply_position_for<kV, kTiles + 1>(tiles);
  }
  return multiply_position<kTiles, kV>;
}

// Sums of a tile's four outputs and one block's output channels, one product after the other.
__attribute__((noinline)) void sum_directly(const Item* in, int64_t pixel, int64_t pitch,
                                            const Item* weight, int64_t channels,
                                            float (&sums)[4][kBlockK]) {
  Vec total[4][kVectors];
  FR_FOR (i, 4)
    FR_FOR (k, kVectors) total[i][k] = Vec{};
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    const Item* first = in + tap / 3 * pitch + tap % 3 * pixel;
    const Item* w = weight + tap * channels * kBlockK;
    for (int64_t begin = 0; begin < channels; begin += kWinogradChunk) {
      const int64_t end = begin + kWinogradChunk < channels ? begin + kWinogradChunk : channels;
      Vec acc[4][kVectors];
      FR_FOR (i, 4)
        FR_FOR (k, kVectors) acc[i][k] = Vec{};
      for (int64_t c = begin; c < end; ++c) {
        FR_FOR (i, 4) {
          const Vec x = broadcast(first[i / 2 * pitch + i % 2 * pixel + c]);
          FR_FOR (k, kVectors) {
            acc[i][k] = multiply_add(acc[i][k], x, load_items(w + c * kBlockK + k * kLanes));
          }
        }
      }
      FR_FOR (i, 4)
        FR_FOR (k, kVectors) total[i][k] += acc[i][k];
    }
  }
  FR_FOR (i, 4)
    FR_FOR (k, kVectors) Float32::store(&sums[i][k * kLanes], total[i][k]);
}

// The step behind the sums of one output pixel.
template <class T, int kV>
void finish_output(const float* sums, int64_t out, int64_t res, const Epilogue<T>& e) {
  Vec y[kV];
  FR_FOR (v, kV) {
    y[v] = Float32::load(sums + v * kLanes);
    if (e.bias != nullptr) y[v] += Float32::load(e.bias + v * kLanes);
    y[v] = y[v] * Float32::load(e.scale + v * kLanes) + Float32::load(e.shift + v * kLanes);
  }
  if (e.in_registers()) {
    FR_FOR (v, kV) {
      if (e.residual) y[v] += T::load(e.residual + res + v * kLanes);
      if (e.relu) y[v] = relu(y[v]);
      T::store(e.output + out + v * kLanes, y[v]);
    }
    return;
  }
  alignas(64) float spill[kV * kLanes];
  FR_FOR (v, kV) Float32::store(spill + v * kLanes, y[v]);
  if (e.vectorised) {
    store_from_memory<T, 1, kV>(spill, out, res, e);
  } else {
    store_strided<T, 1>(spill, kV * kLanes, out, res, e);
  }
}

// Where a task's slab and weights are, for sums that are taken again.
struct DirectSums {
  int64_t pixel, pitch, channels;
  const Item* weight;
};

// The outputs of tiles that have been multiplied.
template <class T, int kV>
void finish_tiles(const Conv& conv, const float* m, const WinogradTile* tiles, int64_t count,
                  const Epilogue<T>& e, const DirectSums& direct) {
  for (int64_t t = 0; t < count; ++t, m += kBlockK) {
    const WinogradTile& tile = tiles[t];
    alignas(64) float sums[4][kBlockK];
    Vec all = Vec{};
    FR_FOR (v, kV) {
      Vec columns[4][2], y[2][2];
      FR_FOR (j, 4) {
        Vec column[4];
        FR_FOR (i, 4) column[i] = Float32::load(m + (4 * i + j) * kPitchM + v * kLanes);
        transform_output(column, columns[j]);
      }
      FR_FOR (i, 2) {
        const Vec row[4] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
        transform_output(row, y[i]);
        FR_FOR (j, 2) {
          Float32::store(&sums[2 * i + j][v * kLanes], y[i][j]);
          all += y[i][j];
        }
      }
    }
    const auto lost = !((all < kLargestSum) & (all > -kLargestSum));
    bool again = false;
    FR_FOR (lane, kLanes) again |= lost[lane] != 0;
    if (again) {
      sum_directly(tile.in, direct.pixel, direct.pitch, direct.weight, direct.channels, sums);
    }
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < tile.columns; ++j) {
        finish_output<T, kV>(sums[2 * i + j], tile.out + i * conv.out.h + j * e.out_pixel,
                             tile.res + i * conv.res.h + j * e.res_pixel, e);
      }
    }
  }
}

// The rows of tiles of an image, and the tiles of one.
int64_t tile_rows(const Conv& conv) {
  return div_up(conv.P, 2);
}
int64_t tile_columns(const Conv& conv) {
  return div_up(conv.Q, 2);
}

// The convolution that has all outputs of every tile, by which a slab is gathered.
Conv with_whole_tiles(const Conv& conv) {
  Conv whole = conv;
  whole.P = 2 * tile_rows(conv);
  whole.Q = 2 * tile_columns(conv);
  return whole;
}

// How many batches' M there are at a time: while the sums are not complete, all of them.
int64_t batches_of_m(const Conv& conv, int64_t tiles) {
  return group_c(conv) <= kWinogradChunk ? 1 : div_up(tiles, batch_tiles(tiles));
}

// Scratch memory: [tiles][scale, shift and bias][slab][V][U][M].
struct WinogradScratch {
  WinogradTile* tiles;
  Item* slab;
  float *norm, *v, *u, *m;
  int64_t bytes;

  WinogradScratch(const Conv& conv, const Task& task, void* memory) {
    const int64_t rows = task.row_end - task.row_begin, in_image = tile_rows(conv);
    const int64_t count = rows * tile_columns(conv);
    const int64_t images = (task.row_end - 1) / in_image - task.row_begin / in_image + 1;
    const Slab shape(with_whole_tiles(conv));
    const int64_t v_values =
        div_up(count, batch_tiles(count)) * kPositions * position_size(group_c(conv));
    char* at = static_cast<char*>(memory);
    auto take = [&at](int64_t size) {
      char* taken = at;
      at += (size + 63) / 64 * 64;
      return taken;
    };
    tiles =
        reinterpret_cast<WinogradTile*>(take(count * static_cast<int64_t>(sizeof(WinogradTile))));
    norm = reinterpret_cast<float*>(take(norm_size(conv, task) * 4));
    // Whole vectors are read of its last pixel, too.
    slab = reinterpret_cast<Item*>(take(((2 * rows + 2 * images) * shape.pitch + kLanes) * 4));
    v = reinterpret_cast<float*>(take(v_values * 4));
    u = reinterpret_cast<float*>(take(kPositions * kPitchU * 4));
    m = reinterpret_cast<float*>(take(batches_of_m(conv, count) * kPositions * kPitchM * 4));
    bytes = at - static_cast<char*>(memory);
  }
};

int64_t winograd_scratch_bytes(const Conv& conv, const Task& task) {
  return WinogradScratch(conv, task, nullptr).bytes;
}

// Gathers a task's inputs and transforms them; returns how many tiles there are.
template <class T>
int64_t transform_rows(const Conv& conv, const Task& task, const WinogradScratch& scratch) {
  const Conv whole = with_whole_tiles(conv);
  const Slab slab(whole);
  const int64_t in_image = tile_rows(conv), columns = tile_columns(conv);
  const int64_t batch = batch_tiles((task.row_end - task.row_begin) * columns);
  Item* memory = scratch.slab;
  int64_t count = 0;
  for (int64_t row = task.row_begin; row < task.row_end;) {
    const int64_t n = row / in_image, p = row % in_image;
    const int64_t rest = in_image - p, wanted = task.row_end - row;
    const int64_t rows = wanted < rest ? wanted : rest;
    // Two rows ahead of what is transformed: they are then in the cache.
    gather<T>(whole, slab, n, 2 * p, 2 * p, task, memory);
    for (int64_t i = p; i < p + rows; ++i, memory += 2 * slab.pitch) {
      gather<T>(whole, slab, n, 2 * i + 2, 2 * i + 2, task, memory + 2 * slab.pitch);
      transform_tiles(memory, slab.pixel, slab.pitch, group_c(conv), count, columns, batch,
                      scratch.v);
      for (int64_t j = 0; j < columns; ++j) {
        scratch.tiles[count++] = {memory + 2 * j * slab.pixel,
                                  n * conv.out.n + 2 * i * conv.out.h + 2 * j * conv.out.w,
                                  n * conv.res.n + 2 * i * conv.res.h + 2 * j * conv.res.w,
                                  conv.P - 2 * i < 2 ? 1 : 2, conv.Q - 2 * j < 2 ? 1 : 2};
      }
    }
    memory += 2 * slab.pitch;
    row += rows;
  }
  return count;
}

// The weights that are transformed next, to be brought into the cache by the products before: of
// nine taps, some values each; or else a stretch of the next layer's.
class ComingWeights {
 public:
  ComingWeights(const Item* first, int64_t tap, int64_t values)
      : first_(reinterpret_cast<const char*>(first)), tap_(tap * 4), tap_bytes_(values * 4) {}

  // The next so many lines; null where there are no more.
  const char* take(int64_t lines) {
    if (first_ == nullptr || taken_ >= kTaps) return nullptr;
    const char* at = first_ + taken_ * tap_ + in_tap_;
    in_tap_ += lines * 64;
    if (in_tap_ >= tap_bytes_) in_tap_ = 0, ++taken_;
    return at;
  }

 private:
  const char* first_;
  int64_t tap_, tap_bytes_, taken_ = 0, in_tap_ = 0;
};

// All tiles, already transformed, against the task's blocks of output channels in turn.
template <class T>
void multiply_winograd(const Conv& conv, const Task& task, const WinogradScratch& scratch,
                       int64_t tiles) {
  const Slab slab(with_whole_tiles(conv));
  const int64_t channels = group_c(conv), outputs = group_k(conv), batch = batch_tiles(tiles);
  const int64_t blocks = div_up(outputs, kBlockK), tap = channels * kBlockK;
  const int64_t v_position = position_size(channels);
  const int64_t m_batch = batches_of_m(conv, tiles) == 1 ? 0 : kPositions * kPitchM;
  const TaskNorm norm(conv, task, scratch.norm);
  const Epilogue<T> base = epilogue_of<T>(conv);
  Epilogue<T> e = base;
  for (int64_t block = task.block_begin; block < task.block_end; ++block) {
    const int64_t channel = task.group * outputs + block * kBlockK;
    const int vectors = norm.valid(block) <= kLanes ? 1 : 2;
    begin_block(conv, base, norm, block, channel, e);
    const Item* weight =
        static_cast<const Item*>(conv.weight) + (task.group * blocks + block) * kTaps * tap;
    const DirectSums direct{slab.pixel, slab.pitch, channels, weight};
    for (int64_t c = 0; c < channels; c += kWinogradChunk) {
      const int64_t rest = channels - c, count = rest < kWinogradChunk ? rest : kWinogradChunk;
      transform_block(weight + c * kBlockK, tap, count, scratch.u);
      const bool is_last = c + count == channels;
      const Item* next = !is_last                     ? weight + (c + count) * kBlockK
                         : block + 1 < task.block_end ? weight + kTaps * tap
                                                      : next_layer(conv, task, blocks);
      ComingWeights coming(next, tap, count * kBlockK);
      for (int64_t begin = 0; begin < tiles; begin += batch) {
        const int64_t left = tiles - begin, in_batch = left < batch ? left : batch;
        const float* v = scratch.v + begin / batch * kPositions * v_position + c * kMostTiles;
        float* m = scratch.m + begin / batch * m_batch;
        const MultiplyPosition multiply =
            vectors == 1 ? multiply_position_for<1>(in_batch) : multiply_position_for<2>(in_batch);
        for (int64_t i = 0; i < kPositions; ++i) {
          multiply(v + i * v_position, scratch.u + i * kPitchU, count, c > 0, m + i * kPitchM,
                   coming.take(count));
        }
        if (is_last) {
          (vectors == 1 ? finish_tiles<T, 1> : finish_tiles<T, 2>)(conv, m, scratch.tiles + begin,
                                                                   in_batch, e, direct);
        }
      }
    }
  }
}

template <class T>
void run_winograd_as(const Conv& conv, const Task& task, void* memory) {
  const WinogradScratch scratch(conv, task, memory);
  const int64_t tiles = transform_rows<T>(conv, task, scratch);
  multiply_winograd<T>(conv, task, scratch, tiles);
}

void run_winograd(const Conv& conv, const Task& task, void* memory) {
  switch (conv.dtype) {
    case Dtype::kFloat32:
      return run_winograd_as<Float32>(conv, task, memory);
    case Dtype::kBFloat16:
      return run_winograd_as<BFloat16>(conv, task, memory);
    case Dtype::kFloat16:
      return run_winograd_as<Float16>(conv, task, memory);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
