// The loops of batch norm's training over dense rows, and the tables of them (cpu/isa.h).
//
// A matrix here is `rows` x `columns` dense values, each column of one channel: channels-last
// pixels, or a run of one channel's values with that channel's parameters repeated.
#pragma once

#include <stdint.h>

#include "cpu/vectors.h"

namespace fused_resnet {

// Where the gradient passes the activation: everywhere, or where its output is not <= 0, which is
// computed again as input * scale + shift, or read, or told by bits (ScaleShiftActRow's `passed`).
enum class Mask { everywhere, recomputed, output, bits };

// Parameters, `sum` and `dot` are float, double for float64. `output` is read for Mask::output
// only, `bits` for Mask::bits, whose `columns` are a multiple of kMaskedAtOnce.
struct GradientMatrix {
  const void *grad, *input, *output;
  const uint8_t* bits;
  const void *mean, *scale, *shift;
  int64_t rows, columns;
  bool stream;  // whether what is written goes past the caches, if it lies on a line's border
};

// The longest vector's values.
constexpr int64_t kMostWidth = 16;

struct BatchNormRows {
  // Merges the columns' statistics into those of the `count` values before them: `sum` of the
  // values and `squares` of their deviations from their mean. `scratch` has 3 numbers for each
  // column, whose number is rounded up to a multiple of kMostWidth.
  void (*column_statistics)(const void* input, int64_t rows, int64_t columns, double* scratch,
                            int64_t count, double* sum, double* squares);
  // The same for `size` values of one channel.
  void (*run_statistics)(const void* input, int64_t size, int64_t count, double* sum,
                         double* squares);
  // Adds, for each column, the sum of g and of g * (input - mean), where g is the gradient behind
  // the activation; writes g to `masked` unless that is null.
  void (*gradient_sums)(const GradientMatrix& matrix, Mask mask, void* masked, void* sum,
                        void* dot);
  // grad_input = g * scale + ((input - mean) * slope + offset), g * scale alone where `slope` is
  // null. It may be `grad` itself.
  void (*input_gradient)(const GradientMatrix& matrix, Mask mask, const void* slope,
                         const void* offset, void* grad_input);
};

struct BatchNormKernels {
  BatchNormRows float16, bfloat16, float32, float64;
};

extern const BatchNormKernels batch_norm_baseline;
extern const BatchNormKernels batch_norm_avx2;
extern const BatchNormKernels batch_norm_avx512;

namespace {

// Sums of columns' values less `shift`, and of their squares, in double: those of floats may
// overflow in float, and beside an outlier what the others come without would be lost.
struct ColumnSums {
  double *shift, *deviations, *squared;  // kept for whole vectors

  ColumnSums(double* scratch, int64_t columns)
      : shift(scratch),
        deviations(shift + padded(columns)),
        squared(deviations + padded(columns)) {}

  static constexpr int64_t padded(int64_t columns) {
    return (columns + kMostWidth - 1) / kMostWidth * kMostWidth;
  }

  // A column's sum of squared deviations from its mean.
  double within(int64_t i, double per_row) const {
    const double deviation = deviations[i];
    const double difference = squared[i] - deviation * per_row * deviation;
    return difference < 0 ? 0 : difference;
  }

  // Whether all of these have kept digits enough, as sums without a shift do unless values lie far
  // from zero and close together.
  bool have_digits(int64_t columns, double per_row) const {
    int64_t lost = 0;  // not a bool, so that the loop is vectorised
    for (int64_t i = 0; i < columns; ++i) {
      lost += within(i, per_row) >= 0x1p-20 * squared[i] ? 0 : 1;
    }
    return lost == 0;
  }

