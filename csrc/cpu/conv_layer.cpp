#include "cpu/conv_layer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "checks.h"
#include "cpu/buffer_pool.h"
#include "cpu/conv_border.h"
#include "cpu/conv_tiles.h"
#include "cpu/conv_winograd.h"
#include "cpu/finite.h"
#include "cpu/isa.h"
#include "cpu/packed_layout.h"
#include "cpu/row_statistics.h"
#include "cpu/shared_tasks.h"

namespace fused_resnet::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

const ConvIsa* vector_isa() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::avx512:
      return &kConvAvx512;
    case Isa::avx2:
      return &kConvAvx2;
    case Isa::baseline:
      return nullptr;
  }
#endif
  return nullptr;
}

const ConvIsa* pair_isa() {
  switch (pair_unit()) {
#if defined(__x86_64__)
    case PairUnit::avx512bf16:
      return &kConvAvx512Bf16;
#endif
    case PairUnit::emulated:
      return &kConvAvx512Bf16Emulated;
    default:
      return nullptr;
  }
}

const ConvIsa* tile_isa() {
  switch (tile_unit()) {
#if defined(__x86_64__)
    case TileUnit::amx:
      return &kConvAmx;
#endif
    case TileUnit::emulated:
      return &kConvAmxEmulated;
    default:
      return nullptr;
  }
}

// Groups that would fill less than half of a tile are the vector kernel's.
static bool fills_tiles(int64_t groups, int64_t c, int64_t k) {
  return groups == 1 || (c >= kTileDepth / 2 && k >= kTileBlockK / 2);
}

const ConvIsa* conv_isa(ScalarType dtype, int64_t groups, int64_t c, int64_t k) {
  if (dtype == ScalarType::BFloat16 && tile_isa() != nullptr && fills_tiles(groups, c, k)) {
    return tile_isa();
  }
  if (dtype == ScalarType::BFloat16 && pair_isa() != nullptr) return pair_isa();
  return vector_isa();
}

namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// From how many output pixels on, of all images, tiles are faster than AVX-512 for a convolution in
// parts that both can run, as measured in ResNets' layers with 1 to 8 images on a two-core
// Xeon with 2 MiB of second-level cache a core. What tiles take more is to split every pixel, which
// many output channels or taps make up for, and every weight, which many pixels do.
int64_t pixels_that_pay(const Conv& conv) {
  const int64_t c = group_c(conv), k = group_k(conv);
  if (conv.has_pool || std::min(c, k) < 64) return kNever;
  // Of strided pixels four planes are gathered: too much for the cache beside the weights.
  const bool strided = conv.stride_h > 1 || conv.stride_w > 1;
  if (!is_pointwise(conv)) return !strided ? 32 : c <= 256 ? 128 : kNever;
  return std::max(c, k) >= 128 ? div_up(k >= 2 * c ? 150000 : 250000, k) : kNever;
}

// From how many output pixels on a convolution of float32, or float16, runs on tiles.
int64_t least_pixels_on_tiles(const Conv& conv) {
  if (tile_unit() == TileUnit::none || conv.expanded ||
      !fills_tiles(conv.groups, group_c(conv), group_k(conv))) {
    return kNever;
  }
  return tiles_asked_for() ? 0 : pixels_that_pay(conv);
}

// How many products of bfloat16 stand for one of float32, and their kernels.
struct Float32Kernels {
  int64_t products;
  const ConvIsa *amx, *emulated;
};

constexpr Float32Kernels kFloat32Kernels[] = {
#if defined(__x86_64__)
    {6, &kConvFloat32Amx, &kConvFloat32AmxEmulated},
    {3, &kConvFloat32HighAmx, &kConvFloat32HighAmxEmulated},
    {1, &kConvFloat32MediumAmx, &kConvFloat32MediumAmxEmulated},
#else
    {6, nullptr, &kConvFloat32AmxEmulated},
    {3, nullptr, &kConvFloat32HighAmxEmulated},
    {1, nullptr, &kConvFloat32MediumAmxEmulated},
#endif
};

// Those in use: of the process, as is torch's setting that they follow.
std::atomic<const Float32Kernels*> float32_kernels{&kFloat32Kernels[0]};

// The kernel of a convolution of float32 or float16. All kinds take the same packed weight.
const ConvIsa& isa_in_parts(const Conv& conv) {
  const int64_t images = std::max(conv.batch, conv.N);
  if (images * conv.P * conv.Q < least_pixels_on_tiles(conv)) return *conv.isa;
  if (conv.dtype == Dtype::kFloat16) {
#if defined(__x86_64__)
    if (tile_unit() == TileUnit::amx) return kConvFloat16Amx;
#endif
    return kConvFloat16AmxEmulated;
  }
  const Float32Kernels& kernels = *float32_kernels.load(std::memory_order_relaxed);
  return tile_unit() == TileUnit::amx ? *kernels.amx : *kernels.emulated;
}

// ---- Winograd ----------------------------------------------------------------------------------

// FUSED_RESNET_CPU_WINOGRAD: 0, nowhere.
bool winograd_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("FUSED_RESNET_CPU_WINOGRAD");
    const std::string chosen(value == nullptr ? "" : value);
    STD_TORCH_CHECK(chosen.empty() || chosen == "0" || chosen == "1",
                    "FUSED_RESNET_CPU_WINOGRAD is '", chosen, "', must be 0 or 1");
    return chosen != "0";
  }();
  return wanted;
}

// Of a vector kernel: the same with fewer products. Null where there is none.
const ConvIsa* winograd_of(const ConvIsa* isa) {
#if defined(__x86_64__)
  if (isa == &kConvAvx512) return &kConvWinogradAvx512;
  if (isa == &kConvAvx2) return &kConvWinogradAvx2;
#endif
  static_cast<void>(isa);
  return nullptr;
}

int64_t winograd_tiles(const Conv& conv) {
  return div_up(conv.P, kWinogradTile) * div_up(conv.Q, kWinogradTile);
}

// From how many tiles of 2 x 2 outputs on, of all images, a convolution has fewer products: each
// task transforms its weights, which takes as long as its products with a few tiles. Without
// channels enough what is transformed is more than what is multiplied.
int64_t least_winograd_tiles(const Conv& conv) {
  const bool fits = conv.R == 3 && conv.S == 3 && conv.stride_h == 1 && conv.stride_w == 1 &&
                    conv.dil_h == 1 && conv.dil_w == 1 && conv.groups == 1 && !conv.has_pool;
  if (!fits || winograd_of(conv.isa) == nullptr || !winograd_wanted()) return kNever;
  return std::min(conv.C, conv.K) >= 32 ? 32 : kNever;
}

