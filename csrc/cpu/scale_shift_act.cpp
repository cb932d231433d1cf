// scale_shift_act on the CPU: output = act(input * scale[c] + shift[c] + residual), in one pass
// that reads input and residual once and writes output once: (2 or 3) * numel * element size bytes.
// A residual of fewer channels is read as it lies, and its zeros are made row by row in the cache.
#include "cpu/scale_shift_act_operator.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv_layer.h"
#include "cpu/isa.h"
#include "cpu/scale_shift_act_row.h"
#include "scale_shift_act.h"

namespace fused_resnet {
namespace {

// Elements a thread should have at least, as in torch's own elementwise kernels.
constexpr int64_t kGrainSize = 32768;
// Channels-last rows shorter than this are joined, with scale and shift repeated, so that few
// channels do not mean short vectors.
constexpr int64_t kShortRow = 128;

const ScaleShiftActRows& rows_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return scale_shift_act_avx512;
  if (isa == Isa::avx2) return scale_shift_act_avx2;
#endif
  (void)isa;
  return scale_shift_act_baseline;
}

}  // namespace

ScaleShiftActRow cpu::scale_shift_act_row(ScalarType dtype) {
  const ScaleShiftActRows& rows = rows_for(cpu_isa());
  switch (dtype) {
    case ScalarType::Half:
      return rows.float16;
    case ScalarType::BFloat16:
      return rows.bfloat16;
    case ScalarType::Double:
      return rows.float64;
    default:
      return rows.float32;
  }
}

namespace {

// A row of a strided operand as dense memory: the row itself, or a copy in `buffer`.
class Row {
 public:
  static constexpr int64_t kCapacity = 512;

  Row(const Tensor& tensor, int64_t stride)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        stride_(stride),
        element_size_(static_cast<int64_t>(tensor.element_size())) {}

  bool is_dense() const { return stride_ == 1; }

  const void* at(int64_t offset, int64_t count) {
    const char* source = data_ + offset * element_size_;
    if (is_dense()) return source;
    switch (element_size_) {
      case 2:
        return gather<uint16_t>(source, count);
      case 4:
        return gather<uint32_t>(source, count);
      default:
        return gather<uint64_t>(source, count);
    }
  }

  // `count` values from column `first` on, of which only those in [begin, end) are there; the
  // others are zero. Null where none is there.
  const void* between_zeros(int64_t offset, int64_t first, int64_t count, int64_t begin,
                            int64_t end) {
    const int64_t from = std::max(first, begin), to = std::min(first + count, end);
    if (from >= to) return nullptr;
    const void* there = at(offset + (from - begin) * stride_, to - from);
    if (to - from == count) return there;
    const int64_t before = (from - first) * element_size_, size = (to - from) * element_size_;
    std::memmove(buffer_ + before, there, size);
    std::memset(buffer_, 0, before);
    std::memset(buffer_ + before + size, 0, count * element_size_ - before - size);
    return buffer_;
  }

 private:
  template <typename Bits>
  const void* gather(const char* source, int64_t count) {
    const Bits* from = reinterpret_cast<const Bits*>(source);
    Bits* to = reinterpret_cast<Bits*>(buffer_);
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride_];
    return to;
  }

  const char* data_;
  int64_t stride_;
  int64_t element_size_;
  alignas(64) char buffer_[kCapacity * 8];
};

struct Problem {
  const Tensor& input;
  const void* scale;  // double for float64 input, else float
  const void* shift;
  const std::optional<Tensor>& residual;
  ResidualChannels residual_channels;
  const Tensor& output;
  std::vector<Loop> loops;  // outermost first, never empty
  Activation act;
  bool stream;
  uint8_t* passed;
};

