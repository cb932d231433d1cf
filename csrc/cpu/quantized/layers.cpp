#include "cpu/quantized/layers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/conv_layer.h"
#include "cpu/isa.h"
#include "memory_format.h"

namespace fused_resnet::cpu {
namespace {

// The kernels that run here, the fastest first.
std::vector<const ByteKernels*> available_kernels() {
  std::vector<const ByteKernels*> kernels;
#if defined(__x86_64__)
  if (has_int8_tiles()) kernels.push_back(&kBytesAmx);
#endif
  if (tile_unit() == TileUnit::emulated) kernels.push_back(&kBytesAmxEmulated);
#if defined(__x86_64__)
  if (has_vnni()) kernels.push_back(&kBytesAvx512Vnni);
  if (has_avx_vnni()) kernels.push_back(&kBytesAvxVnni);
  if (cpu_isa() == Isa::avx512) kernels.push_back(&kBytesAvx512);
  if (cpu_isa() >= Isa::avx2) kernels.push_back(&kBytesAvx2);
#endif
  kernels.push_back(&kBytesBaseline);
  if (tile_unit() != TileUnit::emulated) kernels.push_back(&kBytesAmxEmulated);
  return kernels;
}

std::string quantized_kernels() {
  std::string names;
  for (const ByteKernels* kernels : available_kernels()) {
    if (!names.empty()) names += ',';
    names += kernels->name;
  }
  return names;
}

// ---- weights -----------------------------------------------------------------------------------

ByteFilter make_filter(const char* op, int64_t K, int64_t C, int64_t R, int64_t S,
                       int64_t dilation_w, int64_t groups, int64_t unit) {
  for (const int64_t size : {K, C, R, S}) check_number(op, "weight's size", size, 1, 1 << 24);
  check_number(op, "groups", groups, 1, K);
  check_number(op, "unit", unit, 1, kByteChunk);
  FR_CHECK(K % groups == 0, op, ": groups is ", groups, ", it must divide weight's ", K,
           " output channels");
  const int64_t reduction = checked_product(op, "weight", {C, R, S, 255, 128});
  FR_CHECK(reduction <= INT32_MAX, op, ": weight has ", C * R * S,
           " values a filter, too many for sums of 32 bits");
  checked_product(op, "weight", {K + kByteBlockK, R, S, C * groups + kByteChunk, 8});
  return {K, C, R, S, groups, groups == 1 && dilation_w == 1, unit};
}

Tensor packed_memory(int64_t bytes) {
  void* memory = weight_allocate(static_cast<size_t>(bytes));
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return torch::stable::from_blob(memory, {bytes}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Char, weight_release);
}

int64_t weights_begin(const ByteListsLayout& layout, int64_t steps) {
  return bytes_round_up(layout.steps() + steps * static_cast<int64_t>(sizeof(uint32_t)), 64);
}

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
  // Whether the products of this byte and the next one's weights with any bytes of up to 255 fit 16
  // bits together: if the weights' signs differ they do, else if their sum is within -128 and 128.
  bool fits(int64_t run, int64_t byte) const {
    for (int64_t k = 0; k < kListChannels; ++k) {
      const int sum = at(run, byte, k) + at(run, byte + 1, k);
      if (sum < -128 || sum > 128) return false;
    }
    return true;
  }

 private:
  const ByteFilter& filter_;
  const int64_t run_bytes_;
  const int8_t* first_;
};

// Calls take(run, byte, begin, end) for the steps of a list: from `byte` on, with the weights of
// the bytes [begin, end). Two products are added in 16 bits, those of a step's first two bytes and
// of its last two, so a step ends before the second of two weights that do not fit; a step that
// would end behind its first begins a byte earlier instead, so that they are not neighbours in it.
// No other choice makes fewer steps: whatever covers the bytes from one on covers those from the
// next on. Most have four weights, and at worst each has two.
template <class Take>
void for_each_step(const ListedColumns& columns, int64_t runs, const Take& take) {
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
      take(run, first, byte, end);
      byte = end;
    }
  }
}

