// Batch norm in training on the CPU, forward's statistics and backward, with the activation's mask.
//
// Statistics read the input once. Backward (Ioffe and Szegedy, "Batch Normalization" (2015),
// section 3), with g the gradient behind the activation, n values a channel, and
// scale = weight * invstd:
//
//   grad_bias   = sum(g)
//   grad_weight = sum(g * (input - mean)) * invstd
//   grad_input  = scale * (g - grad_bias / n - (input - mean) * invstd * grad_weight / n)
//
// in two passes: sums, which reads gradient and input (and the output, where the mask comes from
// it) and writes g if that is the residual's gradient; and grad_input, which reads the same, or
// g and the input, and writes once. Both visit whole rows: a few channels at a time, which would
// find their values in the cache for the second visit, were tried, and take longer, because
// prefetching does not follow such strides.
//
// Values are summed in float in pieces of a fixed size, short ones for the statistics, and those
// sums in double in a fixed order, so that the result depends on nothing but the input: not on the
// number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/batch_norm_rows.h"
#include "cpu/conv_layer.h"
#include "cpu/isa.h"
#include "cpu/scale_shift_act_operator.h"
#include "scale_shift_act.h"

namespace fused_resnet::cpu {
namespace {

using torch::stable::parallel_for;

// Rows, or values of one channel for each column of kRunColumns, that are summed in float.
constexpr int64_t kRowsPerSum = 64;
// Rows whose statistics are merged at once.
constexpr int64_t kRowsPerMerge = 4 * kRowsPerSum;
// A run of one channel is a matrix of this many columns.
constexpr int64_t kRunColumns = 64;
// Channels-last images are cut into at most this many tasks, whose sums are kept apart.
constexpr int64_t kMostTasks = 32;
constexpr int64_t kLeastPerTask = 32768;

}  // namespace

const BatchNormRows& rows_for(ScalarType dtype) {
  const BatchNormKernels* kernels = &batch_norm_baseline;
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx2) kernels = &batch_norm_avx2;
  if (cpu_isa() == Isa::avx512) kernels = &batch_norm_avx512;
#endif
  switch (dtype) {
    case ScalarType::Half:
      return kernels->float16;
    case ScalarType::BFloat16:
      return kernels->bfloat16;
    case ScalarType::Double:
      return kernels->float64;
    default:
      return kernels->float32;
  }
}

namespace {

// A dense tensor as `images` of `channels` runs of `length`, or, where the channels lie innermost,
// as `images` rows of `channels` with a length of 1.
struct Layout {
  int64_t images, channels, length;
};

Layout layout_of(const char* name, const Tensor& tensor) {
  FR_CHECK(tensor.dim() >= 2, name, ": input has shape ", shape_string(tensor),
           ", must be (N, C, *)");
  check_floating(name, "input", tensor);
  const int64_t channels = tensor.size(1);
  const int64_t per_channel = channels > 0 ? tensor.numel() / channels : 0;
  if (tensor.is_contiguous()) {
    const int64_t images = std::max<int64_t>(tensor.size(0), 1);
    return {images, channels, per_channel / images};
  }
  FR_CHECK(tensor.stride(1) == 1 && is_non_overlapping_and_dense(tensor), name,
           ": input must be contiguous or channels_last");
  return {per_channel, channels, 1};
}

// Whether all rows and runs begin with a byte of a mask.
bool has_whole_masks(const Layout& layout) {
  return (layout.length > 1 ? layout.length : layout.channels) % kMaskedAtOnce == 0;
}

template <typename P, typename Value>
Tensor per_channel(const std::vector<Value>& values) {
  constexpr ScalarType dtype = sizeof(P) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor tensor = pool_tensor({static_cast<int64_t>(values.size())}, {1}, dtype);
  P* data = tensor.mutable_data_ptr<P>();
  for (size_t c = 0; c < values.size(); ++c) data[c] = static_cast<P>(values[c]);
  return tensor;
}

struct Tasks {
  int64_t count, rows;  // a task's

