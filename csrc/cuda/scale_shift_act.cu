// scale_shift_act on a GPU: output = act(input * scale[c] + shift[c] + residual).
//
// Reads input and residual once and writes output once, numel * element size bytes each; scale and
// shift are small and stay in registers or in cache. Three kernels: dense channels_last in 16-byte
// accesses with scale and shift in registers, also of a residual of fewer channels; any other dense
// layout in 16-byte accesses, a vector may straddle channels; and any strides, element by element.
#include "scale_shift_act.h"

#include <limits>
#include <type_traits>

#include "cuda/device/launch.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/library.h"
#include "cuda/narrow_residual.cuh"
#include "cuda/narrow_residual_of.h"

namespace fused_resnet {
namespace {

using device::ArithmeticType;
using device::at_least;
using device::kElementsIn16Bytes;
using device::load_streaming;
using device::narrow;
using device::Vector;
using device::widen;

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 4;   // rows a thread loads before it stores the first
constexpr int kMostLoops = 8;      // after joining dimensions; more are made dense first
constexpr int kMostGridY = 65535;  // CUDA's limit

template <typename T>
struct Operands {
  const T* input;
  const ArithmeticType<T>* scale;
  const ArithmeticType<T>* shift;
  const T* residual;  // null without one
  T* output;
  ArithmeticType<T> floor;  // the activation is max(x, floor): 0 for relu, -inf for none
};

// How a residual lies, if there is one: as the output, or in pixels of fewer channels.
enum class Residual { kNone, kWhole, kNarrow };

// Input, output and a whole residual are `rows` dense rows of `vectors` * N channels, which are
// pixels of a narrow one. Consecutive threads take consecutive vectors of a row, blockIdx.y the
// row's further ones; a block covers as many rows as fit.
template <typename T, Residual kResidual>
__global__ void __launch_bounds__(kThreads)
    scale_shift_act_channels_last(Operands<T> operands, int64_t rows, int vectors,
                                  ResidualOf<T, kResidual == Residual::kNarrow> residual) {
  constexpr int N = kElementsIn16Bytes<T>;
  using A = ArithmeticType<T>;
  const int lanes = min(vectors, kThreads);
  const int rows_per_block = kThreads / lanes;
  const int row_in_block = threadIdx.x / lanes;
  const int vector = blockIdx.y * kThreads + threadIdx.x % lanes;
  if (row_in_block >= rows_per_block || vector >= vectors) return;

  A scale[N], shift[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    scale[i] = __ldg(operands.scale + vector * N + i);
    shift[i] = __ldg(operands.shift + vector * N + i);
  }

  const int64_t row_size = static_cast<int64_t>(vectors) * N;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const auto process = [&](auto rows_at_once, int64_t row) {
    constexpr int kRows = rows_at_once;
    Vector<T, N> x[kRows];
    [[maybe_unused]] Vector<T, N> shortcut[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t offset = (row + r * row_step) * row_size + vector * N;
      x[r] = load_streaming<T, N>(operands.input + offset);
      if constexpr (kResidual == Residual::kNarrow) {
        const T* pixel = pixel_of<T>(residual, static_cast<unsigned>(row + r * row_step));
        shortcut[r] = load_narrow<T, N>(residual, pixel, vector * N);
      } else if constexpr (kResidual == Residual::kWhole) {
        shortcut[r] = load_streaming<T, N>(residual + offset);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A y = widen(x[r].values[i]) * scale[i] + shift[i];
        if constexpr (kResidual != Residual::kNone) y += widen(shortcut[r].values[i]);
        x[r].values[i] = narrow<T>(at_least(operands.floor, y));
      }
      device::store(operands.output + (row + r * row_step) * row_size + vector * N, x[r]);
    }
  };
  int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + row_in_block;
  for (; row + (kRowsInFlight - 1) * row_step < rows; row += kRowsInFlight * row_step) {
    process(std::integral_constant<int, kRowsInFlight>{}, row);
  }
  for (; row < rows; row += row_step) process(std::integral_constant<int, 1>{}, row);
}

// Input, residual and output are dense and laid out alike: element i has channel
// (i / plane) % channels. N is 1 or what 16 aligned bytes hold.
template <typename T, int N, bool kResidual>
__global__ void __launch_bounds__(kThreads)
    scale_shift_act_dense(Operands<T> operands, int64_t numel, int64_t channels, int64_t plane) {
  using A = ArithmeticType<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  // Divided once; from vector to vector the place within the plane and the channel only advance.
  const int64_t place_step = step % plane, channel_step = step / plane % channels;
  int64_t place = thread * N % plane, channel = thread * N / plane % channels;

  for (int64_t i = thread * N; i + N <= numel; i += step) {
    Vector<T, N> x = load_streaming<T, N>(operands.input + i);
    [[maybe_unused]] Vector<T, N> shortcut;
    if constexpr (kResidual) shortcut = load_streaming<T, N>(operands.residual + i);
    A scale = __ldg(operands.scale + channel), shift = __ldg(operands.shift + channel);
    int64_t current_place = place, current_channel = channel;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      A y = widen(x.values[e]) * scale + shift;
      if constexpr (kResidual) y += widen(shortcut.values[e]);
      x.values[e] = narrow<T>(at_least(operands.floor, y));
      if (e + 1 < N && ++current_place == plane) {
        current_place = 0;
        if (++current_channel == channels) current_channel = 0;
        scale = __ldg(operands.scale + current_channel);
        shift = __ldg(operands.shift + current_channel);
      }
    }
    device::store(operands.output + i, x);

    place += place_step;
    channel += channel_step;
    if (place >= plane) {
      place -= plane;
      ++channel;
    }
    if (channel >= channels) channel -= channels;
  }