// A weight as lists, from its tiles and the vectors behind them.
Tensor pack_lists(const int8_t* tiles, const ByteFilter& filter) {
  const ByteListsLayout layout{filter.padded_k()};
  std::vector<ByteList> lists(static_cast<size_t>(layout.count()));
  torch::stable::parallel_for(0, layout.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t count = 0;
      for_each_step(ListedColumns(tiles, filter, i), filter.runs(),
                    [&](int64_t, int64_t, int64_t, int64_t) { ++count; });
      lists[static_cast<size_t>(i)].count = count;
    }
  });
  int64_t steps = 0;
  for (const ByteList& list : lists) steps += list.count;
  const int64_t first = weights_begin(layout, steps);
  int64_t before = 0;
  for (ByteList& list : lists) {
    list.steps = layout.steps() + before * static_cast<int64_t>(sizeof(uint32_t));
    list.weights = first + before * kListBytes;
    before += list.count;
  }
  Tensor packed = packed_memory(first + steps * kListBytes);
  int8_t* memory = static_cast<int8_t*>(packed.mutable_data_ptr());
  std::memcpy(memory, tiles + filter.vectors(), static_cast<size_t>(layout.lists()));
  std::memcpy(memory + layout.lists(), lists.data(), lists.size() * sizeof(ByteList));
  torch::stable::parallel_for(0, layout.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ListedColumns columns(tiles, filter, i);
      uint32_t* step = reinterpret_cast<uint32_t*>(memory + lists[static_cast<size_t>(i)].steps);
      int8_t* weight = memory + lists[static_cast<size_t>(i)].weights;
      for_each_step(columns, filter.runs(),
                    [&](int64_t run, int64_t byte, int64_t covered, int64_t end_of_covered) {
                      *step++ = static_cast<uint32_t>(run * columns.run_bytes() + byte);
                      for (int64_t b = covered; b < end_of_covered; ++b) {
                        for (int64_t k = 0; k < kListChannels; ++k) {
                          weight[k * 4 + b - byte] = static_cast<int8_t>(columns.at(run, b, k));
                        }
                      }
                      weight += kListBytes;
                    });
    }
  });
  return packed;
}

Tensor pack_quantized_conv(Tensor weight, Tensor scale, Tensor shift, int64_t dilation_w,
                           int64_t groups, int64_t unit, std::string kernels) {
  constexpr const char* op = "pack_quantized_conv";
  check_rank(op, "weight", weight, 4);
  FR_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8");
  const ByteFilter filter = make_filter(op, weight.size(0), weight.size(1), weight.size(2),
                                        weight.size(3), dilation_w, groups, unit);
  const ByteLayout layout = byte_kernels(op, kernels).layout;
  for (const auto& [vector, name] : {std::pair{scale, "scale"}, std::pair{shift, "shift"}}) {
    FR_CHECK(vector.dim() == 1 && vector.size(0) == filter.K &&
                 vector.scalar_type() == ScalarType::Float,
             op, ": ", name, " must be float32 (", filter.K, ",)");
  }
  Tensor packed = packed_memory(filter.packed_bytes());
  int8_t* tiles = static_cast<int8_t*>(packed.mutable_data_ptr());
  float* vectors = reinterpret_cast<float*>(tiles + filter.vectors());
  int32_t* sums = reinterpret_cast<int32_t*>(vectors + 2 * filter.padded_k());
  const int8_t* source = static_cast<const int8_t*>(weight.const_data_ptr());
  const float* scales = static_cast<const float*>(scale.const_data_ptr());
  const float* shifts = static_cast<const float*>(shift.const_data_ptr());
  const Strides stride = strides_of(weight);
  torch::stable::parallel_for(0, filter.K, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      int32_t sum = 0;
      for (int64_t c = 0; c < filter.C; ++c) {
        for (int64_t r = 0; r < filter.R; ++r) {
          for (int64_t s = 0; s < filter.S; ++s) {
            const int8_t value = source[k * stride.n + c * stride.c + r * stride.h + s * stride.w];
            tiles[filter.place(k, c, r, s)] = value;
            sum += value;
          }
        }
      }
      sums[k] = sum;
      vectors[k] = scales[k * scale.stride(0)];
      vectors[filter.padded_k() + k] = shifts[k * shift.stride(0)];
    }
  });
  return layout == ByteLayout::lists ? pack_lists(tiles, filter) : packed;
}

template <class T>
void gather_as(const char* source, int64_t stride, int64_t count, void* target) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(static_cast<T*>(target) + i, source + i * stride * static_cast<int64_t>(sizeof(T)),
                sizeof(T));
  }
}

template <class T>
void scatter(const void* source, int64_t stride, int64_t count, char* target) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(target + i * stride * static_cast<int64_t>(sizeof(T)),
                static_cast<const T*>(source) + i, sizeof(T));
  }
}

}  // namespace

const ByteKernels& byte_kernels(const char* op, const std::string& name) {
  static const std::vector<const ByteKernels*> available = available_kernels();
  if (name.empty()) return *available[0];
  for (const ByteKernels* kernels : available) {
    if (kernels->name == name) return *kernels;
  }
  FR_CHECK(false, op, ": there are no kernels '", name, "' here");
}

Images::Images(const char* op, ByteImages images, int64_t beyond) : view(images) {
  checked_product(op, "an activation",
                  {std::max<int64_t>(1, view.N), view.H + 2 * view.halo_h, view.W + 2 * view.halo_w,
                   view.C + kBytePixel, 4});
  memory_ = pool_allocate(static_cast<size_t>(view.pixels() * view.pixel() + beyond));
  view.data = static_cast<uint8_t*>(memory_);
}