bool uses_winograd(const Conv& conv) {
  return std::max(conv.batch, conv.N) * winograd_tiles(conv) >= least_winograd_tiles(conv);
}

// Output rows that are computed together, but for an image's last.
int64_t row_step(const Conv& conv) {
#if defined(__x86_64__)
  if (conv.isa == &kConvWinogradAvx512 || conv.isa == &kConvWinogradAvx2) return kWinogradTile;
#endif
  return 1;
}

// The rows that tasks are made of.
int64_t task_rows(const Conv& conv) {
  return conv.N * (conv.has_pool ? conv.pool.P : div_up(conv.P, row_step(conv)));
}

}  // namespace

void set_float32_products(int64_t products) {
  for (const Float32Kernels& kernels : kFloat32Kernels) {
    if (kernels.products != products) continue;
    float32_kernels.store(&kernels, std::memory_order_relaxed);
    return;
  }
  FR_CHECK(false, "set_float32_products: products is ", products, ", must be 6, 3 or 1");
}

int64_t float32_pixels_for_tiles(std::vector<int64_t> weight_shape, std::vector<int64_t> stride,
                                 int64_t groups, bool has_pool) {
  FR_CHECK(weight_shape.size() == 4 && stride.size() == 2 && groups > 0,
           "float32_pixels_for_tiles: weight_shape must have 4 numbers, stride 2, groups be "
           "positive");
  if (vector_isa() == nullptr) return -1;
  Conv conv{};
  conv.K = weight_shape[0], conv.C = weight_shape[1] * groups;
  conv.R = weight_shape[2], conv.S = weight_shape[3];
  conv.stride_h = stride[0], conv.stride_w = stride[1];
  conv.groups = groups;
  conv.has_pool = has_pool;
  conv.expanded = is_expanded(groups, weight_shape[1], conv.K / groups, vector_isa()->lanes);
  const int64_t pixels = least_pixels_on_tiles(conv);
  return pixels == kNever ? -1 : pixels;
}

int64_t tiles_for_winograd(std::vector<int64_t> weight_shape, std::vector<int64_t> stride,
                           std::vector<int64_t> dilation, int64_t groups, bool has_pool) {
  FR_CHECK(weight_shape.size() == 4 && stride.size() == 2 && dilation.size() == 2 && groups > 0,
           "tiles_for_winograd: weight_shape must have 4 numbers, stride and dilation 2, groups be "
           "positive");
  if (vector_isa() == nullptr) return -1;
  Conv conv{};
  conv.isa = vector_isa();
  conv.K = weight_shape[0], conv.C = weight_shape[1] * groups;
  conv.R = weight_shape[2], conv.S = weight_shape[3];
  conv.stride_h = stride[0], conv.stride_w = stride[1];
  conv.dil_h = dilation[0], conv.dil_w = dilation[1];
  conv.groups = groups;
  conv.has_pool = has_pool;
  const int64_t tiles = least_winograd_tiles(conv);
  return tiles == kNever ? -1 : tiles;
}

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return reported > 0 ? static_cast<int64_t>(reported) : int64_t{1} << 20;
  }();
  return bytes;
}

bool exceeds_caches(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size()) > l2_bytes();
}

namespace {

// Of memory until it is a tensor's.
using Memory = std::unique_ptr<void, void (*)(void*)>;

// For a dense tensor.
Memory allocated(const std::vector<int64_t>& sizes, ScalarType dtype, void* (*allocate)(size_t),
                 void (*release)(void*));
Tensor tensor_in(Memory memory, const std::vector<int64_t>& sizes,
                 const std::vector<int64_t>& strides, ScalarType dtype);

template <class F>
auto with_element_type(const Tensor& tensor, const char* name, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<const float*>(tensor.const_data_ptr()));
    case ScalarType::Double:
      return f(static_cast<const double*>(tensor.const_data_ptr()));
    case ScalarType::BFloat16:
      return f(static_cast<const BFloat16*>(tensor.const_data_ptr()));
    case ScalarType::Half:
      return f(static_cast<const Half*>(tensor.const_data_ptr()));
    default:
      FR_CHECK(false, "conv_bn_act: ", name, " must be a floating-point tensor");
  }
}

// ---- weight packing ----------------------------------------------------------------------------

struct WeightShape : PackedLayout {
  int64_t R, S;
  Strides stride;
  const ConvIsa* isa;

  WeightShape(const Tensor& weight, int64_t group_count)
      : WeightShape(weight, group_count,
                    *conv_isa(weight.scalar_type(), group_count, weight.size(1),
                              weight.size(0) / group_count)) {}

  // The same, transposed: see pack_transposed_bfloat16(). The source is then the last tap.
  WeightShape transposed() const {
    WeightShape t = *this;
    t.K = C, t.C = K;
    t.stride = {stride.c, stride.n, -stride.h, -stride.w};
    t.tiles = tiled_weight(t.K, t.C, taps);
    return t;
  }

  ScalarType packed_dtype() const {
    return is_bfloat16() ? ScalarType::BFloat16 : ScalarType::Float;
  }
  int64_t source(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return k * stride.n + c * stride.c + r * stride.h + s * stride.w;
  }

 private:
  WeightShape(const Tensor& weight, int64_t group_count, const ConvIsa& its_isa)
      : PackedLayout(weight.size(0), weight.size(1), weight.size(2) * weight.size(3), group_count,
                     its_isa),
        R(weight.size(2)),
        S(weight.size(3)),
        stride(strides_of(weight)),
        isa(&its_isa) {}
};

// So many input channels of a tap are read at once, whole lines of memory: the rows of a block's
// output channels are often a power of two apart, and few such lines fit the first-level cache.
constexpr int64_t kPackedAtOnce = kTileDepth;

// One block of output channels, from `channel` on, `valid` of them.
template <class T>
void pack_block(const T* source, const WeightShape& shape, int64_t channel, int64_t valid,
                float* out) {
  const int64_t block_k = shape.block_k;
  const Strides& stride = shape.stride;
  T rows[64][kPackedAtOnce];
  for (int64_t tap = 0; tap < shape.R * shape.S; ++tap) {
    const T* from = source + shape.source(channel, 0, tap / shape.S, tap % shape.S);
    for (int64_t c0 = 0; c0 < shape.C; c0 += kPackedAtOnce) {
      const int64_t count = std::min(kPackedAtOnce, shape.C - c0);
      for (int64_t k = 0; k < valid; ++k) {
        const T* row = from + k * stride.n + c0 * stride.c;
        if (stride.c == 1) {
          std::memcpy(static_cast<void*>(rows[k]), row, static_cast<size_t>(count) * sizeof(T));
        } else {
          for (int64_t c = 0; c < count; ++c) rows[k][c] = row[c * stride.c];
        }
      }
      for (int64_t c = 0; c < count; ++c, out += block_k) {
        for (int64_t k = 0; k < valid; ++k) out[k] = static_cast<float>(rows[k][c]);
        std::fill(out + valid, out + block_k, 0.0f);
      }
    }
  }
}