  const int64_t i = numel / N * N + thread;  // the elements that fill no vector
  if (i < numel) {
    const int64_t c = i / plane % channels;
    A y = widen(operands.input[i]) * __ldg(operands.scale + c) + __ldg(operands.shift + c);
    if constexpr (kResidual) y += widen(operands.residual[i]);
    operands.output[i] = narrow<T>(at_least(operands.floor, y));
  }
}

struct Loops {
  Loop loops[kMostLoops];  // outermost first
  int count;
  // The residual's channels, see ResidualChannels, and the step between them.
  int64_t residual_begin, residual_end, residual_step;
};

// Input and residual have any strides, and the residual may have fewer channels. `Index` counts
// elements: 32 bits divide much faster than 64.
template <typename T, typename Index, bool kResidual>
__global__ void __launch_bounds__(kThreads)
    scale_shift_act_strided(Operands<T> operands, Index numel, Loops loops) {
  using A = ArithmeticType<T>;
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  const Index first = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  for (Index i = first; i < numel; i += step) {
    Index rest = i;
    int64_t input = 0, residual = 0, output = 0, channel = 0;
    for (int l = loops.count - 1; l >= 0; --l) {
      const Loop& loop = loops.loops[l];
      const Index size = static_cast<Index>(loop.size);
      const int64_t place = rest % size;
      rest /= size;
      input += place * loop.input;
      residual += place * loop.residual;
      output += place * loop.output;
      if (loop.is_channel) channel = place;
    }
    A y = widen(operands.input[input]) * __ldg(operands.scale + channel) +
          __ldg(operands.shift + channel);
    if constexpr (kResidual) {
      if (loops.residual_begin <= channel && channel < loops.residual_end) {
        y += widen(operands.residual[residual - loops.residual_begin * loops.residual_step]);
      }
    }
    operands.output[output] = narrow<T>(at_least(operands.floor, y));
  }
}

// Blocks for `work` items, at most as many as the GPU holds at a time: the kernels loop.
int grid_size(int64_t work, int64_t per_block, int device_index) {
  int processors = 0, threads = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_index));
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device_index));
  const int64_t resident = static_cast<int64_t>(processors) * (threads / kThreads);
  return static_cast<int>(std::min((work + per_block - 1) / per_block, resident));
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Every tensor is walked in the order it lies in memory, without gaps.
bool all_dense(const std::vector<Loop>& loops) {
  return std::all_of(loops.begin(), loops.end(), [](const Loop& loop) {
    return loop.input == loop.output && loop.residual == loop.output;
  });
}

// Starts the kernel for dense channels_last tensors.
template <typename T, Residual kResidual>
void launch_channels_last(const Operands<T>& operands, int64_t rows, int64_t vectors,
                          const ResidualOf<T, kResidual == Residual::kNarrow>& residual,
                          int device_index, cudaStream_t stream) {
  const int64_t rows_per_block = kThreads / std::min<int64_t>(vectors, kThreads);
  const dim3 blocks(grid_size(rows, rows_per_block, device_index),
                    static_cast<unsigned>((vectors + kThreads - 1) / kThreads));
  device::launch(scale_shift_act_channels_last<T, kResidual>, {blocks, kThreads, 0, stream},
                 operands, rows, vectors, residual);
}

// Whether that kernel can add a residual of fewer channels.
template <typename T>
bool takes_narrow(const Operands<T>& operands, const Tensor& input) {
  constexpr int N = kElementsIn16Bytes<T>;
  const int64_t channels = input.size(1);
  return input.dim() <= 4 && has_pixels_in_order(input) && is_aligned(operands.input) &&
         is_aligned(operands.output) && channels % N == 0 &&
         channels / N <= int64_t{kMostGridY} * kThreads && input.numel() / channels <= UINT32_MAX;
}