  explicit Tasks(const Layout& layout) {
    const int64_t wanted = layout.images * layout.channels / kLeastPerTask;
    const int64_t most = std::clamp<int64_t>(wanted, 1, kMostTasks);
    rows = (layout.images + most - 1) / most;
    rows = (rows + kRowsPerSum - 1) / kRowsPerSum * kRowsPerSum;
    count = (layout.images + rows - 1) / rows;
  }

  // How many channels of all tasks are worth a thread to add up.
  int64_t channels_at_once() const { return kLeastPerTask / 4 / count + 1; }
};

// ---- statistics --------------------------------------------------------------------------------

template <typename P>
std::tuple<Tensor, Tensor> batch_statistics_in(const Tensor& input, const Layout& layout) {
  const BatchNormRows& kernels = rows_for(input.scalar_type());
  const auto [images, channels, length] = layout;
  const int64_t size = static_cast<int64_t>(input.element_size());
  const auto* data = static_cast<const char*>(input.const_data_ptr());
  std::vector<double> mean(channels), squares(channels);
  if (length > 1) {
    const int64_t piece = kRowsPerSum * kRunColumns;
    parallel_for(
        0, channels, std::max<int64_t>(1, kLeastPerTask / (images * length)),
        [&, channels = channels, images = images, length = length](int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c) {
            int64_t count = 0;
            for (int64_t n = 0; n < images; ++n) {
              const char* run = data + (n * channels + c) * length * size;
              for (int64_t i = 0; i < length; i += piece) {
                const int64_t added = std::min(piece, length - i);
                kernels.run_statistics(run + i * size, added, count, &mean[c], &squares[c]);
                count += added;
              }
            }
          }
        });
  } else {
    const Tasks tasks(layout);
    // `mean` is a sum until all tasks are added.
    std::vector<double> means(tasks.count * channels), task_squares(tasks.count * channels);
    std::vector<P> shift(padded_columns(channels));
    kernels.sample_columns(data, images, channels, shift.data());
    parallel_for(
        0, tasks.count, 1, [&, channels = channels, images = images](int64_t begin, int64_t end) {
          std::vector<double> scratch(3 * padded_columns(channels));
          for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task * tasks.rows;
            const int64_t last = std::min(first + tasks.rows, images);
            for (int64_t row = first; row < last; row += kRowsPerMerge) {
              kernels.column_statistics(data + row * channels * size,
                                        std::min(kRowsPerMerge, last - row), channels, shift.data(),
                                        scratch.data(), row - first, &means[task * channels],
                                        &task_squares[task * channels]);
            }
          }
        });
    parallel_for(0, channels, tasks.channels_at_once(),
                 [&, images = images, channels = channels](int64_t begin, int64_t end) {
                   for (int64_t task = 0; task < tasks.count; ++task) {
                     const auto before = static_cast<double>(task * tasks.rows);
                     const double added =
                         static_cast<double>(std::min(tasks.rows, images - task * tasks.rows));
                     const double weight = added * before / (added + before);
                     const double* task_mean = &means[task * channels];
                     const double* within = &task_squares[task * channels];
                     for (int64_t c = begin; c < end; ++c) {
                       // Divided, so that equal means are that mean.
                       const double difference = task_mean[c] - mean[c] / std::max(before, 1.0);
                       mean[c] += task_mean[c] * added;
                       squares[c] += within[c] + difference * weight * difference;
                     }
                   }
                   const auto rows = static_cast<double>(images);
                   for (int64_t c = begin; c < end; ++c) mean[c] /= rows;
                 });
  }
  const auto values = static_cast<double>(images * length);
  for (double& of_channel : squares) of_channel /= values;
  return {per_channel<P>(mean), per_channel<P>(squares)};
}

}  // namespace