// Two channels of the reduction for a tile's row: of output channels that lie together, or apart.
template <class T>
void pack_pair(const T* first, const T* second, int64_t stride, int64_t count, BFloat16* to) {
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) {
      to[2 * k] = static_cast<BFloat16>(first[k]);
      to[2 * k + 1] = static_cast<BFloat16>(second[k]);
    }
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    to[2 * k] = static_cast<BFloat16>(first[k * stride]);
    to[2 * k + 1] = static_cast<BFloat16>(second[k * stride]);
  }
}

// `count` channels of the reduction in pairs, those of a row's output channels together, `row`
// values from one pair to the next. What is behind the last channel is left as it is.
template <class T>
void pack_pairs(const T* from, int64_t next_k, int64_t next_c, int64_t count, int64_t valid,
                BFloat16* to, int64_t row) {
  for (int64_t c = 0; c + 1 < count; c += 2, to += row) {
    pack_pair(from + c * next_c, from + (c + 1) * next_c, next_k, valid, to);
  }
  if (count % 2 == 0) return;
  for (int64_t k = 0; k < valid; ++k) {
    to[2 * k] = static_cast<BFloat16>(from[(count - 1) * next_c + k * next_k]);
  }
}

template <class T>
void pack_block(const T* source, const WeightShape& shape, int64_t channel, int64_t valid,
                BFloat16* out) {
  const TiledWeight& tiles = shape.tiles;
  const Strides& stride = shape.stride;
  std::memset(static_cast<void*>(out), 0, static_cast<size_t>(shape.block_size()) * sizeof(*out));
  // The output channels of a row of pairs.
  const bool tiled = shape.kind == WeightLayout::kTiles;
  const int64_t width = tiled ? kTileRows : shape.block_k;
  const bool dense = tiled && tiles.dense;
  T rows[kTileBlockK][kPackedAtOnce];
  for (int64_t tap = 0; tap < shape.taps && !dense; ++tap) {
    const T* from = source + shape.source(channel, 0, tap / shape.S, tap % shape.S);
    for (int64_t c0 = 0; c0 < shape.C; c0 += kTileDepth, from += kTileDepth * stride.c) {
      const int64_t count = std::min(kTileDepth, shape.C - c0);
      const T* first = from;
      int64_t next_k = stride.n, next_c = stride.c;
      if (stride.n != 1) {
        for (int64_t k = 0; k < valid; ++k) {
          for (int64_t c = 0; c < count; ++c) rows[k][c] = from[k * stride.n + c * stride.c];
        }
        first = &rows[0][0], next_k = kPackedAtOnce, next_c = 1;
      }
      for (int64_t k = 0; k < valid; k += width) {
        pack_pairs(first + k * next_k, next_k, next_c, count, std::min(width, valid - k),
                   out + shape.place_in_block(k, c0, tap), 2 * width);
      }
    }
  }
  for (int64_t tap = 0; tap < shape.taps && dense; ++tap) {
    for (int64_t c = 0; c < shape.C; ++c) {
      const T* from = source + shape.source(channel, c, tap / shape.S, tap % shape.S);
      for (int64_t k = 0; k < valid; ++k) {
        out[tiled_weight_offset(tiles, 0, k, c, tap)] = static_cast<BFloat16>(from[k * stride.n]);
      }
    }
  }
}

// What packs a weight returns whether all of its values are finite.
template <class T, class Packed>
bool pack_as(const T* source, const WeightShape& shape, Packed* packed) {
  const int64_t block_k = shape.block_k, blocks = shape.blocks();
  const int64_t group_k = shape.K / shape.groups;
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, shape.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k0 = i % blocks * block_k;
      Packed* block = packed + i * shape.block_size();
      pack_block(source, shape, i / blocks * group_k + k0, std::min(block_k, group_k - k0), block);
      if (!all_finite(block, shape.block_size())) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load();
}

template <class T>
bool pack(const T* source, const WeightShape& shape, void* packed) {
  return shape.is_bfloat16() ? pack_as(source, shape, static_cast<BFloat16*>(packed))
                             : pack_as(source, shape, static_cast<float*>(packed));
}

// How many values of a weight each call compares with the packed copy. If one in a hundred has
// changed, 20 calls miss all of them with a probability of at most 0.99^1400 < 1e-6.
constexpr int64_t kSamples = 70;

template <class T>
uint32_t float32_bits(T value) {
  const float converted = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &converted, sizeof bits);
  return bits;
}

// Compares a sample of the weight with its packed copy, at other positions in every call. The
// caller keeps the two together by storage and version; this also sees updates that leave no
// version behind, such as `weight.data.mul_(0.9)`.
template <class T, class Packed>
bool sample_is_packed(const T* source, const WeightShape& shape, const Packed* packed) {
  static std::atomic<uint64_t> calls{0};
  const uint64_t call = calls.fetch_add(1, std::memory_order_relaxed);
  uint64_t state = call * kSamples;
  // All places first: many reads then wait for memory, and for its translation, at once.
  int64_t places[kSamples], packed_places[kSamples];
  for (int64_t i = 0; i < kSamples; ++i) {
    // Half a step of SplitMix64 (Steele, Lea and Flood, 2014), of which the upper bits are used:
    // 16 for a place in the i-th of kSamples parts of K, 20, 12 and 12 for those in C, R and S.
    uint64_t random = ++state * 0x9e3779b97f4a7c15;
    random = (random ^ (random >> 30)) * 0xbf58476d1ce4e5b9;
    const auto part = [&](int low, int bits) {
      return static_cast<int64_t>(random >> low & ((uint64_t{1} << bits) - 1));
    };
    const int64_t k = ((i << 16) + part(48, 16)) * shape.K / (kSamples << 16);
    const int64_t c = (part(28, 20) * shape.C) >> 20;
    const int64_t r = (part(16, 12) * shape.R) >> 12;
    const int64_t s = (part(4, 12) * shape.S) >> 12;
    places[i] = shape.source(k, c, r, s);
    packed_places[i] = shape.place(k, c, r * shape.S + s);
    __builtin_prefetch(source + places[i]);
    __builtin_prefetch(packed + packed_places[i]);
  }
  uint32_t difference = 0;
  for (int64_t i = 0; i < kSamples; ++i) {
    difference |= float32_bits(packed[packed_places[i]]) ^ float32_bits(source[places[i]]);
  }
  return difference == 0;
}