template <typename T, bool kResidual>
void launch(const Operands<T>& operands, const std::vector<Loop>& loops, const Tensor& input,
            const std::optional<Tensor>& residual, int64_t numel, int device_index,
            cudaStream_t stream) {
  constexpr int N = kElementsIn16Bytes<T>;
  const ResidualChannels there(input.size(1), residual);
  const bool is_narrow = kResidual && !there.are_all(input.size(1));
  if (is_narrow && takes_narrow(operands, input)) {
    launch_channels_last<T, Residual::kNarrow>(operands, numel / input.size(1), input.size(1) / N,
                                               narrow_residual_of(*residual, input.size(1), N, N),
                                               device_index, stream);
    return;
  }
  if (!all_dense(loops) || is_narrow) {
    Loops fixed{{},
                static_cast<int>(loops.size()),
                there.begin,
                there.end,
                residual ? step_of(*residual, 1) : 0};
    std::copy(loops.begin(), loops.end(), fixed.loops);
    const dim3 blocks = grid_size(numel, kThreads, device_index);
    if (numel <= INT32_MAX) {
      // The stride of a grid added to the last index must not wrap either: it stays below 2^32.
      device::launch(scale_shift_act_strided<T, uint32_t, kResidual>, {blocks, kThreads, 0, stream},
                     operands, numel, fixed);
    } else {
      device::launch(scale_shift_act_strided<T, int64_t, kResidual>, {blocks, kThreads, 0, stream},
                     operands, numel, fixed);
    }
    return;
  }

  const auto channel =
      std::find_if(loops.begin(), loops.end(), [](const Loop& loop) { return loop.is_channel; });
  const int64_t channels = channel == loops.end() ? 1 : channel->size;
  const int64_t plane = channel == loops.end() ? numel : channel->output;
  const bool aligned = is_aligned(operands.input) && is_aligned(operands.output) &&
                       is_aligned(operands.residual);  // null is
  const int64_t vectors = channels / N;
  if (aligned && plane == 1 && channels % N == 0 && vectors <= int64_t{kMostGridY} * kThreads) {
    launch_channels_last<T, kResidual ? Residual::kWhole : Residual::kNone>(
        operands, numel / channels, vectors, operands.residual, device_index, stream);
  } else if (aligned) {
    const dim3 blocks = grid_size(numel, kThreads * N, device_index);
    device::launch(scale_shift_act_dense<T, N, kResidual>, {blocks, kThreads, 0, stream}, operands,
                   numel, channels, plane);
  } else {
    const dim3 blocks = grid_size(numel, kThreads, device_index);
    device::launch(scale_shift_act_dense<T, 1, kResidual>, {blocks, kThreads, 0, stream}, operands,
                   numel, channels, plane);
  }
}

template <typename T>
void run(const Tensor& input, const Tensor& scale, const Tensor& shift,
         const std::optional<Tensor>& residual, const Tensor& output, bool relu,
         const std::vector<Loop>& loops) {
  using A = ArithmeticType<T>;
  const Operands<T> operands{static_cast<const T*>(input.const_data_ptr()),
                             static_cast<const A*>(scale.const_data_ptr()),
                             static_cast<const A*>(shift.const_data_ptr()),
                             residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr,
                             static_cast<T*>(output.mutable_data_ptr()),
                             relu ? A(0) : -std::numeric_limits<A>::infinity()};
  const int device_index = input.get_device_index();
  const cudaStream_t stream = current_stream(device_index);
  if (residual) {
    launch<T, true>(operands, loops, input, residual, output.numel(), device_index, stream);
  } else {
    launch<T, false>(operands, loops, input, residual, output.numel(), device_index, stream);
  }
}

Tensor copy_laid_out_like(const Tensor& layout, const Tensor& source) {
  Tensor copy = empty_output(layout);
  return torch::stable::copy_(copy, source);
}

// `residual` between the zeros it has in `layout`.
Tensor padded_like(const Tensor& layout, const Tensor& residual) {
  const ResidualChannels there(layout.size(1), residual);
  if (there.are_all(layout.size(1))) return copy_laid_out_like(layout, residual);
  Tensor padded = empty_output(layout);
  torch::stable::zero_(padded);
  Tensor middle = torch::stable::narrow(padded, 1, there.begin, there.end - there.begin);
  torch::stable::copy_(middle, residual);
  return padded;
}

Tensor scale_shift_act(const Tensor& input, const Tensor& scale, const Tensor& shift,
                       const std::optional<Tensor>& residual, const std::string& activation) {
  const bool relu = check_scale_shift_act(input, scale, shift, residual, activation);
  const DeviceGuard guard(input.get_device_index());
  const Tensor output = empty_output(input);
  if (output.numel() == 0) return output;
  std::vector<Loop> loops = make_loops(input, residual, output);
  Tensor dense_input = input;
  std::optional<Tensor> dense_residual = residual;
  if (loops.size() > kMostLoops) {
    dense_input = copy_laid_out_like(output, input);
    if (residual) dense_residual = padded_like(output, *residual);
    loops = make_loops(dense_input, dense_residual, output);
  }
  const Tensor dense_scale = dense_parameter(scale), dense_shift = dense_parameter(shift);
  switch (input.scalar_type()) {
    case ScalarType::Half:
      run<__half>(dense_input, dense_scale, dense_shift, dense_residual, output, relu, loops);
      break;
    case ScalarType::BFloat16:
      run<__nv_bfloat16>(dense_input, dense_scale, dense_shift, dense_residual, output, relu,
                         loops);
      break;
    case ScalarType::Double:
      run<double>(dense_input, dense_scale, dense_shift, dense_residual, output, relu, loops);
      break;
    default:
      run<float>(dense_input, dense_scale, dense_shift, dense_residual, output, relu, loops);
  }
  return output;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("scale_shift_act", TORCH_BOX(&fused_resnet::scale_shift_act));
}