  // Pairwise merging of sums of squared deviations: Chan, Golub and LeVeque, "Updating formulae and
  // a pairwise algorithm for computing sample variances" (1979), equation 2.1.
  void merge_into(double* sum, double* squares, int64_t columns, double added, double count) const {
    const double per_added = 1 / added, before = count > 0 ? count : 1;
    const double weight = added * count / (added + count);
    for (int64_t i = 0; i < columns; ++i) {
      const double mean = shift[i] + deviations[i] * per_added;
      // Divided, so that the mean of values that are all the same is that value.
      const double difference = mean - sum[i] / before;
      // Squares that overflow, as those of large float64 values do, are infinite, not NaN.
      double own = deviations[i] - deviations[i] == 0 ? squared[i] : within(i, per_added);
      own = squared[i] - squared[i] == 0 ? within(i, per_added) : own;
      sum[i] += mean * added;
      squares[i] += own + difference * weight * difference;
    }
  }
};

// Infinity minus itself would hide in which direction the mean is infinite.
inline double finite_or_zero(double x) {
  return x - x == 0 ? x : 0;
}

// So many rows are added up in registers before their sum is added to the columns'.
constexpr int64_t kRowsAtOnce = 4, kStatisticsRowsAtOnce = 8;

template <class V, bool kShifted, int64_t kRows>
void add_rows(const typename V::Element* row, int64_t columns, const ColumnSums& sums) {
  using Doubles = decltype(load_wide(V(), row));
  for_each_vector<V>(columns, [&](int64_t i, auto... rest) {
    auto sum = Doubles::load(sums.deviations + i), squared = Doubles::load(sums.squared + i);
    for (int64_t k = 0; k < kRows; ++k) {
      auto x = load_wide(V(), row + k * columns + i, rest...);
      if constexpr (kShifted) x.subtract(Doubles::load(sums.shift + i));
      sum.add(x);
      squared.add_square(x);
    }
    sum.store(sums.deviations + i);
    squared.store(sums.squared + i);
  });
}

// With a shift that is one of the column's values at most a factor of their number cancels.
template <class V, bool kShifted>
void sum_columns(const typename V::Element* row, int64_t rows, int64_t columns,
                 const ColumnSums& sums) {
  if constexpr (kShifted) {
    for_each_vector<V>(columns, [&](int64_t i, auto... rest) {
      load_wide(V(), row + i, rest...).store(sums.shift + i);
    });
  }
  for (int64_t i = 0; i < ColumnSums::padded(columns); ++i) {
    sums.shift[i] = kShifted ? finite_or_zero(sums.shift[i]) : 0;
    sums.deviations[i] = sums.squared[i] = 0;
  }
  int64_t r = 0;
  for (; r + kStatisticsRowsAtOnce <= rows; r += kStatisticsRowsAtOnce) {
    add_rows<V, kShifted, kStatisticsRowsAtOnce>(row + r * columns, columns, sums);
  }
  for (; r < rows; ++r) add_rows<V, kShifted, 1>(row + r * columns, columns, sums);
}

template <class V>
void column_statistics(const void* input, int64_t rows, int64_t columns, double* scratch,
                       int64_t count, double* sum, double* squares) {
  const auto* row = static_cast<const typename V::Element*>(input);
  const ColumnSums sums(scratch, columns);
  const auto added = static_cast<double>(rows);
  sum_columns<V, false>(row, rows, columns, sums);
  if (!sums.have_digits(columns, 1 / added)) sum_columns<V, true>(row, rows, columns, sums);
  sums.merge_into(sum, squares, columns, added, static_cast<double>(count));
}

// The sums of one column, whose values lie side by side.
template <class V, bool kShifted>
void sum_run(const typename V::Element* run, int64_t size, const ColumnSums& sums) {
  using Doubles = decltype(load_wide(V(), run));
  constexpr int64_t kAtOnce = V::width > 1 ? 2 : 4;  // sums that do not wait for each other
  typename V::Parameter values[V::width];
  V::store_parameter(values, V::load(run, 1), 1);
  const double shift = kShifted ? finite_or_zero(values[0]) : 0;
  const auto shifts = Doubles::broadcast(shift);
  Doubles deviations[kAtOnce], squared[kAtOnce];
  for (int64_t k = 0; k < kAtOnce; ++k) deviations[k] = squared[k] = Doubles::broadcast(0);
  const auto add = [&](int64_t k, Doubles x) {
    if constexpr (kShifted) x.subtract(shifts);
    deviations[k].add(x);
    squared[k].add_square(x);
  };
  int64_t i = 0;
  for (; i + kAtOnce * V::width <= size; i += kAtOnce * V::width) {
    for (int64_t k = 0; k < kAtOnce; ++k) add(k, load_wide(V(), run + i + k * V::width));
  }
  for (; i + V::width <= size; i += V::width) add(0, load_wide(V(), run + i));
  const auto total = [](Doubles(&of)[kAtOnce]) {
    double lanes[Doubles::width], total = 0;
    for (int64_t k = 1; k < kAtOnce; ++k) of[0].add(of[k]);
    of[0].store(lanes);
    for (double lane : lanes) total += lane;
    return total;
  };
  *sums.shift = shift;
  *sums.deviations = total(deviations);
  *sums.squared = total(squared);
  if (i == size) return;
  V::store_parameter(values, V::load(run + i, size - i), size - i);
  for (int64_t lane = 0; lane < size - i; ++lane) {
    const double x = values[lane] - shift;
    *sums.deviations += x;
    *sums.squared += x * x;
  }
}

template <class V>
void run_statistics(const void* input, int64_t size, int64_t count, double* sum, double* squares) {
  const auto* run = static_cast<const typename V::Element*>(input);
  double scratch[3 * kMostWidth];
  const ColumnSums sums(scratch, 1);
  const auto added = static_cast<double>(size);
  sum_run<V, false>(run, size, sums);
  if (!sums.have_digits(1, 1 / added)) sum_run<V, true>(run, size, sums);
  sums.merge_into(sum, squares, 1, added, static_cast<double>(count));
}

// A matrix's pointers, typed, on one of its rows.
template <class V>
struct GradientRow {
  using P = typename V::Parameter;
  const typename V::Element *grad, *input, *output;
  const uint8_t* bits;
  const P *mean, *scale, *shift;