// Whether a packed block has the values of `valid` output channels from `channel` on.
template <class T>
bool block_is_packed(const T* source, const WeightShape& shape, int64_t channel, int64_t valid,
                     const float* block) {
  const int64_t taps = shape.R * shape.S;
  // The weight's innermost dimension innermost here, too: lines of it are then read once.
  const bool taps_inside = shape.stride.c != 1;
  const int64_t outer = taps_inside ? shape.C : taps, inner = taps_inside ? taps : shape.C;
  for (int64_t j = 0; j < outer; ++j) {
    uint32_t difference = 0;
    for (int64_t l = 0; l < inner; ++l) {
      const int64_t tap = taps_inside ? l : j, c = taps_inside ? j : l;
      const T* from = source + shape.source(channel, c, tap / shape.S, tap % shape.S);
      const float* to = block + (tap * shape.C + c) * shape.block_k;
      for (int64_t k = 0; k < valid; ++k) {
        difference |= float32_bits(from[k * shape.stride.n]) ^ float32_bits(to[k]);
      }
    }
    if (difference != 0) return false;
  }
  return true;
}

template <class T>
bool block_is_packed(const T* source, const WeightShape& shape, int64_t channel, int64_t valid,
                     const BFloat16* block) {
  for (int64_t c = 0; c < shape.C; ++c) {
    uint32_t difference = 0;
    for (int64_t tap = 0; tap < shape.R * shape.S; ++tap) {
      const T* from = source + shape.source(channel, c, tap / shape.S, tap % shape.S);
      for (int64_t k = 0; k < valid; ++k) {
        difference |= float32_bits(from[k * shape.stride.n]) ^
                      float32_bits(block[shape.place_in_block(k, c, tap)]);
      }
    }
    if (difference != 0) return false;
  }
  return true;
}

template <class T, class Packed>
bool blocks_are_packed(const T* source, const WeightShape& shape, const Packed* packed) {
  const int64_t blocks = shape.blocks(), group_k = shape.K / shape.groups;
  std::atomic<bool> same{true};
  torch::stable::parallel_for(0, shape.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      const int64_t k0 = i % blocks * shape.block_k;
      if (!block_is_packed(source, shape, i / blocks * group_k + k0,
                           std::min(shape.block_k, group_k - k0),
                           packed + i * shape.block_size())) {
        same.store(false, std::memory_order_relaxed);
      }
    }
  });
  return same.load();
}

// Compares all values.
template <class T>
bool whole_is_packed(const T* source, const WeightShape& shape, const void* packed) {
  return shape.is_bfloat16()
             ? blocks_are_packed(source, shape, static_cast<const BFloat16*>(packed))
             : blocks_are_packed(source, shape, static_cast<const float*>(packed));
}

void check_weight(const Tensor& weight, int64_t groups) {
  check_rank("conv_bn_act", "weight", weight, 4);
  check_floating("conv_bn_act", "weight", weight);
  const int64_t K = weight.size(0), C = weight.size(1);
  FR_CHECK(groups > 0 && K % groups == 0, "conv_bn_act: groups is ", groups,
           ", it must divide weight's ", K, " output channels");
  check_taps("conv_bn_act", weight);
  FR_CHECK(K > 0 && C > 0, "conv_bn_act: weight has shape ", shape_string(weight),
           ", must not be empty");
  FR_CHECK(conv_isa(weight.scalar_type(), groups, C, K / groups) != nullptr,
           "conv_bn_act: this processor has neither AVX2 nor AVX-512");
  // No group is packed with so many channels more than it has.
  checked_product("conv_bn_act", "weight", {K, C, weight.size(2), weight.size(3), 64, 4});
}

// What a packed weight was made of. It is kept in the packed tensor's strides, as those of
// dimensions of size one, which address nothing: so no packed weight is without it. Behind it is
// another one, 1 where all values are finite, else 0.
using Origin = std::array<int64_t, 11>;

Origin origin_of(const Tensor& weight, const WeightShape& shape, int64_t groups) {
  const Strides& s = shape.stride;
  return {static_cast<int64_t>(reinterpret_cast<intptr_t>(weight.const_data_ptr())),
          static_cast<int64_t>(weight.scalar_type()),
          groups,
          shape.K,
          shape.C,
          shape.R,
          shape.S,
          s.n,
          s.c,
          s.h,
          s.w};
}

// Whether `packed` was made of this weight, or one that lay like it in the same place.
bool has_origin(const Tensor& packed, const Tensor& weight, const WeightShape& shape,
                int64_t groups) {
  const Origin origin = origin_of(weight, shape, groups);
  const auto strides = packed.strides();
  const ScalarType dtype = packed.scalar_type();
  FR_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) &&
               packed.is_contiguous() && strides.size() == origin.size() + 2,
           "conv_bn_act: packed must be a result of pack_conv_weight");
  return dtype == shape.packed_dtype() && packed.numel() == shape.packed_size() &&
         std::equal(origin.begin(), origin.end(), strides.begin());
}

bool is_finite(const Tensor& packed) {
  constexpr size_t place = std::tuple_size_v<Origin>;
  const auto strides = packed.strides();
  return strides.size() <= place || strides[place] != 0;
}

// Whether `packed` has the weight's values, as far as a sample tells.
bool seems_current(const Tensor& packed, const Tensor& weight, const WeightShape& shape,
                   int64_t groups) {
  if (!has_origin(packed, weight, shape, groups)) return false;
  if (weight.numel() == 0) return true;
  return with_element_type(weight, "weight", [&](const auto* source) {
    const void* values = packed.const_data_ptr();
    return shape.is_bfloat16()
               ? sample_is_packed(source, shape, static_cast<const BFloat16*>(values))
               : sample_is_packed(source, shape, static_cast<const float*>(values));
  });
}

// ---- batch norm --------------------------------------------------------------------------------

// The channels of a batch-norm tensor as float32, in place where they already are.
const float* as_float32(const Tensor& source, const char* name, int64_t K,
                        std::vector<float>& copy) {
  FR_CHECK(source.dim() == 1 && source.size(0) == K, "conv_bn_act: ", name, " has shape ",
           shape_string(source), ", must have (", K, ",)");
  const int64_t stride = source.stride(0);
  if (source.scalar_type() == ScalarType::Float && stride == 1) {
    return static_cast<const float*>(source.const_data_ptr());
  }
  copy.resize(K);
  with_element_type(source, name, [&](const auto* p) {
    for (int64_t k = 0; k < K; ++k) copy[k] = static_cast<float>(p[k * stride]);
  });
  return copy.data();
}

