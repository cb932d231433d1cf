// The operator max_pool_gradient of the CPU backend: what the stem's pooling passes back.
//
//   grad_out[n,c,h,w] = sum of grad[n,c,p,q] over the windows (p, q) whose maximum of
//                       y = relu(input * scale + shift) is at (h, w)
//
// y is computed again, a few rows at a time, and where its maxima are is found again, so that
// forward keeps neither y nor indices.
//
// Memory traffic: input and grad are read once, plus the rows above and below each task; grad_out
// is written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/conv_layer.h"
#include "cpu/isa.h"
#include "cpu/max_pool_rows.h"
#include "cpu/scale_shift_act_row.h"

namespace fused_resnet::cpu {
namespace {

template <class Kernels>
const auto& rows_of(const Kernels& kernels, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return kernels.float16;
    case ScalarType::BFloat16:
      return kernels.bfloat16;
    case ScalarType::Double:
      return kernels.float64;
    default:
      return kernels.float32;
  }
}

struct Kernels {
  const MaxPoolRows* pool;
  ScaleShiftActRow scale_shift_act;

  explicit Kernels(ScalarType dtype) {
    const MaxPoolKernels* pools = &max_pool_baseline;
    const ScaleShiftActRows* rows = &scale_shift_act_baseline;
#if defined(__x86_64__)
    if (cpu_isa() == Isa::avx2) pools = &max_pool_avx2, rows = &scale_shift_act_avx2;
    if (cpu_isa() == Isa::avx512) pools = &max_pool_avx512, rows = &scale_shift_act_avx512;
#endif
    pool = &rows_of(*pools, dtype);
    scale_shift_act = rows_of(*rows, dtype);
  }
};

struct Problem {
  Kernels kernels;
  MaxPool pool;
  int64_t C, H, W, element_size, sum_size;
  const char *grad, *input;
  const void *scale, *shift;
  char* out;
  bool stream;
};

// Rows [h_begin, h_end) of an image's gradient.
void run_rows(const Problem& problem, int64_t image, int64_t h_begin, int64_t h_end,
              std::vector<char>& memory) {
  const MaxPool& pool = problem.pool;
  const int64_t row_bytes = problem.W * problem.C * problem.element_size;
  const int64_t sum_bytes = problem.W * problem.C * problem.sum_size;
  const int64_t kernel_h = pool.kernel_h;
  memory.resize((h_end - h_begin) * sum_bytes + kernel_h * row_bytes);
  char* sums = memory.data();
  char* activations = sums + (h_end - h_begin) * sum_bytes;
  std::fill(sums, activations, char{0});

  std::vector<int64_t> held(kernel_h, -1);  // the row of the image in each row of `activations`
  std::vector<const void*> values(kernel_h);
  std::vector<void*> row_sums(kernel_h);
  PooledRow row{values.data(), row_sums.data(), nullptr,   kernel_h, pool.kernel_w,
                pool.stride_w, pool.pad_w,      problem.W, pool.Q,   problem.C};
  const int64_t first =
      std::max<int64_t>(0, div_up(h_begin + pool.pad_h - kernel_h + 1, pool.stride_h));
  for (int64_t p = first; p < pool.P && p * pool.stride_h - pool.pad_h < h_end; ++p) {
    for (int64_t r = 0; r < kernel_h; ++r) {
      const int64_t h = p * pool.stride_h - pool.pad_h + r;
      values[r] = row_sums[r] = nullptr;
      if (h < 0 || h >= problem.H) continue;
      char* activation = activations + h % kernel_h * row_bytes;
      if (held[h % kernel_h] != h) {
        held[h % kernel_h] = h;
        const char* input = problem.input + (image * problem.H + h) * row_bytes;
        const int64_t pixel = problem.C * problem.element_size;
        for (int64_t w = 0; w < problem.W; ++w) {
          problem.kernels.scale_shift_act(input + w * pixel, problem.scale, problem.shift, nullptr,
                                          activation + w * pixel, problem.C, false,
                                          {Act::kRelu, 0, 0}, false, nullptr);
        }
      }
      values[r] = activation;
      if (h >= h_begin && h < h_end) row_sums[r] = sums + (h - h_begin) * sum_bytes;
    }
    row.grad = problem.grad + (image * pool.P + p) * pool.Q * problem.C * problem.element_size;
    problem.kernels.pool->add_gradients(row);
  }
  problem.kernels.pool->store(sums, (h_end - h_begin) * problem.W * problem.C,
                              problem.out + (image * problem.H + h_begin) * row_bytes,
                              problem.stream);
}

bool is_dense_channels_last(const Tensor& t) {
  const Strides s = dense_strides(t.size(1), t.size(2), t.size(3), true);
  const int64_t strides[] = {s.n, s.c, s.h, s.w};
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) > 1 && t.stride(d) != strides[d]) return false;
  }
  return true;
}

// `scale` and `shift` as norm_vectors() makes them.
Tensor max_pool_gradient(Tensor grad, Tensor input, Tensor scale, Tensor shift,
                         std::vector<int64_t> numbers) {
  constexpr const char* name = "max_pool_gradient";
  check_rank(name, "input", input, 4);
  check_rank(name, "grad", grad, 4);
  check_floating(name, "input", input);
  check_dtype(name, "grad", grad, input.scalar_type());
  FR_CHECK(is_dense_channels_last(input), name, ": input must be dense, channels_last");
  FR_CHECK(is_dense_channels_last(grad), name, ": grad must be dense, channels_last");
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  const MaxPool pool = make_pool(numbers, H, W);
  FR_CHECK(
      grad.size(0) == N && grad.size(1) == C && grad.size(2) == pool.P && grad.size(3) == pool.Q,
      name, ": grad has shape ", shape_string(grad), ", the pooled input (", N, ", ", C, ", ",
      pool.P, ", ", pool.Q, ")");
  const bool is_double = input.scalar_type() == ScalarType::Double;
  const ScalarType sum_dtype = is_double ? ScalarType::Double : ScalarType::Float;
  check_vector(name, "scale", scale, C, sum_dtype);
  check_vector(name, "shift", shift, C, sum_dtype);
  Tensor out = empty_activation(N, C, H, W, input.scalar_type(), true);
  if (out.numel() == 0) return out;
  const Problem problem{Kernels(input.scalar_type()),
                        pool,
                        C,
                        H,
                        W,
                        static_cast<int64_t>(input.element_size()),
                        is_double ? 8 : 4,
                        static_cast<const char*>(grad.const_data_ptr()),
                        static_cast<const char*>(input.const_data_ptr()),
                        scale.const_data_ptr(),
                        shift.const_data_ptr(),
                        static_cast<char*>(out.mutable_data_ptr()),
                        exceeds_caches(out)};
  // As many rows as leave their sums in a quarter of the second-level cache.
  const int64_t rows = std::clamp<int64_t>(l2_bytes() / 4 / (W * C * problem.sum_size), 1, H);
  const int64_t per_image = div_up(H, rows);
  torch::stable::parallel_for(0, N * per_image, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> memory;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % per_image * rows;
      run_rows(problem, task / per_image, h, std::min(h + rows, H), memory);
    }
    if (problem.stream) finish_streaming();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("max_pool_gradient", TORCH_BOX(&max_pool_gradient));
}

}  // namespace fused_resnet::cpu
