// The operators conv_bn_act_packed and pack_conv_weight of the CPU backend. See conv.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu/buffer_pool.h"
#include "cpu/conv.h"
#include "cpu/isa.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels for this machine, or null.
const ConvIsa* conv_isa() {
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

std::string conv_isa_name() {
  return conv_isa() ? conv_isa()->name : "";
}

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return reported > 0 ? static_cast<int64_t>(reported) : int64_t{1} << 20;
  }();
  return bytes;
}

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
      STD_TORCH_CHECK(false, "conv_bn_act: ", name, " must be a floating-point tensor");
  }
}

// An uninitialised tensor in the pool's memory.
Tensor pool_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= size;
  void* memory = pool_allocate(static_cast<size_t>(bytes));
  return torch::stable::from_blob(memory, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  pool_release);
}

// ---- weight packing ----------------------------------------------------------------------------

struct WeightShape {
  int64_t K, C, R, S;  // C counts the channels of one group
  Strides stride;
  bool expanded;
  int64_t groups, block_k;  // of the packed weight: expanded groups count as one

  WeightShape(const Tensor& weight, int64_t group_count)
      : K(weight.size(0)),
        C(weight.size(1)),
        R(weight.size(2)),
        S(weight.size(3)),
        stride{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
        expanded(K > 0 && is_expanded(group_count, C, K / group_count, conv_isa()->lanes)),
        groups(expanded ? 1 : group_count),
        block_k(expanded ? conv_isa()->lanes : conv_isa()->block_k) {}

  int64_t blocks() const { return div_up(K / groups, block_k); }
  int64_t packed_size() const { return groups * blocks() * R * S * C * block_k; }
  int64_t source(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return k * stride.n + c * stride.c + r * stride.h + s * stride.w;
  }
};

template <class T>
void pack(const T* source, const WeightShape& shape, float* packed) {
  const int64_t block_k = shape.block_k, blocks = shape.blocks();
  const int64_t group_k = shape.K / shape.groups;
  torch::stable::parallel_for(0, shape.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k0 = i % blocks * block_k, channel = i / blocks * group_k + k0;
      const int64_t valid = std::min(block_k, group_k - k0);
      float* out = packed + i * shape.R * shape.S * shape.C * block_k;
      for (int64_t r = 0; r < shape.R; ++r) {
        for (int64_t s = 0; s < shape.S; ++s) {
          for (int64_t c = 0; c < shape.C; ++c, out += block_k) {
            for (int64_t k = 0; k < valid; ++k) {
              out[k] = static_cast<float>(source[shape.source(channel + k, c, r, s)]);
            }
            std::fill(out + valid, out + block_k, 0.0f);
          }
        }
      }
    }
  });
}

// Compares a sample of the weight, spread over all of its dimensions, with its packed copy. The
// caller keeps the two together by storage and version; this also sees updates that leave no
// version behind, such as `weight.data.mul_(0.9)`.
template <class T>
bool is_packed_from(const T* source, const WeightShape& shape, const float* packed) {
  constexpr int64_t kSamples = 32;
  const int64_t group_k = shape.K / shape.groups, blocks = shape.blocks();
  const int64_t block_k = shape.block_k;
  for (int64_t i = 0; i < kSamples; ++i) {
    // Odd multiples of i visit every one of the kSamples parts of a dimension.
    const int64_t k = shape.K * i / kSamples;
    const int64_t c = shape.C * (11 * i % kSamples) / kSamples;
    const int64_t r = shape.R * (7 * i % kSamples) / kSamples;
    const int64_t s = shape.S * (19 * i % kSamples) / kSamples;
    const int64_t group = shape.groups == 1 ? 0 : k / group_k, in_group = k - group * group_k;
    const int64_t block = group * blocks + in_group / block_k;
    const int64_t tap = (block * shape.R + r) * shape.S + s;
    const float copy = packed[(tap * shape.C + c) * block_k + in_group % block_k];
    const float value = static_cast<float>(source[shape.source(k, c, r, s)]);
    if (std::memcmp(&value, &copy, sizeof value) != 0) return false;
  }
  return true;
}