// As F.batch_norm has it: the weight's dtype for all, or float32 for all beside 16-bit weights.
void check_norm_dtypes(const ConvLayer& layer) {
  const ScalarType dtype = layer.running_mean.scalar_type(), input = layer.weight.scalar_type();
  const bool alike = layer.running_var.scalar_type() == dtype &&
                     (!layer.bn_weight || layer.bn_weight->scalar_type() == dtype) &&
                     (!layer.bn_bias || layer.bn_bias->scalar_type() == dtype);
  FR_CHECK(alike && (dtype == input || dtype == ScalarType::Float),
           "conv_bn_act: the batch-norm tensors must all have weight's dtype, or float32");
  FR_CHECK(!layer.bias || layer.bias->scalar_type() == input,
           "conv_bn_act: bias must have weight's dtype");
}

}  // namespace

Dtype kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      FR_CHECK(false, "conv_bn_act: input must be float32, bfloat16 or float16");
  }
}

void check_taps(const char* op, const Tensor& weight) {
  const int64_t R = weight.size(2), S = weight.size(3);
  FR_CHECK(R > 0 && S > 0 && R <= kMaxRuns && S <= kMaxRuns && R * S <= kMaxRuns, op,
           ": weight has ", R, " x ", S, " taps, must have at least one and at most ", kMaxRuns);
}

void check_memory(const char* op, const Conv& conv) {
  constexpr int64_t kBytes = 8;
  const auto padded = [](int64_t size, int64_t padding) {
    return std::max<int64_t>(1, size + 2 * padding);
  };
  const int64_t H = padded(conv.H, conv.pad_h), W = padded(conv.W, conv.pad_w);
  // Slabs hold every value once a lane at most, and there is a list of all tiles.
  checked_product(op, "input", {conv.N, H, W, conv.C, 16, kBytes});
  checked_product(op, "the output", {conv.N, conv.K, H, W, 2, kBytes});
}

MaxPool make_pool(const std::vector<int64_t>& numbers, int64_t P, int64_t Q) {
  constexpr const char* op = "conv_bn_act";
  FR_CHECK(numbers.size() == 6, op, ": max_pool has ", numbers.size(), " numbers, must have 6");
  MaxPool pool{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], 0, 0};
  for (const int64_t kernel : {pool.kernel_h, pool.kernel_w}) {
    check_number(op, "max_pool's kernel size", kernel, 1, kLargestPool);
  }
  for (const int64_t stride : {pool.stride_h, pool.stride_w}) {
    check_number(op, "max_pool's stride", stride, 1);
  }
  check_number(op, "max_pool's padding", pool.pad_h, 0, pool.kernel_h / 2);
  check_number(op, "max_pool's padding", pool.pad_w, 0, pool.kernel_w / 2);
  FR_CHECK(P + 2 * pool.pad_h >= pool.kernel_h && Q + 2 * pool.pad_w >= pool.kernel_w, op,
           ": max_pool's window does not fit its input, ", P, " x ", Q);
  pool.P = (P + 2 * pool.pad_h - pool.kernel_h) / pool.stride_h + 1;
  pool.Q = (Q + 2 * pool.pad_w - pool.kernel_w) / pool.stride_w + 1;
  // A stride beyond the image is never gone, but tasks are sized by it.
  if (pool.P == 1) pool.stride_h = 1;
  if (pool.Q == 1) pool.stride_w = 1;
  return pool;
}

Tensor pack_conv_weight(Tensor weight, int64_t groups) {
  check_weight(weight, groups);
  const WeightShape shape(weight, groups);
  const Origin origin = origin_of(weight, shape, groups);
  std::vector<int64_t> sizes(origin.size() + 1, 1), strides(origin.begin(), origin.end());
  sizes.push_back(shape.packed_size());
  Memory memory = allocated(sizes, shape.packed_dtype(), weight_allocate, weight_release);
  const bool finite = with_element_type(
      weight, "weight", [&](const auto* source) { return pack(source, shape, memory.get()); });
  strides.insert(strides.end(), {finite ? 1 : 0, 1});
  return tensor_in(std::move(memory), sizes, strides, shape.packed_dtype());
}

bool conv_weight_is_packed(Tensor weight, Tensor packed, int64_t groups) {
  check_weight(weight, groups);
  const WeightShape shape(weight, groups);
  if (!has_origin(packed, weight, shape, groups)) return false;
  if (weight.numel() == 0) return true;
  return with_element_type(weight, "weight", [&](const auto* source) {
    return whole_is_packed(source, shape, packed.const_data_ptr());
  });
}

PackedWeight pack_for_one_call(Tensor weight, int64_t groups) {
  check_weight(weight, groups);
  const WeightShape shape(weight, groups);
  Tensor packed = pool_tensor({shape.packed_size()}, {1}, shape.packed_dtype());
  const bool finite = with_element_type(weight, "weight", [&](const auto* source) {
    return pack(source, shape, packed.mutable_data_ptr());
  });
  return {packed, finite};
}

PackedWeight pack_transposed_bfloat16(Tensor weight) {
  const WeightShape shape(weight, 1), transposed = shape.transposed();
  Tensor packed = pool_tensor({transposed.packed_size()}, {1}, transposed.packed_dtype());
  const bool finite = with_element_type(weight, "weight", [&](const auto* source) {
    return pack(source + shape.source(0, 0, shape.R - 1, shape.S - 1), transposed,
                packed.mutable_data_ptr());
  });
  return {packed, finite};
}

ConvLayer lent(PlanRecording& recording, const ConvLayer& layer) {
  ConvLayer result = layer;
  result.weight = recording.lent_and_copied(layer.weight);
  for (Tensor* tensor : {&result.running_mean, &result.running_var}) {
    *tensor = recording.lent(*tensor);
  }
  for (std::optional<Tensor>* tensor : {&result.bn_weight, &result.bn_bias, &result.bias}) {
    *tensor = recording.lent(*tensor);
  }
  return result;
}

bool seems_current(const ConvLayer& layer) {
  check_weight(layer.weight, layer.groups);
  return seems_current(layer.packed, layer.weight, WeightShape(layer.weight, layer.groups),
                       layer.groups);
}