std::tuple<Tensor, Tensor> batch_statistics(Tensor input) {
  const Layout layout = layout_of("batch_statistics", input);
  FR_CHECK(input.numel() > 0, "batch_statistics: input is empty");
  return input.scalar_type() == ScalarType::Double ? batch_statistics_in<double>(input, layout)
                                                   : batch_statistics_in<float>(input, layout);
}

namespace {

// ---- batch norm as one multiply-add ------------------------------------------------------------

// A dense (C,) tensor's values.
template <typename P>
const P* parameter_data(const char* name, const Tensor& tensor, int64_t channels) {
  constexpr ScalarType dtype = sizeof(P) == 8 ? ScalarType::Double : ScalarType::Float;
  check_vector("batch_norm_act", name, tensor, channels, dtype);
  return tensor.const_data_ptr<P>();
}

// scale = weight * invstd and shift = bias - mean * scale, with invstd = 1 / sqrt(var + eps). Made
// here for forward and backward, which must come to the same bits: else a mask that is computed
// again is not the one used.
template <typename P>
struct NormVectors {
  const P* mean;
  std::vector<P> scale, shift, invstd;

  NormVectors(const Tensor& mean_in, const Tensor& var, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, double eps)
      : mean(parameter_data<P>("mean", mean_in, mean_in.numel())),
        scale(mean_in.numel()),
        shift(mean_in.numel()),
        invstd(mean_in.numel()) {
    const int64_t channels = mean_in.numel();
    const P* var_data = parameter_data<P>("var", var, channels);
    const P* weight_data = weight ? parameter_data<P>("weight", *weight, channels) : nullptr;
    const P* bias_data = bias ? parameter_data<P>("bias", *bias, channels) : nullptr;
    check_eps("batch_norm_act", eps);
    for (int64_t c = 0; c < channels; ++c) {
      const double exact = 1 / std::sqrt(static_cast<double>(var_data[c]) + eps);
      invstd[c] = static_cast<P>(exact);
      // Rounded before the shift is made, so that the shift belongs to the scale there will be.
      scale[c] = static_cast<P>(exact * (weight_data ? static_cast<double>(weight_data[c]) : 1));
      shift[c] = static_cast<P>((bias_data ? static_cast<double>(bias_data[c]) : 0) -
                                static_cast<double>(mean[c]) * static_cast<double>(scale[c]));
    }
  }
};

// Scale and shift of tensors that are dense, (C,), and of one dtype, float or double.
std::tuple<Tensor, Tensor> norm_vectors(Tensor mean, Tensor var, std::optional<Tensor> weight,
                                        std::optional<Tensor> bias, double eps) {
  const auto run = [&](auto parameter) -> std::tuple<Tensor, Tensor> {
    using P = decltype(parameter);
    const NormVectors<P> vectors(mean, var, weight, bias, eps);
    return {per_channel<P>(vectors.scale), per_channel<P>(vectors.shift)};
  };
  return mean.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

// The output, the batch's mean and biased variance, and, if asked for and if runs of channels
// allow, ReLU's mask as bits (cpu/scale_shift_act_operator.h).
std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> train_batch_norm_act(
    Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
    std::optional<Tensor> residual, std::string activation, bool keep_mask) {
  const auto [mean, var] = batch_statistics(input);
  const auto [scale, shift] = norm_vectors(mean, var, weight, bias, eps);
  std::optional<Tensor> passed;
  const bool keeps = keep_mask && has_whole_masks(layout_of("train_batch_norm_act", input));
  const Tensor output =
      scale_shift_act(input, scale, shift, residual, activation, keeps ? &passed : nullptr);
  return {output, mean, var, passed};
}

// ---- backward ----------------------------------------------------------------------------------

struct Backward {
  const BatchNormRows& kernels;
  Layout layout;
  int64_t element_size;
  Mask mask;
  const char *grad, *input, *output;
  const uint8_t* bits;
  char *grad_input, *masked;
  const void *mean = nullptr, *scale = nullptr, *shift = nullptr;
  bool stream = false;
  Activation act = {};

  template <typename P>
  void set_parameters(const NormVectors<P>& vectors) {
    FR_CHECK(static_cast<int64_t>(vectors.scale.size()) == layout.channels,
             "batch_norm_act: statistics and input have different channels");
    mean = vectors.mean;
    scale = vectors.scale.data();
    shift = vectors.shift.data();
  }
};

const char* at(const char* data, int64_t offset) {
  return data ? data + offset : nullptr;
}

// `rows` x `columns` values from element `first` on, with the parameters of its columns.
GradientMatrix matrix_at(const Backward& b, int64_t first, int64_t rows, int64_t columns,
                         const void* mean, const void* scale, const void* shift) {
  const int64_t offset = first * b.element_size;
  return {b.grad + offset,
          b.input + offset,
          at(b.output, offset),
          b.bits ? b.bits + first / 8 : nullptr,
          mean,
          scale,
          shift,
          rows,
          columns,
          b.stream,
          b.act};
}

// One channel's parameters, each repeated for the columns of a run.
template <typename P, size_t kCount>
class Repeated {
 public:
  Repeated(const std::array<const P*, kCount>& parameters, int64_t channel) {
    for (size_t i = 0; i < kCount; ++i) {
      if (parameters[i]) std::fill_n(values_[i], kRunColumns, parameters[i][channel]);
    }
  }
  const P* operator[](size_t i) const { return values_[i]; }

 private:
  alignas(64) P values_[kCount][kRunColumns];
};

// Calls body(first, rows, columns) for the matrices that make up a run.
template <class Body>
void for_each_matrix(int64_t first, int64_t length, const Body& body) {
  const int64_t piece = kRowsPerSum * kRunColumns;
  for (int64_t i = 0; i < length;) {
    const int64_t left = length - i, rows = std::min(piece, left) / kRunColumns;
    const int64_t columns = rows > 0 ? kRunColumns : left;
    body(first + i, std::max<int64_t>(rows, 1), columns);
    i += std::max<int64_t>(rows, 1) * columns;
  }
}

template <typename P>
void gradient_sums(const Backward& b, std::vector<double>& sum, std::vector<double>& dot) {
  const auto [images, channels, length] = b.layout;
  const P *mean = static_cast<const P*>(b.mean), *scale = static_cast<const P*>(b.scale),
          *shift = static_cast<const P*>(b.shift);
  const auto masked_at = [&](int64_t first) {
    return b.masked ? b.masked + first * b.element_size : nullptr;
  };
  if (length > 1) {
    parallel_for(
        0, channels, std::max<int64_t>(1, kLeastPerTask / (images * length)),
        [&, images = images, channels = channels, length = length](int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c) {
            const Repeated<P, 3> parameters({mean, scale, shift}, c);
            for (int64_t n = 0; n < images; ++n) {
              for_each_matrix((n * channels + c) * length, length,
                              [&](int64_t first, int64_t rows, int64_t columns) {
                                P sums[kRunColumns] = {}, dots[kRunColumns] = {};
                                b.kernels.gradient_sums(
                                    matrix_at(b, first, rows, columns, parameters[0], parameters[1],
                                              parameters[2]),
                                    b.mask, masked_at(first), sums, dots);
                                for (int64_t i = 0; i < columns; ++i) {
                                  sum[c] += static_cast<double>(sums[i]);
                                  dot[c] += static_cast<double>(dots[i]);
                                }
                              });
            }
          }
          if (b.stream && b.masked) finish_streaming();
        });
    return;
  }
  const Tasks tasks(b.layout);
  std::vector<double> sums(tasks.count * channels), dots(tasks.count * channels);
  parallel_for(0, tasks.count, 1,
               [&, images = images, channels = channels](int64_t begin, int64_t end) {
                 std::vector<P> part(2 * channels);
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t last = std::min((task + 1) * tasks.rows, images);
                   for (int64_t row = task * tasks.rows; row < last; row += kRowsPerSum) {
                     std::fill(part.begin(), part.end(), P(0));
                     const int64_t rows = std::min(kRowsPerSum, last - row);
                     b.kernels.gradient_sums(
                         matrix_at(b, row * channels, rows, channels, mean, scale, shift), b.mask,
                         masked_at(row * channels), part.data(), part.data() + channels);
                     for (int64_t c = 0; c < channels; ++c) {
                       sums[task * channels + c] += static_cast<double>(part[c]);
                       dots[task * channels + c] += static_cast<double>(part[channels + c]);
                     }
                   }
                 }
                 if (b.stream && b.masked) finish_streaming();
               });
  parallel_for(0, channels, tasks.channels_at_once(),
               [&, channels = channels](int64_t begin, int64_t end) {
                 for (int64_t task = 0; task < tasks.count; ++task) {
                   for (int64_t c = begin; c < end; ++c) {
                     sum[c] += sums[task * channels + c];
                     dot[c] += dots[task * channels + c];
                   }
                 }
               });
}