// Elements [begin, end) of the output in memory order.
void run_range(const Problem& problem, ScaleShiftActRow kernel, int64_t begin, int64_t end) {
  const int64_t element_size = static_cast<int64_t>(problem.input.element_size());
  const int64_t parameter_size = element_size == 8 ? 8 : 4;
  const auto* scale = static_cast<const char*>(problem.scale);
  const auto* shift = static_cast<const char*>(problem.shift);
  auto* output = static_cast<char*>(problem.output.mutable_data_ptr());

  const Loop& inner = problem.loops.back();
  const int64_t outer_count = static_cast<int64_t>(problem.loops.size()) - 1;
  Row input_row(problem.input, inner.input);
  std::optional<Row> residual_row;
  if (problem.residual) residual_row.emplace(*problem.residual, inner.residual);
  const auto [residual_begin, residual_end] = problem.residual_channels;
  const bool narrow = residual_row && !problem.residual_channels.are_all(problem.input.size(1));
  const bool all_dense =
      input_row.is_dense() && (!residual_row || (residual_row->is_dense() && !narrow));
  // The step from channel to channel, by which the residual's first one comes later.
  const int64_t residual_step = narrow ? step_of(*problem.residual, 1) : 0;
  const int64_t longest = all_dense ? inner.size : std::min(inner.size, Row::kCapacity);

  std::vector<int64_t> index(outer_count);
  int64_t row = begin / inner.size;
  for (int64_t i = outer_count - 1; i >= 0; --i) {
    index[i] = row % problem.loops[i].size;
    row /= problem.loops[i].size;
  }
  int64_t column = begin % inner.size;
  for (int64_t position = begin; position < end;) {
    int64_t input_offset = 0, residual_offset = 0, channel = 0;
    for (int64_t i = 0; i < outer_count; ++i) {
      const Loop& loop = problem.loops[i];
      input_offset += index[i] * loop.input;
      residual_offset += index[i] * loop.residual;
      if (loop.is_channel) channel = index[i];
    }
    const int64_t row_end = std::min(inner.size, column + end - position);
    while (column < row_end) {
      const int64_t count = std::min(longest, row_end - column);
      const int64_t first = inner.is_channel ? column : channel;
      const void* residual = nullptr;
      if (narrow && inner.is_channel) {
        residual = residual_row->between_zeros(residual_offset, column, count, residual_begin,
                                               residual_end);
      } else if (narrow) {
        if (residual_begin <= channel && channel < residual_end) {
          residual = residual_row->at(
              residual_offset - residual_begin * residual_step + column * inner.residual, count);
        }
      } else if (residual_row) {
        residual = residual_row->at(residual_offset + column * inner.residual, count);
      }
      kernel(input_row.at(input_offset + column * inner.input, count),
             scale + first * parameter_size, shift + first * parameter_size, residual,
             output + position * element_size, count, !inner.is_channel, problem.act,
             problem.stream, problem.passed ? problem.passed + position / 8 : nullptr);
      column += count;
      position += count;
    }
    column = 0;
    for (int64_t i = outer_count - 1; i >= 0 && ++index[i] == problem.loops[i].size; --i) {
      index[i] = 0;
    }
  }
  if (problem.stream) finish_streaming();
}

// `parameter` (C,) repeated `times` times.
template <typename T>
std::vector<T> repeat(const T* parameter, int64_t channels, int64_t times) {
  std::vector<T> repeated;
  repeated.reserve(channels * times);
  for (int64_t i = 0; i < times; ++i) {
    repeated.insert(repeated.end(), parameter, parameter + channels);
  }
  return repeated;
}

// Whether every operand is one dense run of channels-last pixels.
bool is_dense_channels_last(const std::vector<Loop>& loops) {
  const Loop& inner = loops.back();
  if (!inner.is_channel || inner.input != 1 || inner.residual != 1 || loops.size() > 2)
    return false;
  return loops.size() == 1 || (loops[0].input == inner.size && loops[0].residual == inner.size);
}