void Images::fill_halo(int value) {
  const size_t pixel = static_cast<size_t>(view.pixel());
  const auto fill = [&](int64_t position, int64_t pixels) {
    std::memset(view.data + position * view.pixel(), value, static_cast<size_t>(pixels) * pixel);
  };
  const int64_t N = view.N, H = view.H;
  if (view.halo_h > 0) {
    for (int64_t n = 0; n <= N; ++n)
      fill(n * view.lines() * view.pitch(), view.halo_h * view.pitch());
  }
  if (view.halo_w > 0) {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t h = 0; h < H; ++h) fill(view.position(n, h, -view.halo_w), view.halo_w);
    }
    fill(view.pixels() - view.halo_w, view.halo_w);
  }
}

// Some images of a batch.
ByteImages slice_images(ByteImages images, int64_t begin, int64_t count) {
  images.data += begin * images.lines() * images.pitch() * images.pixel();
  images.N = count;
  return images;
}

namespace {

void check_lists(const char* op, const Tensor& packed, const ByteFilter& filter) {
  const ByteListsLayout layout{filter.padded_k()};
  const int64_t numel = packed.numel();
  FR_CHECK(numel >= layout.steps(), op, ": packed has ", numel, " elements, the weight needs ",
           layout.steps(), " and its lists");
  const int8_t* memory = static_cast<const int8_t*>(packed.const_data_ptr());
  const ByteList* lists = reinterpret_cast<const ByteList*>(memory + layout.lists());
  bool right = reinterpret_cast<uintptr_t>(memory) % alignof(ByteList) == 0;
  int64_t steps = 0;
  for (int64_t i = 0; right && i < layout.count(); ++i) {
    right = lists[i].count >= 0 && lists[i].count <= numel;
    if (right) steps += lists[i].count;
  }
  const int64_t first = right ? weights_begin(layout, steps) : 0;
  right = right && numel == first + steps * kListBytes;
  int64_t before = 0;
  for (int64_t i = 0; right && i < layout.count(); ++i) {
    right = lists[i].steps == layout.steps() + before * static_cast<int64_t>(sizeof(uint32_t)) &&
            lists[i].weights == first + before * kListBytes;
    before += lists[i].count;
  }
  if (right) {
    const uint32_t* step = reinterpret_cast<const uint32_t*>(memory + layout.steps());
    const uint32_t end = static_cast<uint32_t>(filter.all_steps() * 4);
    uint32_t beyond = 0;
    for (int64_t i = 0; i < steps; ++i) beyond |= step[i] >= end ? 1 : 0;
    right = beyond == 0;
  }
  FR_CHECK(right, op, ": packed has ", numel, " elements, which are not this weight's lists");
}

// Of every aligned four, in bytes from the pixel under the first tap.
std::vector<int64_t> step_offsets(const ByteFilter& filter, int64_t tap_h, int64_t tap_w) {
  std::vector<int64_t> offsets;
  offsets.reserve(static_cast<size_t>(filter.all_steps()));
  for (int64_t r = 0; r < filter.R; ++r) {
    for (int64_t s = 0; s < (filter.joined ? 1 : filter.S); ++s) {
      for (int64_t i = 0; i < filter.steps(); ++i) offsets.push_back(r * tap_h + s * tap_w + 4 * i);
    }
  }
  return offsets;
}

}  // namespace

void check_packed(const char* op, const Tensor& packed, ByteLayout layout,
                  const ByteFilter& filter) {
  FR_CHECK(packed.dim() == 1 && packed.scalar_type() == ScalarType::Char &&
               (packed.numel() == 0 || packed.stride(0) == 1),
           op, ": packed must be int8, of one dimension and contiguous");
  if (layout == ByteLayout::lists) return check_lists(op, packed, filter);
  FR_CHECK(packed.numel() == filter.packed_bytes(), op, ": packed has ", packed.numel(),
           " elements, the weight needs ", filter.packed_bytes());
}

ByteLayer make_byte_layer(const char* op, const Tensor& packed, ByteLayout layout, const int64_t* n,
                          int64_t channels, int64_t H, int64_t W, int64_t unit) {
  ByteLayer layer{make_filter(op, n[0], n[1], n[2], n[3], n[9], n[10], unit),
                  &packed,
                  n[4],
                  n[5],
                  n[6],
                  n[7],
                  n[8],
                  n[9],
                  H,
                  W,
                  0,
                  0,
                  layout};
  FR_CHECK(layer.filter.C * layer.filter.groups == channels, op, ": weight has ", layer.filter.C,
           " input channels a group, input has ", channels, " (groups=", layer.filter.groups, ")");
  check_packed(op, packed, layout, layer.filter);
  const auto outputs = [op](int64_t size, int64_t taps, int64_t& stride, int64_t pad, int64_t dil) {
    const FilterAxis axis(op, size, taps, stride, pad, dil);
    stride = std::min(stride, axis.padded);
    return axis.outputs;
  };
  layer.P = outputs(H, layer.filter.R, layer.stride_h, layer.pad_h, layer.dil_h);
  layer.Q = outputs(W, layer.filter.S, layer.stride_w, layer.pad_w, layer.dil_w);
  return layer;
}