template <typename P>
void input_gradient(const Backward& b, const P* slope, const P* offset) {
  const auto [images, channels, length] = b.layout;
  const P *mean = static_cast<const P*>(b.mean), *scale = static_cast<const P*>(b.scale),
          *shift = static_cast<const P*>(b.shift);
  if (length > 1) {
    parallel_for(
        0, images * channels, std::max<int64_t>(1, kLeastPerTask / length),
        [&, channels = channels, length = length](int64_t begin, int64_t end) {
          for (int64_t run = begin; run < end; ++run) {
            const Repeated<P, 5> parameters({mean, scale, shift, slope, offset}, run % channels);
            for_each_matrix(
                run * length, length, [&](int64_t first, int64_t rows, int64_t columns) {
                  b.kernels.input_gradient(matrix_at(b, first, rows, columns, parameters[0],
                                                     parameters[1], parameters[2]),
                                           b.mask, slope ? parameters[3] : nullptr, parameters[4],
                                           b.grad_input + first * b.element_size);
                });
          }
          if (b.stream) finish_streaming();
        });
    return;
  }
  parallel_for(0, images, std::max<int64_t>(1, kLeastPerTask / channels),
               [&, channels = channels](int64_t begin, int64_t end) {
                 b.kernels.input_gradient(
                     matrix_at(b, begin * channels, end - begin, channels, mean, scale, shift),
                     b.mask, slope, offset, b.grad_input + begin * channels * b.element_size);
                 if (b.stream) finish_streaming();
               });
}

