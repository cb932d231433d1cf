// The loops of batch norm's training over dense rows, and the tables of them (cpu/isa.h).
//
// A matrix here is `rows` x `columns` dense values, each column of one channel: channels-last
// pixels, or a run of one channel's values with that channel's parameters repeated.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/vectors.h"

namespace fused_resnet {

// Where the gradient passes the activation: everywhere, or where its output is not <= 0, which is
// computed again as input * scale + shift, or read, or told by bits (ScaleShiftActRow's `passed`).
// Or the gradient is multiplied by the derivative of the activation at input * scale + shift +
// output, where what is called the output is a residual and may be null; for gradient_sums alone,
// which then writes g.
enum class Mask { everywhere, recomputed, output, bits, derivative };

// Parameters, `sum` and `dot` are float, double for float64. `output` is read for Mask::output
// only, `bits` for Mask::bits, whose `columns` are a multiple of kMaskedAtOnce.
struct GradientMatrix {
  const void *grad, *input, *output;
  const uint8_t* bits;
  const void *mean, *scale, *shift;
  int64_t rows, columns;
  bool stream;     // whether what is written goes past the caches, if it lies on a line's border
  Activation act;  // for Mask::derivative
};

// `columns` rounded up to whole vectors of 16, the longest vector's values. Static: files that
// include this one are compiled for different processors.
static constexpr int64_t padded_columns(int64_t columns) {
  return (columns + 15) / 16 * 16;
}

struct BatchNormRows {
  // Merges the columns' statistics into those of the `count` values before them, not fewer unless
  // there are none: `mean` of the values and sum of the `squares` of their deviations from it.
  // `shift` is the first values', from sample_columns. `scratch` has 3 * padded_columns(columns)
  // numbers.
  void (*column_statistics)(const void* input, int64_t rows, int64_t columns, const void* shift,
                            double* scratch, int64_t count, double* mean, double* squares);
  // Writes padded_columns(columns) parameters to `shift`, each near to the values of its column.
  void (*sample_columns)(const void* input, int64_t rows, int64_t columns, void* shift);
  // The same for `size` values of one channel.
  void (*run_statistics)(const void* input, int64_t size, int64_t count, double* mean,
                         double* squares);
  // Of each of `columns` values of pixels `stride` apart, at most a few hundred: the mean rounded,
  // the sum of what is left when that is taken away, and of the squares of that.
  void (*piece_statistics)(const void* input, int64_t pixels, int64_t stride, int64_t columns,
                           void* mean, void* rest, void* squares);
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

// Infinity minus itself would hide in which direction the mean is infinite.
template <typename P>
P finite_or_zero(P x) {
  return x - x == 0 ? x : 0;
}

// Sums of columns' values less a shift, and of those differences' squares.
struct ColumnSums {
  double *deviations, *squared;

  // Pairwise merging of sums of squared deviations: Chan, Golub and LeVeque, "Updating formulae and
  // a pairwise algorithm for computing sample variances" (1979), equation 2.1.
  template <typename P>
  void merge_into(const P* shift, double* mean, double* squares, int64_t columns, double added,
                  double count) const {
    const double per_added = 1 / added, share = added / (added + count), weight = count * share;
    for (int64_t i = 0; i < columns; ++i) {
      const double deviation = deviations[i], own_shift = static_cast<double>(shift[i]);
      const double own_mean = own_shift + deviation * per_added, before = mean[i];
      const double difference = own_mean - before;
      const double difference_of_squares = squared[i] - deviation * per_added * deviation;
      const double within = difference_of_squares < 0 ? 0 : difference_of_squares;
      // Squares that overflow, as those of large float64 values do, are infinite, not NaN.
      const double own = deviation - deviation == 0 ? squared[i] : within;
      squares[i] += squared[i] - squared[i] == 0 ? within : own;
      squares[i] += difference * weight * difference;
      mean[i] = before + (before - before == 0 ? difference * share : own_mean);
    }
  }