void check_weight(const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(conv_isa() != nullptr,
                  "conv_bn_act: this processor has neither AVX2 nor AVX-512");
  STD_TORCH_CHECK(weight.dim() == 4, "conv_bn_act: weight has ", weight.dim(),
                  " dimensions, it must have 4");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "conv_bn_act: groups is ", groups,
                  ", it must divide weight's ", weight.size(0), " output channels");
}

Tensor pack_conv_weight(Tensor weight, int64_t groups) {
  check_weight(weight, groups);
  const WeightShape shape(weight, groups);
  Tensor packed = pool_tensor({shape.packed_size()}, {1}, ScalarType::Float);
  with_element_type(weight, "weight", [&](const auto* source) {
    pack(source, shape, static_cast<float*>(packed.mutable_data_ptr()));
  });
  return packed;
}

// Packs again if the weight changed behind its version counter's back.
void refresh_packed(const Tensor& weight, const WeightShape& shape, Tensor& packed) {
  STD_TORCH_CHECK(packed.numel() == shape.packed_size(), "conv_bn_act: packed has ", packed.numel(),
                  " elements, weight needs ", shape.packed_size());
  if (weight.numel() == 0) return;
  with_element_type(weight, "weight", [&](const auto* source) {
    float* destination = static_cast<float*>(packed.mutable_data_ptr());
    if (is_packed_from(source, shape, destination)) return;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    if (!is_packed_from(source, shape, destination)) {
      pack(source, shape, destination);
    }
  });
}

// ---- batch norm --------------------------------------------------------------------------------

// y = (x + bias - mean) / sqrt(var + eps) * weight + beta, written as x * scale + shift: in
// float64, rounded once. Both are laid out in the kernel's blocks of channels.
struct ScaleShift {
  std::vector<float> values;
  const float *scale, *shift;

  ScaleShift(const WeightShape& shape, const Tensor& mean, const Tensor& var,
             const std::optional<Tensor>& weight, const std::optional<Tensor>& beta, double eps,
             const std::optional<Tensor>& bias) {
    const int64_t K = shape.K, groups = shape.groups;
    std::vector<double> a(K), b(K), other(K);
    read(var, "running_var", K, a);
    for (double& v : a) v = 1.0 / std::sqrt(v + eps);
    if (weight) {
      read(*weight, "bn_weight", K, other);
      for (int64_t k = 0; k < K; ++k) a[k] *= other[k];
    }
    read(mean, "running_mean", K, b);
    if (bias) {
      read(*bias, "bias", K, other);
      for (int64_t k = 0; k < K; ++k) b[k] -= other[k];
    }
    for (int64_t k = 0; k < K; ++k) b[k] *= -a[k];
    if (beta) {
      read(*beta, "bn_bias", K, other);
      for (int64_t k = 0; k < K; ++k) b[k] += other[k];
    }
    const int64_t group_k = K / groups, padded = shape.blocks() * shape.block_k;
    values.assign(2 * groups * padded, 0.0f);
    scale = values.data();
    shift = scale + groups * padded;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = k / group_k * padded + k % group_k;
      values[at] = static_cast<float>(a[k]);
      values[groups * padded + at] = static_cast<float>(b[k]);
    }
  }

  static void read(const Tensor& source, const char* name, int64_t K, std::vector<double>& out) {
    STD_TORCH_CHECK(source.dim() == 1 && source.size(0) == K, "conv_bn_act: ", name, " has ",
                    source.numel(), " elements, weight has ", K, " output channels");
    const int64_t stride = source.stride(0);
    with_element_type(source, name, [&](const auto* p) {
      for (int64_t k = 0; k < K; ++k) out[k] = static_cast<double>(p[k * stride]);
    });
  }
};

// ---- tasks -------------------------------------------------------------------------------------

// Consecutive pixels to a row of a flattened pointwise convolution: two groups of a tile.
constexpr int64_t kFlatRow = 14;

bool evenly_spaced(const Strides& s, int64_t width) {
  return s.h == width * s.w;
}