Conv conv_geometry(const ConvLayer& layer, int64_t N, int64_t C, int64_t H, int64_t W,
                   ScalarType dtype) {
  const Tensor& weight = layer.weight;
  check_weight(weight, layer.groups);
  FR_CHECK(C % layer.groups == 0 && C / layer.groups == weight.size(1), "conv_bn_act: weight has ",
           weight.size(1), " input channels a group, input has ", C, " (groups=", layer.groups,
           ")");
  check_dtype("conv_bn_act", "input", weight, dtype);
  const FilterAxis rows("conv_bn_act", H, weight.size(2), layer.stride_h, layer.pad_h, layer.dil_h);
  const FilterAxis columns("conv_bn_act", W, weight.size(3), layer.stride_w, layer.pad_w,
                           layer.dil_w);
  Conv conv{};
  conv.N = conv.batch = N;
  conv.C = C;
  conv.H = H;
  conv.W = conv.last_w = W;
  conv.K = weight.size(0);
  conv.R = weight.size(2);
  conv.S = weight.size(3);
  // A stride beyond the image is never gone, but tasks are sized by it.
  conv.stride_h = std::min(layer.stride_h, rows.padded);
  conv.stride_w = std::min(layer.stride_w, columns.padded);
  conv.pad_h = layer.pad_h;
  conv.pad_w = layer.pad_w;
  conv.dil_h = layer.dil_h;
  conv.dil_w = layer.dil_w;
  conv.groups = layer.groups;
  conv.dtype = kernel_dtype(dtype);
  conv.P = rows.outputs;
  conv.Q = conv.last_q = columns.outputs;
  check_memory("conv_bn_act", conv);
  const WeightShape shape(weight, layer.groups);
  conv.isa = shape.isa;
  conv.expanded = shape.expanded;
  return conv;
}

PreparedLayer::PreparedLayer(const ConvLayer& layer, int64_t N, int64_t C, int64_t H, int64_t W,
                             ScalarType dtype, bool compares)
    : conv(conv_geometry(layer, N, C, H, W, dtype)), is_current(false) {
  const Tensor& weight = layer.weight;
  check_eps("conv_bn_act", layer.eps);
  check_norm_dtypes(layer);
  const WeightShape shape(weight, layer.groups);
  is_current = !compares || seems_current(layer.packed, weight, shape, layer.groups);
  conv.weight = layer.packed.const_data_ptr();
  conv.weight_is_finite = is_finite(layer.packed);
  conv.norm.mean = as_float32(layer.running_mean, "running_mean", conv.K, copies_[0]);
  conv.norm.var = as_float32(layer.running_var, "running_var", conv.K, copies_[1]);
  if (layer.bn_weight) {
    conv.norm.weight = as_float32(*layer.bn_weight, "bn_weight", conv.K, copies_[2]);
  }
  if (layer.bn_bias) conv.norm.bias = as_float32(*layer.bn_bias, "bn_bias", conv.K, copies_[3]);
  if (layer.bias) conv.bias = as_float32(*layer.bias, "bias", conv.K, copies_[4]);
  conv.norm.eps = static_cast<float>(layer.eps);
}

bool PreparedLayer::has_norm_of(const ConvLayer& layer) const {
  const auto at = [](const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; };
  const Tensor* sources[5] = {&layer.running_mean, &layer.running_var, at(layer.bn_weight),
                              at(layer.bn_bias), at(layer.bias)};
  for (int i = 0; i < 5; ++i) {
    const std::vector<float>& copy = copies_[i];
    if (copy.empty()) continue;
    const int64_t stride = sources[i]->stride(0), count = static_cast<int64_t>(copy.size());
    const bool same = with_element_type(*sources[i], "a batch-norm tensor", [&](const auto* now) {
      uint32_t difference = 0;
      for (int64_t k = 0; k < count; ++k) {
        difference |= float32_bits(now[k * stride]) ^ float32_bits(copy[static_cast<size_t>(k)]);
      }
      return difference == 0;
    });
    if (!same) return false;
  }
  return true;
}

Prologue::Prologue(const InputNorm& norm, int64_t C, ScalarType dtype)
    : scale_(C + kPrologueSlack), shift_(C + kPrologueSlack) {
  std::vector<float> copies[4];
  auto data = [&](const Tensor& tensor, const char* name, int i) {
    const ScalarType own = tensor.scalar_type();
    FR_CHECK(own == dtype || own == ScalarType::Float, "norm_conv_bn_act: ", name,
             " must have input's dtype, or float32");
    return as_float32(tensor, name, C, copies[i]);
  };
  const float* mean = data(norm.mean, "in_mean", 0);
  const float* var = data(norm.var, "in_var", 1);
  const float* weight = norm.weight ? data(*norm.weight, "in_weight", 2) : nullptr;
  const float* bias = norm.bias ? data(*norm.bias, "in_bias", 3) : nullptr;
  for (int64_t c = 0; c < C; ++c) {
    const double invstd = 1 / std::sqrt(static_cast<double>(var[c]) + norm.eps);
    scale_[c] = static_cast<float>(invstd * (weight ? static_cast<double>(weight[c]) : 1));
    shift_[c] = static_cast<float>((bias ? static_cast<double>(bias[c]) : 0) -
                                   static_cast<double>(mean[c]) * static_cast<double>(scale_[c]));
  }
}

void Prologue::add_to(Conv& conv) const {
  conv.in_scale = scale_.data();
  conv.in_shift = shift_.data();
}

// ---- tasks -------------------------------------------------------------------------------------