  // Whether sums made in float are good: no square overflowed or underflowed, and of the first
  // values, whose shift is a sample's, little cancels. The shift of later ones is made of those
  // before, and what cancels is little beside the variance of them all.
  bool are_good(int64_t columns, double added, double count) const {
    const double per_added = count > 0 ? 0 : 1 / added;
    int64_t kept = 0, normal = 0, zero = 0;  // numbers, so that the loop is vectorised
    for (int64_t i = 0; i < columns; ++i) {
      const double within = squared[i] - deviations[i] * per_added * deviations[i];
      kept += 32 * within - squared[i] >= 0 ? 1 : 0;  // not if infinite
      normal += squared[i] >= 0x1p-100 ? 1 : 0;
      zero += squared[i] == 0 ? 1 : 0;
    }
    return kept == columns && normal + zero == columns;
  }
};

// In what a few values are summed before their sum is widened: their own type, or double.
template <class V>
struct Narrow {
  using Values = typename V::Register;

  template <class... Rest>
  static Values load(const typename V::Element* p, Rest... rest) {
    return V::load(p, rest...);
  }
  static Values of(typename V::Register x) { return x; }
};
template <class V>
struct Widened {
  using Values = decltype(widen(V(), V::broadcast(0)));

  template <class... Rest>
  static Values load(const typename V::Element* p, Rest... rest) {
    return load_wide(V(), p, rest...);
  }
  static Values of(typename V::Register x) { return widen(V(), x); }
};

// So many rows are added up in registers before their sum is added to the columns'. Eight equal
// values' sum is off by two roundings at most.
constexpr int64_t kRowsAtOnce = 4, kStatisticsRowsAtOnce = 16;

template <class V, template <class> class In, int64_t kRows, bool kFirst, int64_t kVectors,
          class... Rest>
void add_rows_at(int64_t i, const typename V::Element* row, int64_t columns,
                 const typename V::Parameter* shift, const ColumnSums& sums, Rest... rest) {
  using Values = typename In<V>::Values;
  using Doubles = typename Widened<V>::Values;
  Values sum[kVectors], squared[kVectors], shifts[kVectors];
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) {
    shifts[v] = In<V>::of(V::load_parameter(shift + i + v * V::width));
    sum[v] = In<V>::load(row + i + v * V::width, rest...) - shifts[v];
    squared[v] = sum[v] * sum[v];
  }
#pragma GCC unroll 16
  for (int64_t k = 1; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto x = In<V>::load(row + k * columns + i + v * V::width, rest...) - shifts[v];
      sum[v] = sum[v] + x;
      squared[v] = x * x + squared[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) {
    double *deviations = sums.deviations + i + v * V::width,
           *of_squares = sums.squared + i + v * V::width;
    Doubles own = widen(V(), sum[v]), own_squared = widen(V(), squared[v]);
    if constexpr (!kFirst) {
      own = Doubles::load(deviations) + own;
      own_squared = Doubles::load(of_squares) + own_squared;
    }
    own.store(deviations);
    own_squared.store(of_squares);
  }
}

template <class V, template <class> class In, int64_t kRows, bool kFirst>
void add_rows(const typename V::Element* row, int64_t columns, const typename V::Parameter* shift,
              const ColumnSums& sums) {
  // As many as there are registers for; a row of so many is read in order.
  constexpr int64_t kVectors = V::width < 16 ? 2 : 4, kWhole = V::width < 16 ? 2 : 8;
  int64_t i = 0;
  if constexpr (V::width > 1) {
    if (columns == kWhole * V::width) {
      return add_rows_at<V, In, kRows, kFirst, kWhole>(0, row, columns, shift, sums);
    }
    for (; i + kVectors * V::width <= columns; i += kVectors * V::width) {
      add_rows_at<V, In, kRows, kFirst, kVectors>(i, row, columns, shift, sums);
    }
  }
  for_each_vector<V>(columns - i, [&](int64_t k, auto... rest) {
    add_rows_at<V, In, kRows, kFirst, 1>(i + k, row, columns, shift, sums, rest...);
  });
}

template <class V, template <class> class In>
void sum_columns(const typename V::Element* row, int64_t rows, int64_t columns,
                 const typename V::Parameter* shift, const ColumnSums& sums) {
  constexpr int64_t kMany = kStatisticsRowsAtOnce;
  int64_t r = rows >= kMany ? kMany : 1;
  if (r == kMany) {
    add_rows<V, In, kMany, true>(row, columns, shift, sums);
  } else {
    add_rows<V, In, 1, true>(row, columns, shift, sums);
  }
  for (; r + kMany <= rows; r += kMany) {
    add_rows<V, In, kMany, false>(row + r * columns, columns, shift, sums);
  }
  for (; r < rows; ++r) add_rows<V, In, 1, false>(row + r * columns, columns, shift, sums);
}

// The shift of values after `count` of this mean and sum of squared deviations: their mean, or zero
// where that is within a standard deviation. A small shift with more digits than the values would
// round all of a binade to the same side.
template <typename P>
P shift_after(double mean, double squares, double count) {
  return finite_or_zero(static_cast<P>(mean * mean * count < squares ? 0 : mean));
}

// Means of vectors' eight values and of their squares. That of eight equal values is that value.
template <class V, class Load>
void mean_of_eight(const Load& load, typename V::Register* mean,
                   typename V::Register* mean_square) {
  const auto mean_of = [](const auto& value) {
    const auto half = (value(0) + value(1)) + (value(2) + value(3));
    return (half + ((value(4) + value(5)) + (value(6) + value(7)))) * V::broadcast(0.125f);
  };
  *mean = mean_of(load);
  *mean_square = mean_of([&](int64_t k) { return load(k) * load(k); });
}

// First shifts, from eight rows, of which all are the first where there are fewer: as shift_after.
template <class V>
void sample_columns(const void* input, int64_t rows, int64_t columns, void* shift_out) {
  const auto* row = static_cast<const typename V::Element*>(input);
  auto* shift = static_cast<typename V::Parameter*>(shift_out);
  const int64_t apart = rows / 8 * columns;
  for_each_vector<V>(columns, [&](int64_t i, auto... rest) {
    typename V::Register mean, mean_square;
    mean_of_eight<V>([&](int64_t k) { return V::load(row + k * apart + i, rest...); }, &mean,
                     &mean_square);
    V::store_parameter(shift + i,
                       V::where_exceeds(mean_square, mean * (mean + mean), V::broadcast(0), mean));
  });
  for (int64_t i = 0; i < columns; ++i) shift[i] = finite_or_zero(shift[i]);
}

template <class V>
void column_statistics(const void* input, int64_t rows, int64_t columns, const void* first_shift,
                       double* scratch, int64_t count_in, double* mean, double* squares) {
  using P = typename V::Parameter;
  const auto* row = static_cast<const typename V::Element*>(input);
  const int64_t padded = padded_columns(columns);
  const ColumnSums sums{scratch, scratch + padded};
  const auto added = static_cast<double>(rows), count = static_cast<double>(count_in);
  const P* shift = static_cast<const P*>(first_shift);
  if (count_in > 0) {
    P* own_shift = reinterpret_cast<P*>(scratch + 2 * padded);
    for (int64_t i = 0; i < columns; ++i) own_shift[i] = shift_after<P>(mean[i], squares[i], count);
    shift = own_shift;
  }
  sum_columns<V, Narrow>(row, rows, columns, shift, sums);
  if (sizeof(P) < sizeof(double) && !sums.are_good(columns, added, count)) {
    sum_columns<V, Widened>(row, rows, columns, shift, sums);
  }
  sums.merge_into(shift, mean, squares, columns, added, count);
}

// The sums of one column, whose values lie side by side.
template <class V, template <class> class In>
void sum_run(const typename V::Element* run, int64_t size, typename V::Parameter shift,
             const ColumnSums& sums) {
  using Values = typename In<V>::Values;
  using Doubles = typename Widened<V>::Values;
  constexpr int64_t kAtOnce = 4;  // sums that do not wait for each other
  const auto shifts = In<V>::of(V::broadcast(shift));
  Doubles deviations = Doubles::broadcast(0), squared = deviations;
  int64_t i = 0;
  const auto load = [&](int64_t k) { return In<V>::load(run + i + k * V::width) - shifts; };
  while (i + kAtOnce * V::width <= size) {
    Values sum[kAtOnce], of_squares[kAtOnce];
    for (int64_t k = 0; k < kAtOnce; ++k) {
      sum[k] = load(k);
      of_squares[k] = sum[k] * sum[k];
    }
    i += kAtOnce * V::width;
    const int64_t left = (size - i) / (kAtOnce * V::width);
    const int64_t steps = left < kStatisticsRowsAtOnce - 1 ? left : kStatisticsRowsAtOnce - 1;
    for (int64_t step = 0; step < steps; ++step, i += kAtOnce * V::width) {
      for (int64_t k = 0; k < kAtOnce; ++k) {
        const auto x = load(k);
        sum[k] = sum[k] + x;
        of_squares[k] = x * x + of_squares[k];
      }
    }
    deviations = deviations + widen(V(), (sum[0] + sum[1]) + (sum[2] + sum[3]));
    squared =
        squared + widen(V(), (of_squares[0] + of_squares[1]) + (of_squares[2] + of_squares[3]));
  }
  const auto add = [&](Values x) {
    deviations = deviations + widen(V(), x);
    squared = squared + widen(V(), x * x);
  };
  for (; i + V::width <= size; i += V::width) add(load(0));
  if (i < size) {
    typename V::Parameter values[V::width];
    V::store_parameter(values, V::broadcast(shift));
    V::store_parameter(values, V::load(run + i, size - i), size - i);
    add(In<V>::of(V::load_parameter(values)) - shifts);
  }
  *sums.deviations = deviations.total();
  *sums.squared = squared.total();
}

// A first shift, from eight vectors, or, where there are fewer, from the first value.
template <class V>
typename V::Parameter sample_run(const typename V::Element* run, int64_t size) {
  using P = typename V::Parameter;
  if (size < 8 * V::width) {
    P values[V::width];
    V::store_parameter(values, V::load(run, 1));
    return finite_or_zero(values[0]);
  }
  typename V::Register lanes, lane_squares;
  mean_of_eight<V>([&](int64_t k) { return V::load(run + size / 8 * k); }, &lanes, &lane_squares);
  const double mean = widen(V(), lanes).total() / V::width;
  const double mean_square = widen(V(), lane_squares).total() / V::width;
  return shift_after<P>(mean, mean_square - mean * mean, 1);
}

template <class V>
void run_statistics(const void* input, int64_t size, int64_t count_in, double* mean,
                    double* squares) {
  using P = typename V::Parameter;
  const auto* run = static_cast<const typename V::Element*>(input);
  const auto added = static_cast<double>(size), count = static_cast<double>(count_in);
  double deviations, squared;
  const ColumnSums sums{&deviations, &squared};
  const P shift = count_in == 0 ? sample_run<V>(run, size) : shift_after<P>(*mean, *squares, count);
  sum_run<V, Narrow>(run, size, shift, sums);
  if (sizeof(P) < sizeof(double) && !sums.are_good(1, added, count)) {
    sum_run<V, Widened>(run, size, shift, sums);
  }
  sums.merge_into(&shift, mean, squares, 1, added, count);
}

template <class V, int kVectors, class... Rest>
void vectors_statistics(const typename V::Element* x, int64_t pixels, int64_t stride,
                        typename V::Parameter* mean_out, typename V::Parameter* rest_out,
                        typename V::Parameter* squares_out, Rest... partial) {
  using P = typename V::Parameter;
  using Register = typename V::Register;
  Register sum[kVectors], mean[kVectors], rest[kVectors], squares[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = rest[v] = squares[v] = V::broadcast(0);
  for (int64_t i = 0; i < pixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = V::add(sum[v], V::load(x + i * stride + v * V::width, partial...));
    }
  }
  const Register share = V::broadcast(1 / static_cast<P>(pixels));
  for (int v = 0; v < kVectors; ++v) mean[v] = sum[v] * share;
  for (int64_t i = 0; i < pixels; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const Register left = V::load(x + i * stride + v * V::width, partial...) - mean[v];
      rest[v] = V::add(rest[v], left);
      squares[v] = V::multiply_add(left, left, squares[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    V::store_parameter(mean_out + v * V::width, mean[v], partial...);
    V::store_parameter(rest_out + v * V::width, rest[v], partial...);
    V::store_parameter(squares_out + v * V::width, squares[v], partial...);
  }
}

template <class V>
void piece_statistics(const void* input, int64_t pixels, int64_t stride, int64_t columns,
                      void* mean_out, void* rest_out, void* squares_out) {
  using P = typename V::Parameter;
  constexpr int kVectors = 4;  // whole lines of memory
  const auto* x = static_cast<const typename V::Element*>(input);
  P *mean = static_cast<P*>(mean_out), *rest = static_cast<P*>(rest_out),
    *squares = static_cast<P*>(squares_out);
  int64_t i = 0;
  for (; i + kVectors * V::width <= columns; i += kVectors * V::width) {
    vectors_statistics<V, kVectors>(x + i, pixels, stride, mean + i, rest + i, squares + i);
  }
  for_each_vector<V>(columns - i, [&](int64_t j, auto... partial) {
    vectors_statistics<V, 1>(x + i + j, pixels, stride, mean + i + j, rest + i + j, squares + i + j,
                             partial...);
  });
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

// As many values at once as stay in the nearest cache, as float.
constexpr int64_t kDerivedAtOnce = 512;

template <class V>
void derivative_sums(const GradientMatrix& matrix, void* masked_out, void* sum_out, void* dot_out) {
  GradientRow<V> row(matrix);
  auto* masked = static_cast<typename V::Element*>(masked_out);
  auto *sum = static_cast<float*>(sum_out), *dot = static_cast<float*>(dot_out);
  alignas(64) float values[kDerivedAtOnce] = {}, grads[kDerivedAtOnce] = {};
  for (int64_t r = 0; r < matrix.rows; ++r, row.advance(matrix.columns), masked += matrix.columns) {
    for (int64_t first = 0; first < matrix.columns; first += kDerivedAtOnce) {
      const int64_t left = matrix.columns - first;
      const int64_t count = left < kDerivedAtOnce ? left : kDerivedAtOnce;
      for_each_vector<V>(count, [&](int64_t i, auto... rest) {
        const int64_t at = first + i;
        auto y = V::multiply_add(V::load(row.input + at, rest...),
                                 V::load_parameter(row.scale + at, rest...),
                                 V::load_parameter(row.shift + at, rest...));
        if (row.output) y = V::add(y, V::load(row.output + at, rest...));
        V::store_parameter(values + i, y, rest...);
        V::store_parameter(grads + i, V::load(row.grad + at, rest...), rest...);
      });
      cpu::multiply_by_derivative<cpu::kBytesOfActivation<V::width>>(matrix.act, values, grads,
                                                                     (count + 15) / 16 * 16);
      for_each_vector<V>(count, [&](int64_t i, auto... rest) {
        const int64_t at = first + i;
        const auto g = V::load_parameter(grads + i, rest...);
        const auto deviation =
            V::load(row.input + at, rest...) - V::load_parameter(row.mean + at, rest...);
        V::store(masked + at, g, rest...);
        V::store_parameter(sum + at, V::load_parameter(sum + at, rest...) + g, rest...);
        V::store_parameter(
            dot + at, V::multiply_add(g, deviation, V::load_parameter(dot + at, rest...)), rest...);
      });
    }
  }
}

template <class V>
void gradient_sums(const GradientMatrix& matrix, Mask mask, void* masked, void* sum, void* dot) {
  if constexpr (sizeof(typename V::Parameter) == sizeof(float)) {
    if (mask == Mask::derivative) return derivative_sums<V>(matrix, masked, sum, dot);
  }
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
constexpr BatchNormRows batch_norm_rows = {column_statistics<V>, sample_columns<V>,
                                           run_statistics<V>,    piece_statistics<V>,
                                           gradient_sums<V>,     input_gradient<V>};

}  // namespace
}  // namespace fused_resnet