// A pointwise convolution does not care where a row of the image ends.
void flatten_pixels(Conv& conv) {
  if (!is_pointwise(conv) || conv.has_pool || conv.stride_h != 1 || conv.stride_w != 1 ||
      conv.pad_h != 0 || conv.pad_w != 0 || !evenly_spaced(conv.in, conv.W) ||
      !evenly_spaced(conv.out, conv.Q) ||
      (conv.residual != nullptr && !evenly_spaced(conv.res, conv.Q))) {
    return;
  }
  const int64_t pixels = conv.P * conv.Q;
  conv.W = conv.Q = std::min(kFlatRow, pixels);
  conv.H = conv.P = div_up(pixels, conv.Q);
  conv.last_w = conv.last_q = pixels - (conv.P - 1) * conv.Q;
  for (Strides* s : {&conv.in, &conv.out, &conv.res}) s->h = conv.Q * s->w;
}

struct Split {
  int64_t rows, row_tasks;      // output rows in a task, tasks along the rows
  int64_t blocks, block_tasks;  // likewise blocks of output channels
};

// Two ways to share the work out, by what is larger. Heavy weights, late in a network: each thread
// takes some of the output channels and all pixels, so that it reads only its part of the weights.
// Light weights, early in a network: each task takes some rows and all channels, few enough that
// the rows it reads, writes and adds fit the second-level cache, and their halo is not gathered
// twice.
Split split(const Conv& conv, int64_t block_k, int64_t threads) {
  const int64_t item = conv.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t rows = conv.N * (conv.has_pool ? conv.pool.P : conv.P);
  const int64_t blocks = div_up(group_k(conv), block_k);
  // A task on expanded groups has one block of output channels, and gathers the input for it alone.
  const int64_t task_k = conv.expanded ? block_k : group_k(conv);
  const int64_t weight_bytes = reduction(conv) * group_k(conv) * 4;
  const int64_t halo = conv.has_pool ? conv.pool.stride_h : 1;
  const int64_t row_bytes =
      halo * (conv.stride_h * conv.W * group_c(conv) * (conv.expanded ? block_k : 1) * 4 +
              conv.Q * task_k * (conv.has_pool ? 4 : item) * (conv.residual ? 2 : 1));
  const bool heavy = weight_bytes > l2_bytes() / 2;

  Split s;
  s.block_tasks = conv.expanded ? blocks : 1;
  if (!conv.has_pool && !conv.expanded && (heavy || rows < 2 * threads))
    s.block_tasks = std::min(threads, blocks);
  s.blocks = div_up(blocks, s.block_tasks);
  s.block_tasks = div_up(blocks, s.blocks);

  // Two blocks of weights, the current and the next, share the cache with the rows.
  const int64_t block_bytes = reduction(conv) * block_k * 4;
  const int64_t budget = std::clamp(l2_bytes() - 2 * block_bytes, l2_bytes() / 8, l2_bytes() / 2);
  const int64_t most =
      std::clamp<int64_t>(budget / std::max<int64_t>(row_bytes, 1), 1, std::max<int64_t>(rows, 1));
  const int64_t row_threads = std::max<int64_t>(1, threads / (s.block_tasks * work_groups(conv)));
  double best = 0;
  for (int64_t r = most; r >= 1; --r) {
    // Time in units of the ideal: the busiest thread's share, the rows of halo gathered again by
    // every task, and what a thread that falls behind can hand over to the others.
    const int64_t rounds = div_up(div_up(rows, r), row_threads);
    const double share = static_cast<double>(rounds * r * row_threads) / static_cast<double>(rows);
    const double halo_cost =
        0.02 * static_cast<double>(conv.R - 1) / static_cast<double>(r * conv.stride_h);
    const double straggler_cost = row_threads > 1 ? 0.05 / static_cast<double>(rounds) : 0.0;
    const double cost = share + halo_cost + straggler_cost;
    if (r == most || cost < best) {
      best = cost;
      s.rows = r;
    }
  }
  s.row_tasks = div_up(rows, s.rows);
  return s;
}