namespace {

bool evenly_spaced(const Strides& s, int64_t width) {
  return s.h == width * s.w;
}

// A pointwise convolution does not care where a row ends, nor, where the next image follows at
// once, where an image ends.
void flatten_pixels(Conv& conv) {
  if (!is_pointwise(conv) || conv.has_pool || conv.stride_h != 1 || conv.stride_w != 1 ||
      conv.pad_h != 0 || conv.pad_w != 0 || !evenly_spaced(conv.in, conv.W) ||
      !evenly_spaced(conv.out, conv.Q) ||
      (conv.residual != nullptr && !evenly_spaced(conv.res, conv.Q))) {
    return;
  }
  int64_t pixels = conv.P * conv.Q;
  auto images_follow = [&](const Strides& s) { return s.n == pixels * s.w; };
  if (images_follow(conv.in) && images_follow(conv.out) &&
      (conv.residual == nullptr || images_follow(conv.res))) {
    pixels *= conv.N;
    conv.N = 1;
  }
  conv.W = conv.Q = std::min(conv.isa->flat_row, pixels);
  conv.H = conv.P = div_up(pixels, conv.Q);
  conv.last_w = conv.last_q = pixels - (conv.P - 1) * conv.Q;
  for (Strides* s : {&conv.in, &conv.out, &conv.res}) s->h = conv.Q * s->w;
}

struct Split {
  int64_t rows, row_tasks;      // output rows in a task, tasks along the rows
  int64_t blocks, block_tasks;  // likewise blocks of output channels
};

// Two ways to share the work out. Where a thread would have few pixels for each weight it reads,
// late in a network at batch 1, threads divide the output channels, and each reads only its part of
// the weights. Elsewhere they divide the rows; a task takes as many as its caches hold.
Split split(const Conv& conv, int64_t block_k, int64_t threads) {
  const int64_t item = conv.isa->item;
  const int64_t rows = task_rows(conv);
  const int64_t blocks = div_up(group_k(conv), block_k);
  const int64_t weight_bytes = reduction(conv) * group_k(conv) * item;
  const bool streams_weights = weight_bytes > l2_bytes() / 2;
  const bool few_pixels = rows * conv.Q < 128 * threads;
  // bfloat16 on tiles is faster than its weights come; but pixels with more channels than there are
  // outputs would come from the other threads' caches.
  const bool waits_for_weights = item == 2 && conv.isa->layout != WeightLayout::kPairs &&
                                 weight_bytes > l2_bytes() / 8 && group_k(conv) >= group_c(conv);
  // In parts on tiles: every task splits its weights, which takes as long as 25 pixels.
  const bool splits = conv.dtype != Dtype::kBFloat16 && conv.isa != vector_isa();

  Split s;
  s.block_tasks = conv.expanded ? blocks : 1;
  if (!conv.has_pool && !conv.expanded &&
      (((streams_weights || waits_for_weights) && few_pixels) || rows < 2 * threads)) {
    s.block_tasks = std::min(threads, blocks);
  }
  s.blocks = div_up(blocks, s.block_tasks);
  s.block_tasks = div_up(blocks, s.blocks);

  // The most rows whose input fits half of the second-level cache, or what two blocks of weights,
  // the current and the next, leave of it: every block reads it again. Pooled rows are there too.
  const int64_t in_pixels = (conv.R == 1 ? 1 : conv.stride_h) * (conv.S == 1 ? conv.Q : conv.W);
  int64_t row_bytes = in_pixels * group_c(conv) * (conv.expanded ? block_k : 1) * item;
  if (conv.has_pool) row_bytes = conv.pool.stride_h * (row_bytes + conv.Q * conv.K * item);
  const int64_t block_bytes = reduction(conv) * block_k * item;
  // Of weights in parts one block is there.
  const int64_t coming = splits ? 1 : 2;
  int64_t budget = std::clamp(l2_bytes() - coming * block_bytes, l2_bytes() / 8, l2_bytes() / 2);
  // Rows on their way to the pool may go beyond: to compute more of them twice takes longer.
  if (conv.has_pool) budget = std::max<int64_t>(budget, 1 << 20);
  // But weights that come from beyond that cache for every task meet pixels enough there.
  const int64_t least = streams_weights ? std::min(rows, div_up(28, conv.Q)) : 1;
  const int64_t most = std::clamp<int64_t>(budget / std::max<int64_t>(row_bytes, 1), least, rows);

  // Of the numbers of tasks from there on, the one that takes the least time, in units of the
  // ideal.
  const int64_t row_threads = std::max<int64_t>(1, threads / (s.block_tasks * work_groups(conv)));
  const int64_t fewest = div_up(rows, most);
  // A task on expanded groups has one block of output channels.
  const int64_t task_k = conv.expanded ? block_k : group_k(conv);
  // In cycles: a task's beginning, and each of its blocks' batch norm; all of the arithmetic.
  const double overhead = 3000.0 + 100.0 * static_cast<double>(s.blocks);
  const double arithmetic = static_cast<double>(rows * conv.Q) *
                            static_cast<double>(reduction(conv) * task_k) /
                            (static_cast<double>(threads) * conv.isa->rate);
  double best = 0;
  for (int64_t tasks = fewest; tasks <= std::min(rows, fewest + 8 * row_threads); ++tasks) {
    const int64_t r = div_up(rows, tasks), rounds = div_up(tasks, row_threads);
    const double task_rows = static_cast<double>(r);
    // The share of the busiest thread,
    double cost = task_rows * static_cast<double>(rounds * row_threads) / static_cast<double>(rows);
    // the halo, gathered by every task again,
    cost +=
        0.02 * static_cast<double>(conv.R - 1) / (task_rows * static_cast<double>(conv.stride_h));
    // rows that are under the windows of two tasks, computed by both,
    if (conv.has_pool) {
      cost += static_cast<double>(std::max<int64_t>(0, conv.pool.kernel_h - conv.pool.stride_h)) /
              (task_rows * static_cast<double>(conv.pool.stride_h));
    }
    // weights that come from beyond the cache for every task,
    if (splits) cost += 25.0 / (task_rows * static_cast<double>(conv.Q));
    if (streams_weights) cost += 10.0 / (task_rows * static_cast<double>(conv.Q));
    // what a task costs in itself,
    cost += overhead * static_cast<double>(rounds) / arithmetic;
    // and what a thread that falls behind can leave to the others.
    if (row_threads > 1) cost += 0.03 / static_cast<double>(rounds);
    if (tasks == fewest || cost < best) {
      best = cost;
      s.rows = r;
    }
  }
  s.row_tasks = div_up(rows, s.rows);
  return s;
}

// The same for Winograd's tiles. Every task transforms its inputs, and the weights of each of its
// blocks of output channels; what it has transformed stays in its cache.
Split split_winograd(const Conv& conv, int64_t block_k, int64_t threads) {
  const int64_t rows = task_rows(conv), blocks = div_up(conv.K, block_k);
  const int64_t row_tiles = div_up(conv.Q, kWinogradTile);
  // Of a tile: 16 values a channel, and, where sums are made of more than one, a block's sums.
  const int64_t row_bytes = row_tiles * 16 * (conv.C + block_k) * 4;
  const int64_t most = std::clamp<int64_t>(l2_bytes() * 5 / 8 / row_bytes, 1, rows);
  const auto lanes = static_cast<double>(conv.isa->lanes), c = static_cast<double>(conv.C);
  Split best{};
  double least = 0;
  for (const int64_t wanted : {int64_t{1}, std::min(threads, blocks)}) {
    const int64_t in_task = div_up(blocks, wanted), block_tasks = div_up(blocks, in_task);
    const int64_t fewest = div_up(rows, most);
    for (int64_t tasks = fewest; tasks <= std::min(rows, fewest + 8 * threads); ++tasks) {
      const int64_t in_rows = div_up(rows, tasks), row_tasks = div_up(rows, in_rows);
      const int64_t rounds = div_up(row_tasks * block_tasks, threads);
      // In vector operations of a tile's channel: 16 products, 40 to transform it, 50 and more of a
      // weight, which comes from beyond the cache.
      const auto tiles = static_cast<double>(in_rows * row_tiles);
      const double block_vectors = static_cast<double>(in_task * block_k) / lanes;
      const double task = tiles * c * 40 / lanes + block_vectors * c * 100 +
                          tiles * block_vectors * (c * 16 + 100) + 5000;
      const double cost =
          static_cast<double>(rounds) * task * (1 + 0.03 / static_cast<double>(rounds));
      if (least == 0 || cost < least) {
        least = cost;
        best = {in_rows, row_tasks, in_task, block_tasks};
      }
    }
  }
  return best;
}

// A task's copy of its input, with all of the padding, must have a size that can be counted.
void check_scratch_size(const Conv& conv) {
  const double rows = static_cast<double>(conv.H) + 2.0 * static_cast<double>(conv.pad_h);
  const double columns = static_cast<double>(conv.W) + 2.0 * static_cast<double>(conv.pad_w);
  const double values = rows * columns * static_cast<double>(conv.N) * static_cast<double>(conv.C);
  STD_TORCH_CHECK(values < 0x1p56, "conv_bn_act: the padded input, ", rows, " x ", columns,
                  ", is too large");
}

}  // namespace