// What a pass of the backward works on, without the parameters.
Backward backward_of(const char* name, const Tensor& grad, const Tensor& input,
                     const std::optional<Tensor>& output, bool relu,
                     const std::optional<Tensor>& grad_input, const std::optional<Tensor>& masked) {
  const Layout layout = layout_of(name, input);
  FR_CHECK(input.numel() > 0, name, ": input is empty");
  const bool has_bits = relu && output && output->scalar_type() == ScalarType::Byte;
  check_alike(name, "grad", grad, input);
  if (has_bits) {
    check_vector(name, "output, a mask,", *output, input.numel() / 8, ScalarType::Byte);
    FR_CHECK(has_whole_masks(layout), name, ": input has no mask, of rows of a multiple of ",
             kMaskedAtOnce, " values");
  } else if (output) {
    check_alike(name, "output", *output, input);
  }
  if (grad_input) check_alike(name, "grad_input", *grad_input, input);
  if (masked) check_alike(name, "masked", *masked, input);
  const Mask mask = !relu      ? Mask::everywhere
                    : has_bits ? Mask::bits
                    : output   ? Mask::output
                               : Mask::recomputed;
  return {rows_for(input.scalar_type()),
          layout,
          static_cast<int64_t>(input.element_size()),
          mask,
          static_cast<const char*>(grad.const_data_ptr()),
          static_cast<const char*>(input.const_data_ptr()),
          mask == Mask::output ? static_cast<const char*>(output->const_data_ptr()) : nullptr,
          mask == Mask::bits ? output->const_data_ptr<uint8_t>() : nullptr,
          grad_input ? static_cast<char*>(grad_input->mutable_data_ptr()) : nullptr,
          masked ? static_cast<char*>(masked->mutable_data_ptr()) : nullptr,
          nullptr,
          nullptr,
          nullptr,
          exceeds_caches(input)};
}