  explicit GradientRow(const GradientMatrix& m)
      : grad(static_cast<const typename V::Element*>(m.grad)),
        input(static_cast<const typename V::Element*>(m.input)),
        output(static_cast<const typename V::Element*>(m.output)),
        bits(m.bits),
        mean(static_cast<const P*>(m.mean)),
        scale(static_cast<const P*>(m.scale)),
        shift(static_cast<const P*>(m.shift)) {}

  // The gradient behind the activation of `element`, which is x, in column i.
  template <Mask kMask, class... Rest>
  typename V::Register masked(int64_t element, int64_t i, typename V::Register x,
                              Rest... rest) const {
    const auto g = V::load(grad + element, rest...);
    if constexpr (kMask == Mask::recomputed) {
      return V::where_positive(V::multiply_add(x, V::load_parameter(scale + i, rest...),
                                               V::load_parameter(shift + i, rest...)),
                               g);
    } else if constexpr (kMask == Mask::output) {
      return V::where_positive(V::load(output + element, rest...), g);
    } else if constexpr (kMask == Mask::bits) {
      return V::where_bits(bits_at<V>(bits, element), g);
    } else {
      return g;
    }
  }

  void advance(int64_t elements) {
    grad += elements;
    input += elements;
    if (output) output += elements;
    if (bits) bits += elements / 8;
  }
};

// Whether the vectors of all rows written at `out` can be streamed.
template <class V>
bool streams_rows(const GradientMatrix& matrix, const void* out) {
  constexpr int64_t kLine = 64 / sizeof(typename V::Element);
  return matrix.stream && is_streamable(out) && (matrix.rows == 1 || matrix.columns % kLine == 0);
}

enum class Masked { dropped, stored, streamed };

template <class V, Mask kMask, Masked kMasked, int64_t kRows>
void add_gradients(const GradientRow<V>& row, int64_t columns, typename V::Element* masked,
                   typename V::Parameter* sum, typename V::Parameter* dot) {
  for_each_vector<V>(columns, [&](int64_t i, auto... rest) {
    const auto mean = V::load_parameter(row.mean + i, rest...);
    auto column_sum = V::load_parameter(sum + i, rest...);
    auto column_dot = V::load_parameter(dot + i, rest...);
    for (int64_t k = 0; k < kRows; ++k) {
      const int64_t element = k * columns + i;
      const auto x = V::load(row.input + element, rest...);
      const auto g = row.template masked<kMask>(element, i, x, rest...);
      if constexpr (kMasked != Masked::dropped) {
        store_or_stream<V, kMasked == Masked::streamed>(masked + element, g, rest...);
      }
      column_sum = column_sum + g;
      column_dot = V::multiply_add(g, x - mean, column_dot);
    }
    V::store_parameter(sum + i, column_sum, rest...);
    V::store_parameter(dot + i, column_dot, rest...);
  });
}

template <class V, Mask kMask, Masked kMasked>
void gradient_sums_loop(const GradientMatrix& matrix, void* masked_out, void* sum_out,
                        void* dot_out) {
  using P = typename V::Parameter;
  GradientRow<V> row(matrix);
  auto* masked = static_cast<typename V::Element*>(masked_out);
  P *sum = static_cast<P*>(sum_out), *dot = static_cast<P*>(dot_out);
  int64_t r = 0;
  const auto advance = [&](int64_t rows) {
    row.advance(rows * matrix.columns);
    if constexpr (kMasked != Masked::dropped) masked += rows * matrix.columns;
    r += rows;
  };
  while (r + kRowsAtOnce <= matrix.rows) {
    add_gradients<V, kMask, kMasked, kRowsAtOnce>(row, matrix.columns, masked, sum, dot);
    advance(kRowsAtOnce);
  }
  while (r < matrix.rows) {
    add_gradients<V, kMask, kMasked, 1>(row, matrix.columns, masked, sum, dot);
    advance(1);
  }
}

template <class V>
void gradient_sums(const GradientMatrix& matrix, Mask mask, void* masked, void* sum, void* dot) {
  using Loop = void (*)(const GradientMatrix&, void*, void*, void*);
#define FR_LOOPS(mask)                                                                         \
  {                                                                                            \
    gradient_sums_loop<V, mask, Masked::dropped>, gradient_sums_loop<V, mask, Masked::stored>, \
        gradient_sums_loop<V, mask, Masked::streamed>                                          \
  }
  static constexpr Loop loops[4][3] = {FR_LOOPS(Mask::everywhere), FR_LOOPS(Mask::recomputed),
                                       FR_LOOPS(Mask::output), FR_LOOPS(Mask::bits)};
#undef FR_LOOPS
  const Masked how = !masked                           ? Masked::dropped
                     : streams_rows<V>(matrix, masked) ? Masked::streamed
                                                       : Masked::stored;
  loops[static_cast<int>(mask)][static_cast<int>(how)](matrix, masked, sum, dot);
}

template <class V, Mask kMask, bool kStatistics, bool kStream>
void input_gradient_loop(const GradientMatrix& matrix, const void* slope_in, const void* offset_in,
                         void* grad_input) {
  using P = typename V::Parameter;
  GradientRow<V> row(matrix);
  const P *slope = static_cast<const P*>(slope_in), *offset = static_cast<const P*>(offset_in);
  auto* out = static_cast<typename V::Element*>(grad_input);
  for (int64_t r = 0; r < matrix.rows; ++r, row.advance(matrix.columns), out += matrix.columns) {
    for_each_vector<V>(matrix.columns, [&](int64_t i, auto... rest) {
      const auto x = V::load(row.input + i, rest...);
      const auto g = row.template masked<kMask>(i, i, x, rest...);
      const auto scale = V::load_parameter(row.scale + i, rest...);
      if constexpr (kStatistics) {
        const auto deviation = x - V::load_parameter(row.mean + i, rest...);
        const auto through_statistics =
            V::multiply_add(deviation, V::load_parameter(slope + i, rest...),
                            V::load_parameter(offset + i, rest...));
        store_or_stream<V, kStream>(out + i, V::multiply_add(g, scale, through_statistics),
                                    rest...);
      } else {
        store_or_stream<V, kStream>(out + i, g * scale, rest...);
      }
    });
  }
}

template <class V>
void input_gradient(const GradientMatrix& matrix, Mask mask, const void* slope, const void* offset,
                    void* grad_input) {
  using Loop = void (*)(const GradientMatrix&, const void*, const void*, void*);
#define FR_LOOPS(mask)                                                                         \
  {                                                                                            \
    {input_gradient_loop<V, mask, false, false>, input_gradient_loop<V, mask, false, true>}, { \
      input_gradient_loop<V, mask, true, false>, input_gradient_loop<V, mask, true, true>      \
    }                                                                                          \
  }
  static constexpr Loop loops[4][2][2] = {FR_LOOPS(Mask::everywhere), FR_LOOPS(Mask::recomputed),
                                          FR_LOOPS(Mask::output), FR_LOOPS(Mask::bits)};
#undef FR_LOOPS
  // In place, the lines are in the cache already.
  const bool stream = grad_input != matrix.grad && streams_rows<V>(matrix, grad_input);
  loops[static_cast<int>(mask)][slope != nullptr][stream](matrix, slope, offset, grad_input);
}

template <class V>
constexpr BatchNormRows batch_norm_rows = {column_statistics<V>, run_statistics<V>,
                                           gradient_sums<V>, input_gradient<V>};

}  // namespace
}  // namespace fused_resnet