// Scratch memory of a thread, kept between calls.
void* scratch_memory(int64_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    int64_t size = 0;
    ~Buffer() {
      if (memory) pool_release(memory);
    }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    if (buffer.memory) pool_release(buffer.memory);
    buffer.memory = nullptr;
    buffer.memory = pool_allocate(static_cast<size_t>(bytes));
    buffer.size = bytes;
  }
  return buffer.memory;
}

void run_tasks(const Conv& conv) {
  const ConvIsa& isa = *conv_isa();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block_k = conv.expanded ? isa.lanes : isa.block_k;
  const Split s = split(conv, block_k, threads);
  const int64_t rows = conv.N * (conv.has_pool ? conv.pool.P : conv.P);
  const int64_t blocks = div_up(group_k(conv), block_k);
  const int64_t tasks = s.row_tasks * s.block_tasks * work_groups(conv);
  std::atomic<int64_t> next{0};
  auto worker = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      Task task;
      // Rows vary fastest: a thread goes on with the weights it has in its cache.
      const int64_t row_task = i % s.row_tasks, rest = i / s.row_tasks;
      task.row_begin = row_task * s.rows;
      task.row_end = std::min(rows, task.row_begin + s.rows);
      task.block_begin = rest % s.block_tasks * s.blocks;
      task.block_end = std::min(blocks, task.block_begin + s.blocks);
      task.group = rest / s.block_tasks;
      isa.run(conv, task, scratch_memory(isa.scratch_bytes(conv, task)));
    }
  };
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, worker);
}

// ---- the operator ------------------------------------------------------------------------------

Dtype kernel_dtype(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "conv_bn_act: input must be float32, bfloat16 or float16");
  }
}

Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Whether the strides are those of channels_last, ties broken as torch breaks them.
bool is_channels_last(const Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    // N x C x 1 x 1 with all strides alike is contiguous.
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * std::max<int64_t>(t.size(d), 1);
  }
  return true;
}

Tensor empty_output(const Conv& conv, int64_t P, int64_t Q, ScalarType dtype, bool channels_last) {
  const std::vector<int64_t> sizes = {conv.N, conv.K, P, Q};
  const std::vector<int64_t> strides =
      channels_last ? std::vector<int64_t>{conv.K * P * Q, 1, Q * conv.K, conv.K}
                    : std::vector<int64_t>{conv.K * P * Q, P * Q, Q, 1};
  return pool_tensor(sizes, strides, dtype);
}

