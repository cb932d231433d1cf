#include "cpu/quantized/layers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "cpu/conv_layer.h"
#include "cpu/isa.h"
#include "cpu/quantized/lists.h"
#include "cpu/shared_tasks.h"
#include "memory_format.h"

namespace fused_resnet::cpu {
namespace {

// Of a layer, where threads share.
constexpr int64_t kTasksOfThread = 4;

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
  return layout == ByteLayout::lists ? pack_lists(op, tiles, filter) : packed;
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

Tensor packed_memory(int64_t bytes) {
  void* memory = weight_allocate(static_cast<size_t>(bytes));
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return torch::stable::from_blob(memory, {bytes}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Char, weight_release);
}

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

namespace {

// What threads begin with of the next layer's weight: `bytes` of them up to `end`, each thread's
// `part` behind the one before it.
struct NextWeight {
  const int8_t *data, *end;
  int64_t bytes, part = 0;

  NextWeight(const ByteConv& conv, const ByteLayer& next, int64_t threads)
      : data(static_cast<const int8_t*>(next.packed->const_data_ptr())) {
    const int64_t all = next.filter.vectors();
    end = data + all;
    bytes = std::min(all, l2_bytes() / 4);
    // As the next layer is divided, whose input is this one's output.
    if (all > conv.in.N * conv.P * conv.Q * conv.filter.K) part = all / threads;
  }
};

}  // namespace

void run_byte_conv(const ByteKernels& kernels, ByteConv conv, const ByteLayer* next) {
  const int64_t pieces = kernels.pieces(conv), blocks = conv.filter.blocks();
  int64_t block_bytes = conv.filter.block_bytes();
  if (conv.shortcut == ByteShortcut::projection) block_bytes += conv.projection.block_bytes();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t input_bytes = conv.in.N * conv.in.H * conv.in.W * conv.in.pixel();
  // Whatever is more is what the threads divide.
  const int64_t threads_of_blocks =
      blocks * block_bytes > input_bytes ? std::min(threads, blocks) : 1;
  conv.keeps_weight = bytes_div_up(blocks, threads_of_blocks) * block_bytes <= l2_bytes() / 2;
  int64_t block_tasks = threads_of_blocks;
  int64_t pixel_tasks = bytes_div_up(threads, block_tasks);
  if (kernels.shares) {
    // Some for whoever is done first. More would take weights that do not stay in the cache again.
    if (threads_of_blocks > 1) {
      block_tasks = std::max(threads_of_blocks, std::min(threads * kTasksOfThread, blocks / 2));
    } else if (conv.keeps_weight) {
      pixel_tasks *= kTasksOfThread;
    }
  }
  pixel_tasks = std::min(pieces, pixel_tasks);
  std::vector<int64_t> segments, projection_segments;
  if (kernels.layout == ByteLayout::lists) {
    const int64_t pixel = conv.in.pixel();
    segments =
        segment_offsets(conv.filter, conv.dil_h * conv.in.pitch() * pixel, conv.dil_w * pixel);
    if (conv.shortcut == ByteShortcut::projection && !conv.doubled) {
      projection_segments = segment_offsets(conv.projection, 0, 0);
    }
    conv.segments = segments.data();
    conv.projection_segments = conv.doubled ? segments.data() : projection_segments.data();
  }
  const int64_t tasks = pixel_tasks * block_tasks, workers = std::min(threads, tasks);
  std::optional<NextWeight> later;
  if (next != nullptr && kernels.shares && kernels.layout == ByteLayout::tiles) {
    later.emplace(conv, *next, workers);
  }
  share_tasks(tasks, 1, [&](int64_t i, bool is_last) {
    const int64_t t = i % pixel_tasks, b = i / pixel_tasks;
    ByteTask task = {pieces * t / pixel_tasks,
                     pieces * (t + 1) / pixel_tasks,
                     blocks * b / block_tasks,
                     blocks * (b + 1) / block_tasks,
                     blocks,
                     nullptr,
                     nullptr};
    if (is_last) task.block_ahead = task.block_end;
    if (is_last && later) {
      const int64_t worker = bytes_div_up((i + 1) * workers, tasks) - 1;  // whose last it is
      task.later = later->data + worker * later->part;
      task.later_end = std::min(task.later + later->bytes, later->end);
    }
    kernels.run(conv, task);
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
