// The operator conv_weight_gradient of the CPU backend; see weight_gradient.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/buffer_pool.h"
#include "cpu/conv_axis.h"
#include "cpu/conv_layer.h"
#include "cpu/isa.h"
#include "cpu/weight_gradient.h"
#include "scale_shift_act.h"

namespace fused_resnet::cpu {
namespace {

const WeightGradientIsa* gradient_isa(ScalarType dtype) {
  const bool parts = dtype == ScalarType::Float;
  if (!parts && dtype != ScalarType::BFloat16) return nullptr;
  switch (tile_unit()) {
#if defined(__x86_64__)
    case TileUnit::amx:
      return parts ? &kWeightGradientFloat32Amx : &kWeightGradientAmx;
#endif
    case TileUnit::emulated:
      return parts ? &kWeightGradientFloat32AmxEmulated : &kWeightGradientAmxEmulated;
    default:
      break;
  }
  if (parts) return nullptr;
  switch (pair_unit()) {
#if defined(__x86_64__)
    case PairUnit::avx512bf16:
      return &kWeightGradientAvx512Bf16;
#endif
    case PairUnit::emulated:
      return &kWeightGradientAvx512Bf16Emulated;
    default:
      return nullptr;
  }
}

// Whether all pixels of all images are evenly spaced in a tensor of H x W pixels.
bool evenly_spaced(const Strides& s, int64_t N, int64_t H, int64_t W) {
  return (H == 1 || s.h == W * s.w) && (N == 1 || s.n == H * W * s.w);
}

// A pointwise convolution does not care where a row ends, or an image.
void flatten_pixels(WeightGradient& g, int64_t chunk_pixels) {
  if (g.R != 1 || g.S != 1 || g.stride_h != 1 || g.stride_w != 1 || g.pad_h != 0 || g.pad_w != 0 ||
      !evenly_spaced(g.grad_strides, g.N, g.P, g.Q) ||
      !evenly_spaced(g.in_strides, g.N, g.H, g.W)) {
    return;
  }
  const int64_t pixels = g.N * g.P * g.Q;
  // Rows as alike as they can be, of whole steps.
  const int64_t steps = div_up(pixels, 32), rows = div_up(pixels, chunk_pixels);
  g.W = g.Q = std::min(pixels, div_up(steps, rows) * 32);
  g.N = 1;
  g.H = g.P = div_up(pixels, g.Q);
  g.last_w = g.last_q = pixels - (g.P - 1) * g.Q;
  g.grad_strides.h = g.Q * g.grad_strides.w;
  g.in_strides.h = g.Q * g.in_strides.w;
}

// By the shape alone: sums are in the order of chunks and splits.
void choose_chunks(WeightGradient& g, int64_t chunk_pixels) {
  const Axis w(g.stride_w, g.dil_w, g.pad_w, g.S);
  const int64_t pitch = g.Q + w.reach() - w.shared(g.Q, g.W);
  const int64_t image = div_up(g.P * pitch, 32) * 32;
  g.chunk_rows = g.P;
  g.chunk_images = 1;
  if (image <= chunk_pixels) {
    g.chunk_images = std::min(g.N, chunk_pixels / image);
    g.chunks = div_up(g.N, g.chunk_images);
    g.chunk_images = div_up(g.N, g.chunks);
    g.chunks = div_up(g.N, g.chunk_images);
  } else {
    const int64_t most = std::max<int64_t>(1, chunk_pixels / pitch);
    g.chunk_rows = div_up(g.P, div_up(g.P, most));
    g.chunks = g.N * div_up(g.P, g.chunk_rows);
  }
  // What all splits' sums may take; they are written and read once more.
  constexpr int64_t kSumsBytes = int64_t{4} << 20, kMostSplits = 16;
  const int64_t bytes = sums_offset(g, 1, 0, 0, 0) * 4;
  g.splits = std::clamp<int64_t>(kSumsBytes / bytes, 1, std::min(kMostSplits, g.chunks));
}

// How blocks are shared out: so many of rows and of columns to a task.
struct Partition {
  int64_t rows, columns, row_tasks, column_tasks;
};

Partition partition(const WeightGradient& g, const WeightGradientIsa& isa, int64_t threads) {
  const int64_t rows = row_blocks(g), columns = column_blocks(g);
  Partition p;
  const int64_t fitting = std::max<int64_t>(1, l2_bytes() * 2 / 5 / isa.slab_bytes(g));
  p.column_tasks = div_up(columns, fitting);
  p.columns = div_up(columns, p.column_tasks);
  p.column_tasks = div_up(columns, p.columns);
  // Sums that every chunk adds to should stay in the cache, and threads want something to do.
  const int64_t row_bytes = p.columns * g.R * g.S * kGradientBlock * 4;
  const int64_t kept =
      g.chunks > g.splits ? std::max<int64_t>(1, l2_bytes() * 2 / 5 / row_bytes) : rows;
  const int64_t others = g.groups * g.splits * p.column_tasks;
  p.row_tasks = std::max(div_up(rows, kept), std::min(rows, div_up(2 * threads, others)));
  p.rows = div_up(rows, p.row_tasks);
  p.row_tasks = div_up(rows, p.rows);
  return p;
}

void run_gradient(WeightGradient& g, const WeightGradientIsa& isa) {
  flatten_pixels(g, isa.chunk_pixels);
  // The tensor with fewer blocks of channels is transposed; a filter's taps are columns'.
  g.swapped = g.R == 1 && g.S == 1 && g.pad_h == 0 && g.pad_w == 0 &&
              div_up(g.K / g.groups, 32) > div_up(g.C / g.groups, 32);
  choose_chunks(g, isa.chunk_pixels);
  const Partition p = partition(g, isa, torch::stable::get_num_threads());
  const int64_t tasks = g.groups * g.splits * p.row_tasks * p.column_tasks;
  Tensor sums;
  if (g.chunks > 1) {
    sums = pool_tensor({sums_offset(g, g.splits, 0, 0, 0)}, {1}, ScalarType::Float);
    g.sums = sums.mutable_data_ptr<float>();
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % p.row_tasks * p.rows, rest = i / p.row_tasks;
      const int64_t column = rest % p.column_tasks * p.columns, others = rest / p.column_tasks;
      const GradientTask task{others % g.groups,
                              others / g.groups,
                              row,
                              std::min(row_blocks(g), row + p.rows),
                              column,
                              std::min(column_blocks(g), column + p.columns)};
      const Scratch scratch(static_cast<size_t>(isa.scratch_bytes(g, task)));
      isa.run(g, task, scratch.get());
    }
  });
  if (g.splits == 1) return;
  torch::stable::parallel_for(0, g.groups * row_blocks(g), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) isa.combine(g, i / row_blocks(g), i % row_blocks(g));
  });
}