template <typename T>
void run(Problem problem, const Tensor& scale, const Tensor& shift) {
  const T* scale_data = scale.const_data_ptr<T>();
  const T* shift_data = shift.const_data_ptr<T>();
  std::vector<T> long_scale, long_shift;
  const int64_t channels = problem.loops.back().size;
  const bool narrow = problem.residual && !problem.residual_channels.are_all(problem.input.size(1));
  if (channels < kShortRow && !narrow && is_dense_channels_last(problem.loops)) {
    const int64_t times = kShortRow / channels + 1, size = channels * times;
    const int64_t rows = (problem.output.numel() + size - 1) / size;
    scale_data = (long_scale = repeat(scale_data, channels, times)).data();
    shift_data = (long_shift = repeat(shift_data, channels, times)).data();
    problem.loops = {Loop{rows, size, size, size, false}, Loop{size, 1, 1, 1, true}};
  }
  problem.scale = scale_data;
  problem.shift = shift_data;
  // No two threads write to one line, or to one byte of a mask.
  const int64_t size = problem.output.numel(), unit = kGrainSize / 64;
  // Not in the parallel region: not every torch hands on the text of an error thrown there.
  const ScaleShiftActRow kernel = cpu::scale_shift_act_row(problem.input.scalar_type());
  torch::stable::parallel_for(0, (size + unit - 1) / unit, 64, [&](int64_t begin, int64_t end) {
    run_range(problem, kernel, begin * unit, std::min(end * unit, size));
  });
}

// Into `output`, which it returns.
Tensor finish(const Tensor& input, const Tensor& scale, const Tensor& shift,
              const std::optional<Tensor>& residual, const Activation& act, Tensor output,
              std::optional<Tensor>* passed) {
  if (output.numel() == 0) return output;
  Problem problem{input,
                  nullptr,
                  nullptr,
                  residual,
                  {input.size(1), residual},
                  output,
                  make_loops(input, residual, output),
                  act,
                  cpu::exceeds_caches(output) && output.const_data_ptr() != input.const_data_ptr(),
                  nullptr};
  if (passed && cpu::is_relu(act) && problem.loops.back().size % kMaskedAtOnce == 0) {
    *passed = cpu::pool_tensor({output.numel() / 8}, {1}, ScalarType::Byte);
    problem.passed = (*passed)->mutable_data_ptr<uint8_t>();
  }
  if (input.scalar_type() == ScalarType::Double) {
    run<double>(problem, dense_parameter(scale), dense_parameter(shift));
  } else {
    run<float>(problem, dense_parameter(scale), dense_parameter(shift));
  }
  return output;
}

}  // namespace

Tensor cpu::scale_shift_act(const Tensor& input, const Tensor& scale, const Tensor& shift,
                            const std::optional<Tensor>& residual, const std::string& activation,
                            std::optional<Tensor>* passed) {
  const bool relu = check_scale_shift_act(input, scale, shift, residual, activation);
  const Activation act{relu ? Act::kRelu : Act::kNone, 0, 0};
  if (input.numel() == 0 || !is_non_overlapping_and_dense(input)) {
    return finish(input, scale, shift, residual, act, empty_output(input), nullptr);
  }
  return finish(input, scale, shift, residual, act,
                pool_tensor(input.sizes().vec(), input.strides().vec(), input.scalar_type()),
                passed);
}

void cpu::scale_shift_act_into(const Tensor& input, const Tensor& scale, const Tensor& shift,
                               const std::optional<Tensor>& residual, const Activation& act,
                               const Tensor& output) {
  check_scale_shift_act(input, scale, shift, residual, "none");
  check_alike("scale_shift_act", "output", output, input);
  FR_CHECK(!is_other(act) || input.scalar_type() != ScalarType::Double,
           "scale_shift_act: of float64 there is no activation but relu");
  finish(input, scale, shift, residual, act, output, nullptr);
}

namespace {

Tensor scale_shift_act(Tensor input, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                       std::string activation) {
  return cpu::scale_shift_act(input, scale, shift, residual, activation);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("scale_shift_act", TORCH_BOX(&fused_resnet::scale_shift_act));
}