// Sums over the joint batch of `count` values a channel, of which this tensor may be a part.
struct Sums {
  std::vector<double> total, dot;
  double count;
};

template <typename P>
Sums sums_of(Backward& b, const NormVectors<P>& vectors) {
  b.set_parameters(vectors);
  const auto [images, channels, length] = b.layout;
  Sums sums{std::vector<double>(channels), std::vector<double>(channels),
            static_cast<double>(images * length)};
  gradient_sums<P>(b, sums.total, sums.dot);
  if (b.masked) {  // which later passes read instead
    b.grad = b.masked;
    b.mask = Mask::everywhere;
  }
  return sums;
}

// Through the statistics where `sums` is given.
template <typename P>
void input_gradient_of(Backward& b, const NormVectors<P>& vectors, const Sums* sums) {
  b.set_parameters(vectors);
  if (!sums) return input_gradient<P>(b, nullptr, nullptr);
  std::vector<P> slope(b.layout.channels), offset(b.layout.channels);
  for (int64_t c = 0; c < b.layout.channels; ++c) {
    const auto scale = static_cast<double>(vectors.scale[c]);
    const auto invstd = static_cast<double>(vectors.invstd[c]);
    slope[c] = static_cast<P>(-scale * invstd * invstd * sums->dot[c] / sums->count);
    offset[c] = static_cast<P>(-scale * sums->total[c] / sums->count);
  }
  input_gradient<P>(b, slope.data(), offset.data());
}

// Gradients of weight and bias; writes `grad_input`, which may be `grad`, and g to `masked`. Where
// `output` is given the mask comes from it, which may be bits (train_batch_norm_act), else it is
// computed from the input.
std::tuple<Tensor, Tensor> batch_norm_act_backward(
    Tensor grad, Tensor input, std::optional<Tensor> output, std::optional<Tensor> weight,
    std::optional<Tensor> bias, Tensor mean, Tensor var, double eps, bool relu, bool training,
    std::optional<Tensor> grad_input, std::optional<Tensor> masked) {
  Backward b =
      backward_of("batch_norm_act_backward", grad, input, output, relu, grad_input, masked);
  const auto run = [&](auto parameter) -> std::tuple<Tensor, Tensor> {
    using P = decltype(parameter);
    const NormVectors<P> vectors(mean, var, weight, bias, eps);
    Sums sums = sums_of(b, vectors);
    if (grad_input) input_gradient_of(b, vectors, training ? &sums : nullptr);
    for (int64_t c = 0; c < b.layout.channels; ++c) {
      sums.dot[c] *= static_cast<double>(vectors.invstd[c]);
    }
    return {per_channel<P>(sums.dot), per_channel<P>(sums.total)};
  };
  return input.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Activation activation_of(int64_t kind, double first, double second) {
  FR_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Act::kGeluTanh),
           "batch_norm_act: activation is ", kind, ", must be one of those in activations.h");
  return {static_cast<Act>(kind), static_cast<float>(first), static_cast<float>(second)};
}

// output = act(batch norm of input + residual), with any activation; of float64 ReLU or none.
void normalize_act(Tensor input, Tensor mean, Tensor var, std::optional<Tensor> weight,
                   std::optional<Tensor> bias, double eps, std::optional<Tensor> residual,
                   int64_t act, double first, double second, Tensor output) {
  const auto [scale, shift] = norm_vectors(mean, var, weight, bias, eps);
  scale_shift_act_into(input, scale, shift, residual, activation_of(act, first, second), output);
}