namespace {

void run_tasks(Conv conv, bool is_direct, RowStatistics* statistics);

// An image at a time, for what is kept of its border.
void run_with_border(const Conv& conv) {
  const int64_t item = conv.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto image_of = [&](const void* tensor, int64_t stride, int64_t n) {
    return tensor == nullptr ? nullptr : static_cast<const char*>(tensor) + n * stride * item;
  };
  const PackedLayout layout(conv.K, group_c(conv), conv.R * conv.S, conv.groups, *conv.isa);
  for (int64_t n = 0; n < conv.N; ++n) {
    Conv image = conv;
    image.N = 1;
    image.batch = std::max(conv.batch, conv.N);  // by which a kernel is chosen
    image.weight_is_finite = true;
    image.input = image_of(conv.input, conv.in.n, n);
    image.residual = image_of(conv.residual, conv.res.n, n);
    image.output = static_cast<char*>(conv.output) + n * conv.out.n * item;
    const BorderOutputs border(image, layout);
    run_tasks(image, true, nullptr);
    border.store(image);
  }
}

// Directly: no sums of several inputs or weights are to be multiplied.
void run_tasks(Conv conv, bool is_direct, RowStatistics* statistics) {
  if (conv.dtype != Dtype::kBFloat16) {
    conv.weight_block = conv.isa->block_k;
    conv.isa = &isa_in_parts(conv);
  }
  if (!is_direct && uses_winograd(conv)) conv.isa = winograd_of(conv.isa);
  flatten_pixels(conv);
  const ConvIsa& isa = *conv.isa;
  conv.keeps_weight = reduction(conv) * group_k(conv) * isa.item <= l2_bytes() / 2;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block_k = conv.expanded ? isa.lanes : isa.block_k;
  const Split s =
      row_step(conv) > 1 ? split_winograd(conv, block_k, threads) : split(conv, block_k, threads);
  const int64_t rows = task_rows(conv);
  const int64_t blocks = div_up(group_k(conv), block_k);
  const int64_t tasks = s.row_tasks * s.block_tasks * work_groups(conv);

  if (statistics != nullptr) statistics->begin(conv);

  const auto run_task = [&](int64_t i, bool is_last) {
    // Rows vary fastest: a thread goes on with the weights it has in its cache.
    const int64_t row_task = i % s.row_tasks, rest = i / s.row_tasks;
    Task task;
    task.row_begin = row_task * s.rows;
    task.row_end = std::min(rows, task.row_begin + s.rows);
    task.block_begin = rest % s.block_tasks * s.blocks;
    task.block_end = std::min(blocks, task.block_begin + s.blocks);
    task.group = rest / s.block_tasks;
    if (is_last) task.ahead_bytes = l2_bytes() / 4;
    const Scratch scratch(static_cast<size_t>(isa.scratch_bytes(conv, task)));
    isa.run(conv, task, scratch.get());
    if (statistics == nullptr) return;
    const int64_t first = task.group * group_k(conv);
    const int64_t step = row_step(conv), in_image = div_up(conv.P, step);
    const auto output_row = [&](int64_t row) {
      return row / in_image * conv.P + row % in_image * step;
    };
    statistics->add(conv, output_row(task.row_begin), output_row(task.row_end),
                    first + task.block_begin * block_k,
                    first + std::min(group_k(conv), task.block_end * block_k));
  };
  share_tasks(tasks, 1, run_task);
}

}  // namespace

void run_conv(Conv conv, RowStatistics* statistics) {
  if (conv.N == 0) return;
  check_scratch_size(conv);
  if (!conv.weight_is_finite && (conv.pad_h > 0 || conv.pad_w > 0)) return run_with_border(conv);
  run_tasks(conv, !conv.weight_is_finite, statistics);
}

// ---- tensors -----------------------------------------------------------------------------------

Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Strides dense_strides(int64_t C, int64_t H, int64_t W, bool channels_last) {
  return channels_last ? Strides{C * H * W, 1, W * C, C} : Strides{C * H * W, H * W, W, 1};
}

// Bytes of a dense tensor. Throws where they cannot be counted.
int64_t dense_bytes(const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double  ? 8
                  : dtype == ScalarType::Float ? 4
                  : dtype == ScalarType::Byte  ? 1
                                               : 2;
  bool overflows = false;
  for (const int64_t size : sizes) overflows |= __builtin_mul_overflow(bytes, size, &bytes);
  if (!overflows) return bytes;
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : " x ") + std::to_string(size);
  STD_TORCH_CHECK(false, "conv_bn_act: a tensor of ", shape, " is too large");
}

namespace {

Memory allocated(const std::vector<int64_t>& sizes, ScalarType dtype, void* (*allocate)(size_t),
                 void (*release)(void*)) {
  return {allocate(static_cast<size_t>(dense_bytes(sizes, dtype))), release};
}

Tensor tensor_in(Memory memory, const std::vector<int64_t>& sizes,
                 const std::vector<int64_t>& strides, ScalarType dtype) {
  const auto release = memory.get_deleter();
  return torch::stable::from_blob(memory.release(), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  release);
}

// Whether tensors lie in the pool's memory. They cannot be resized there: the stable ABI has no way
// to make such a storage.
bool uses_pool() {
  static const std::string chosen = [] {
    const char* value = std::getenv("FUSED_RESNET_CPU_POOL");
    return std::string(value == nullptr || *value == 0 ? "1" : value);
  }();
  STD_TORCH_CHECK(chosen == "0" || chosen == "1", "FUSED_RESNET_CPU_POOL is '", chosen,
                  "', must be 0 or 1");
  return chosen == "1";
}

}  // namespace

Tensor pool_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   ScalarType dtype) {
  if (!uses_pool()) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
  return tensor_in(allocated(sizes, dtype, pool_allocate, pool_release), sizes, strides, dtype);
}

Tensor empty_activation(int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype,
                        bool channels_last) {
  dense_bytes({N, C, H, W}, dtype);  // before the strides' products
  const Strides s = dense_strides(C, H, W, channels_last);
  return pool_tensor({N, C, H, W}, {s.n, s.c, s.h, s.w}, dtype);
}

}  // namespace fused_resnet::cpu