Tensor conv_bn_act_packed(Tensor input, Tensor weight, Tensor packed, Tensor running_mean,
                          Tensor running_var, std::optional<Tensor> bn_weight,
                          std::optional<Tensor> bn_bias, double eps, std::optional<Tensor> bias,
                          int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
                          int64_t dil_h, int64_t dil_w, int64_t groups,
                          std::optional<Tensor> residual, bool relu,
                          std::vector<int64_t> max_pool) {
  check_weight(weight, groups);
  STD_TORCH_CHECK(input.dim() == 4, "conv_bn_act: input has ", input.dim(),
                  " dimensions, it must have 4");
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * groups, "conv_bn_act: weight has ",
                  weight.size(1), " input channels, input has ", input.size(1), " (groups=", groups,
                  ")");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type(),
                  "conv_bn_act: input and weight must have one dtype");
  STD_TORCH_CHECK(
      stride_h > 0 && stride_w > 0 && dil_h > 0 && dil_w > 0 && pad_h >= 0 && pad_w >= 0,
      "conv_bn_act: stride and dilation must be positive, padding not negative");

  Conv conv{};
  conv.N = input.size(0);
  conv.C = input.size(1);
  conv.H = input.size(2);
  conv.W = conv.last_w = input.size(3);
  conv.K = weight.size(0);
  conv.R = weight.size(2);
  conv.S = weight.size(3);
  conv.P = (conv.H + 2 * pad_h - dil_h * (conv.R - 1) - 1) / stride_h + 1;
  conv.Q = conv.last_q = (conv.W + 2 * pad_w - dil_w * (conv.S - 1) - 1) / stride_w + 1;
  STD_TORCH_CHECK(conv.H + 2 * pad_h >= dil_h * (conv.R - 1) + 1 &&
                      conv.W + 2 * pad_w >= dil_w * (conv.S - 1) + 1 && conv.R > 0 && conv.S > 0,
                  "conv_bn_act: the filter is larger than the padded input");
  STD_TORCH_CHECK(conv.R * conv.S <= kMaxRuns, "conv_bn_act: weight has ", conv.R * conv.S,
                  " taps, at most ", kMaxRuns, " are supported");
  conv.stride_h = stride_h;
  conv.stride_w = stride_w;
  conv.pad_h = pad_h;
  conv.pad_w = pad_w;
  conv.dil_h = dil_h;
  conv.dil_w = dil_w;
  conv.groups = groups;
  conv.dtype = kernel_dtype(input);
  conv.relu = relu;
  conv.has_pool = !max_pool.empty();
  int64_t P = conv.P, Q = conv.Q;
  if (conv.has_pool) {
    STD_TORCH_CHECK(max_pool.size() == 6 && groups == 1 && !residual,
                    "conv_bn_act: pooling takes 6 numbers, groups=1 and no residual");
    MaxPool& pool = conv.pool;
    pool = {max_pool[0], max_pool[1], max_pool[2], max_pool[3], max_pool[4], max_pool[5], 0, 0};
    STD_TORCH_CHECK(pool.kernel_h > 0 && pool.kernel_w > 0 && pool.stride_h > 0 &&
                        pool.stride_w > 0 && pool.pad_h >= 0 && pool.pad_w >= 0 &&
                        2 * pool.pad_h <= pool.kernel_h && 2 * pool.pad_w <= pool.kernel_w &&
                        P + 2 * pool.pad_h >= pool.kernel_h && Q + 2 * pool.pad_w >= pool.kernel_w,
                    "conv_bn_act: the pooling window does not fit its input");
    P = pool.P = (P + 2 * pool.pad_h - pool.kernel_h) / pool.stride_h + 1;
    Q = pool.Q = (Q + 2 * pool.pad_w - pool.kernel_w) / pool.stride_w + 1;
  }

  Tensor output = empty_output(conv, P, Q, input.scalar_type(),
                               is_channels_last(input) || is_channels_last(weight));
  if (output.numel() == 0) return output;
  const WeightShape shape(weight, groups);
  refresh_packed(weight, shape, packed);
  const ScaleShift bn(shape, running_mean, running_var, bn_weight, bn_bias, eps, bias);
  conv.expanded = shape.expanded;
  conv.in = strides_of(input);
  conv.out = strides_of(output);
  conv.input = input.const_data_ptr();
  conv.weight = static_cast<const float*>(packed.const_data_ptr());
  conv.scale = bn.scale;
  conv.shift = bn.shift;
  conv.output = output.mutable_data_ptr();
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == conv.N &&
                        residual->size(1) == conv.K && residual->size(2) == P &&
                        residual->size(3) == Q && residual->scalar_type() == input.scalar_type(),
                    "conv_bn_act: residual must have the output's shape and dtype");
    conv.residual = residual->const_data_ptr();
    conv.res = strides_of(*residual);
  }
  flatten_pixels(conv);
  run_tasks(conv);
  return output;
}

std::vector<int64_t> cpu_pool_statistics() {
  const PoolStatistics s = pool_statistics();
  return {s.live_bytes, s.cached_bytes, s.system_allocations};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("conv_isa", TORCH_BOX(&conv_isa_name));
  m.impl("cpu_pool_statistics", TORCH_BOX(&cpu_pool_statistics));
  m.impl("cpu_pool_trim", TORCH_BOX(&pool_trim));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("pack_conv_weight", TORCH_BOX(&pack_conv_weight));
  m.impl("conv_bn_act_packed", TORCH_BOX(&conv_bn_act_packed));
}

}  // namespace fused_resnet::cpu