void conv_weight_gradient(Tensor grad, Tensor input, int64_t stride_h, int64_t stride_w,
                          int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                          int64_t groups, Tensor grad_weight) {
  constexpr const char* name = "conv_weight_gradient";
  check_rank(name, "grad", grad, 4);
  check_rank(name, "input", input, 4);
  check_rank(name, "grad_weight", grad_weight, 4);
  const ScalarType dtype = grad.scalar_type();
  FR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, ": grad is ",
           dtype_string(grad), ", must be bfloat16 or float32");
  check_dtype(name, "input", input, dtype);
  check_dtype(name, "grad_weight", grad_weight, dtype);
  FR_CHECK(is_non_overlapping_and_dense(grad_weight), name, ": grad_weight must be dense");
  const WeightGradientIsa* isa = gradient_isa(dtype);
  FR_CHECK(isa != nullptr, name, ": this processor has no unit for ", dtype_string(grad));
  WeightGradient g{};
  g.N = input.size(0);
  g.C = input.size(1);
  g.H = input.size(2);
  g.W = g.last_w = input.size(3);
  g.K = grad_weight.size(0);
  g.R = grad_weight.size(2);
  g.S = grad_weight.size(3);
  g.groups = groups;
  FR_CHECK(groups > 0 && g.K % groups == 0 && g.C % groups == 0, name, ": groups is ", groups,
           ", it must divide input's ", g.C, " channels and grad_weight's ", g.K);
  check_taps(name, grad_weight);
  const FilterAxis rows(name, g.H, g.R, stride_h, pad_h, dil_h);
  const FilterAxis columns(name, g.W, g.S, stride_w, pad_w, dil_w);
  g.P = rows.outputs;
  g.Q = g.last_q = columns.outputs;
  FR_CHECK(grad.size(0) == g.N && grad.size(1) == g.K && grad.size(2) == g.P &&
               grad.size(3) == g.Q && grad_weight.size(1) == g.C / groups,
           name, ": grad has shape ", shape_string(grad), ", input ", shape_string(input),
           " and grad_weight ", shape_string(grad_weight), ", which do not go together");
  // A stride beyond the image is never gone, but planes are as far apart.
  g.stride_h = std::min(stride_h, rows.padded);
  g.stride_w = std::min(stride_w, columns.padded);
  g.pad_h = pad_h;
  g.pad_w = pad_w;
  g.dil_h = dil_h;
  g.dil_w = dil_w;
  if (grad_weight.numel() == 0) return;
  g.output = grad_weight.mutable_data_ptr();
  if (grad.numel() == 0 || input.numel() == 0) {
    std::memset(
        g.output, 0,
        static_cast<size_t>(grad_weight.numel()) * static_cast<size_t>(grad.element_size()));
    return;
  }
  Conv memory{};
  memory.N = g.N, memory.C = g.C, memory.H = g.H, memory.W = g.W, memory.K = g.K;
  memory.pad_h = pad_h, memory.pad_w = pad_w;
  check_memory(name, memory);
  g.grad = grad.const_data_ptr();
  g.input = input.const_data_ptr();
  g.grad_strides = strides_of(grad);
  g.in_strides = strides_of(input);
  g.out = strides_of(grad_weight);
  run_gradient(g, *isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("conv_weight_gradient", TORCH_BOX(&conv_weight_gradient));
}

}  // namespace fused_resnet::cpu