// As batch_norm_act_backward, with any activation and what was added before it, which lies as the
// input does; not of float64. `masked` is written, and may be `grad` or `grad_input`.
std::tuple<Tensor, Tensor> normalize_act_backward(
    Tensor grad, Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
    std::optional<Tensor> bias, Tensor mean, Tensor var, double eps, int64_t act, double first,
    double second, bool training, std::optional<Tensor> grad_input, Tensor masked) {
  constexpr const char* name = "normalize_act_backward";
  FR_CHECK(input.scalar_type() != ScalarType::Double, name, ": input is float64");
  Backward b = backward_of(name, grad, input, residual, false, grad_input, masked);
  b.mask = Mask::derivative;
  b.act = activation_of(act, first, second);
  b.output = residual ? static_cast<const char*>(residual->const_data_ptr()) : nullptr;
  const NormVectors<float> vectors(mean, var, weight, bias, eps);
  Sums sums = sums_of(b, vectors);
  if (grad_input) input_gradient_of(b, vectors, training ? &sums : nullptr);
  for (int64_t c = 0; c < b.layout.channels; ++c) {
    sums.dot[c] *= static_cast<double>(vectors.invstd[c]);
  }
  return {per_channel<float>(sums.dot), per_channel<float>(sums.total)};
}

// The first pass alone: the sums of g and of g * (input - mean).
std::tuple<Tensor, Tensor> batch_norm_act_backward_sums(Tensor grad, Tensor input,
                                                        std::optional<Tensor> output,
                                                        std::optional<Tensor> weight,
                                                        std::optional<Tensor> bias, Tensor mean,
                                                        Tensor var, double eps, bool relu) {
  Backward b = backward_of("batch_norm_act_backward_sums", grad, input, output, relu, {}, {});
  const auto run = [&](auto parameter) -> std::tuple<Tensor, Tensor> {
    using P = decltype(parameter);
    const Sums sums = sums_of(b, NormVectors<P>(mean, var, weight, bias, eps));
    return {per_channel<P>(sums.total), per_channel<P>(sums.dot)};
  };
  return input.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

// The second pass alone, with the sums of a joint batch of `count` values a channel.
void batch_norm_act_backward_input(Tensor grad, Tensor input, std::optional<Tensor> output,
                                   std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   Tensor mean, Tensor var, double eps, bool relu, Tensor total,
                                   Tensor dot, double count, Tensor grad_input) {
  constexpr const char* name = "batch_norm_act_backward_input";
  Backward b = backward_of(name, grad, input, output, relu, grad_input, {});
  FR_CHECK(count > 0, name, ": count is ", count, ", must be positive");
  const auto run = [&](auto parameter) {
    using P = decltype(parameter);
    const auto values = [&](const char* what, const Tensor& tensor) {
      const P* data = parameter_data<P>(what, tensor, b.layout.channels);
      return std::vector<double>(data, data + b.layout.channels);
    };
    const Sums sums{values("total", total), values("dot", dot), count};
    input_gradient_of(b, NormVectors<P>(mean, var, weight, bias, eps), &sums);
  };
  input.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

// torch.empty_like(like) in the pool's memory.
Tensor pool_empty_like(Tensor like) {
  check_floating("pool_empty_like", "like", like);
  FR_CHECK(is_non_overlapping_and_dense(like), "pool_empty_like: like must be dense");
  return pool_tensor(like.sizes().vec(), like.strides().vec(), like.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics));
  m.impl("train_batch_norm_act", TORCH_BOX(&train_batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
  m.impl("batch_norm_act_backward_sums", TORCH_BOX(&batch_norm_act_backward_sums));
  m.impl("batch_norm_act_backward_input", TORCH_BOX(&batch_norm_act_backward_input));
  m.impl("norm_vectors", TORCH_BOX(&norm_vectors));
  m.impl("normalize_act", TORCH_BOX(&normalize_act));
  m.impl("normalize_act_backward", TORCH_BOX(&normalize_act_backward));
  m.impl("pool_empty_like", TORCH_BOX(&pool_empty_like));
}

}  // namespace fused_resnet::cpu