void run_byte_conv(const ByteKernels& kernels, ByteConv conv) {
  const int64_t pieces = kernels.pieces(conv), blocks = conv.filter.blocks();
  int64_t block_bytes = conv.filter.block_bytes();
  if (conv.shortcut == ByteShortcut::projection) block_bytes += conv.projection.block_bytes();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t input_bytes = conv.in.N * conv.in.H * conv.in.W * conv.in.pixel();
  // Whatever is more is what the threads divide.
  int64_t block_tasks = blocks * block_bytes > input_bytes ? std::min(threads, blocks) : 1;
  const int64_t pixel_tasks = std::min(pieces, bytes_div_up(threads, block_tasks));
  conv.keeps_weight = bytes_div_up(blocks, block_tasks) * block_bytes <= l2_bytes() / 2;
  std::vector<int64_t> offsets, projection_offsets;
  if (kernels.layout == ByteLayout::lists) {
    const int64_t pixel = conv.in.pixel();
    offsets = step_offsets(conv.filter, conv.dil_h * conv.in.pitch() * pixel, conv.dil_w * pixel);
    if (conv.shortcut == ByteShortcut::projection && !conv.doubled) {
      projection_offsets = step_offsets(conv.projection, 0, 0);
    }
    conv.step_offsets = offsets.data();
    conv.projection_offsets = conv.doubled ? offsets.data() : projection_offsets.data();
  }
  torch::stable::parallel_for(0, pixel_tasks * block_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % pixel_tasks, b = i / pixel_tasks;
      const ByteTask task = {pieces * t / pixel_tasks, pieces * (t + 1) / pixel_tasks,
                             blocks * b / block_tasks, blocks * (b + 1) / block_tasks};
      kernels.run(conv, task);
    }
  });
}

ByteConv make_byte_conv(const ByteLayer& layer, const ByteImages& in, const ByteImages& out,
                        int64_t zero_point) {
  ByteConv conv{};
  conv.in = in;
  conv.out = out;
  conv.filter = layer.filter;
  conv.weight = layer.weight(zero_point);
  conv.P = layer.P;
  conv.Q = layer.Q;
  conv.stride_h = layer.stride_h;
  conv.stride_w = layer.stride_w;
  conv.dil_h = layer.dil_h;
  conv.dil_w = layer.dil_w;
  conv.origin = in.position(0, -layer.pad_h, -layer.pad_w);
  return conv;
}

ByteFloats byte_float_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ByteFloats::float32;
    case ScalarType::Half:
      return ByteFloats::float16;
    case ScalarType::BFloat16:
      return ByteFloats::bfloat16;
    default:
      FR_CHECK(false, op, ": input must be float32, float16 or bfloat16");
  }
}

void gather_elements(const char* source, int64_t stride, int64_t count, int64_t item,
                     void* target) {
  (item == 4 ? gather_as<float> : gather_as<uint16_t>)(source, stride, count, target);
}

void dequantize_output(const ByteKernels& kernels, const ByteImages& from, float step,
                       Tensor& output) {
  const ByteFloats type = byte_float_type("an eight-bit convolution", output.scalar_type());
  const Strides s = strides_of(output);
  const int64_t item = static_cast<int64_t>(output.element_size()), pixel = from.pixel();
  char* data = static_cast<char*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, from.N * from.H, 4, [&](int64_t begin, int64_t end) {
    std::vector<char> channels(static_cast<size_t>(from.C * item));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / from.H, h = line % from.H;
      char* target = data + (n * s.n + h * s.h) * item;
      const uint8_t* source = from.data + from.position(n, h, 0) * pixel;
      if (s.c == 1 && s.w == from.C && pixel == from.C) {
        kernels.dequantize(type, source, from.W * from.C, step, target);
        continue;
      }
      for (int64_t w = 0; w < from.W; ++w, source += pixel, target += s.w * item) {
        if (s.c == 1) {
          kernels.dequantize(type, source, from.C, step, target);
          continue;
        }
        kernels.dequantize(type, source, from.C, step, channels.data());
        (item == 4 ? scatter<float> : scatter<uint16_t>)(channels.data(), s.c, from.C, target);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("pack_quantized_conv", TORCH_BOX(&pack_quantized_conv));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("quantized_kernels", TORCH_BOX(&quantized_kernels));
}

}  // namespace fused_resnet::cpu
