// What a plan of launches is, whoever issues them: csrc/launch_plan.cpp for kernels that others
// have loaded, csrc/cuda/launch_plan.cu for this package's own.
//
// A plan is a list of kernels, each with its grid and its parameters in words of eight bytes:
// constants, or addresses, counted from the input, the output, a workspace that the pass shares, or
// one of the model's parameters. Running it looks at the input and at every parameter again, takes
// output and workspace from torch's allocator, fills in addresses, and hands the launches on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"

namespace fused_resnet {

// What an address is counted from; from kFirstParameter on, the model's parameters.
enum Base : int64_t { kConstant = -1, kWorkspace, kOutput, kInput, kFirstParameter };

// Eight bytes of a kernel's parameters.
struct Word {
  int64_t base;
  // Of a constant its bits, else bytes from the base.
  uint64_t value;
};

struct PlannedLaunch {
  void* function;
  uint32_t grid[3], threads, shared_bytes;
  bool overlaps;                     // may begin before the one before it ends
  std::vector<uint32_t> parameters;  // how many words each has
  std::vector<Word> words;
};

// What of a tensor the kernels were compiled for, and what they assume of its address.
struct TensorForm {
  explicit TensorForm(const Tensor& tensor)
      : dtype(tensor.scalar_type()),
        device(tensor.get_device_index()),
        sizes(tensor.sizes().begin(), tensor.sizes().end()),
        strides(tensor.strides().begin(), tensor.strides().end()),
        is_aligned(address(tensor) % 16 == 0) {}

  static uint64_t address(const Tensor& tensor) {
    return reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  }

  bool fits(const Tensor& tensor) const {
    return tensor.scalar_type() == dtype && tensor.get_device_index() == device &&
           tensor.sizes().equals(sizes) && tensor.strides().equals(strides) &&
           (address(tensor) % 16 == 0 || !is_aligned);
  }

  ScalarType dtype;
  int32_t device;
  std::vector<int64_t> sizes, strides;
  bool is_aligned;
};

class LaunchPlan {
 public:
  // `numbers` holds for each launch: its handle, grid (x, y, z), threads, bytes of shared memory,
  // whether it overlaps, how many parameters it has, and for each of these how many words, and for
  // each word a Base and what `Word::value` says. Of `fixed` parameters, by index, the address must
  // stay what it is now: something that a kernel reads has it. `workspace` holds the bytes of the
  // workspace, and how many of the first are zero before the first launch.
  LaunchPlan(const Tensor& input, const std::vector<Tensor>& parameters,
             const std::vector<int64_t>& fixed, const std::vector<int64_t>& numbers,
             const std::vector<int64_t>& workspace, std::vector<int64_t> output_sizes,
             std::vector<int64_t> output_strides)
      : parameters_(parameters),
        addresses_(parameters.size()),
        input_(input),
        output_sizes_(std::move(output_sizes)),
        output_strides_(std::move(output_strides)) {
    FR_CHECK(workspace.size() == 2 && 0 <= workspace[1] && workspace[1] <= workspace[0],
             "make_launch_plan: workspace must be bytes, and how many of them are cleared");
    workspace_bytes_ = workspace[0];
    cleared_bytes_ = workspace[1];
    FR_CHECK(output_sizes_.size() == output_strides_.size(), "make_launch_plan: the output has ",
             output_sizes_.size(), " sizes and ", output_strides_.size(), " strides");
    for (const Tensor& parameter : parameters) forms_.emplace_back(parameter);
    for (const int64_t index : fixed) {
      FR_CHECK(0 <= index && index < static_cast<int64_t>(parameters.size()),
               "make_launch_plan: no parameter ", index, " among ", parameters.size());
      addresses_[static_cast<size_t>(index)] =
          TensorForm::address(parameters[static_cast<size_t>(index)]);
    }
    read_launches(numbers);
  }

  const std::vector<PlannedLaunch>& launches() const { return launches_; }

  // Runs it through `issuer.clear(address, bytes)`, where something is to be cleared, and
  // `issuer.start(launch, index, parameters)`. Nothing where the input, or what has become of a
  // parameter, is not what the plan was made for.
  template <typename Issuer>
  std::optional<Tensor> run(const Tensor& input, Issuer&& issuer) const {
    if (!input_.fits(input)) return std::nullopt;
    std::vector<uint64_t> bases(kFirstParameter + parameters_.size());
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if (!forms_[i].fits(parameters_[i])) return std::nullopt;
      const uint64_t address = TensorForm::address(parameters_[i]);
      if (addresses_[i] != 0 && addresses_[i] != address) return std::nullopt;
      bases[kFirstParameter + i] = address;
    }
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
    const Tensor output = allocate(output_sizes_, output_strides_, dtype, input);
    const Tensor workspace = allocate({workspace_bytes_}, {1}, aoti_torch_dtype_uint8(), input);
    bases[kWorkspace] = TensorForm::address(workspace);
    bases[kOutput] = TensorForm::address(output);
    bases[kInput] = TensorForm::address(input);
    if (cleared_bytes_ > 0) {
      issuer.clear(reinterpret_cast<void*>(bases[kWorkspace]), static_cast<size_t>(cleared_bytes_));
    }
    // Of this call: others may run the same plan at the same time.
    std::vector<uint64_t> values(word_count_);
    std::vector<void*> addresses(parameter_count_);
    uint64_t* value = values.data();
    void** address = addresses.data();
    for (size_t i = 0; i < launches_.size(); ++i) {
      const PlannedLaunch& launch = launches_[i];
      void** const first = address;
      const Word* word = launch.words.data();
      for (const uint32_t words : launch.parameters) {
        *address++ = value;
        for (uint32_t w = 0; w < words; ++w, ++word) {
          *value++ =
              word->value + (word->base == kConstant ? 0 : bases[static_cast<size_t>(word->base)]);
        }
      }
      issuer.start(launch, i, first);
    }
    return output;
  }

 private:
  static Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                         int32_t dtype, const Tensor& like) {
    int32_t device_type;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                    sizes.data(), strides.data(), dtype,
                                                    device_type, like.get_device_index(), &handle));
    return Tensor(handle);
  }

  void read_launches(const std::vector<int64_t>& numbers) {
    size_t at = 0;
    const auto next = [&] {
      FR_CHECK(at < numbers.size(), "make_launch_plan: launches end after ", at, " numbers");
      return numbers[at++];
    };
    const auto next_size = [&](int64_t least) {
      const int64_t number = next();
      FR_CHECK(number >= least && number <= UINT32_MAX, "make_launch_plan: launches has ", number,
               " for a size, must be ", least > 0 ? "positive" : "at least 0");
      return static_cast<uint32_t>(number);
    };
    while (at < numbers.size()) {
      PlannedLaunch launch;
      launch.function = reinterpret_cast<void*>(next());
      FR_CHECK(launch.function, "make_launch_plan: a kernel's handle is 0");
      for (uint32_t& size : launch.grid) size = next_size(1);
      launch.threads = next_size(1);
      launch.shared_bytes = next_size(0);
      launch.overlaps = next() != 0;
      for (uint32_t left = next_size(0); left > 0; --left) {
        launch.parameters.push_back(next_size(1));
        for (uint32_t w = 0; w < launch.parameters.back(); ++w) {
          const int64_t base = next(), value = next();
          FR_CHECK(base >= kConstant &&
                       base < kFirstParameter + static_cast<int64_t>(parameters_.size()),
                   "make_launch_plan: no tensor ", base, " among ", parameters_.size(),
                   " parameters");
          launch.words.push_back({base, static_cast<uint64_t>(value)});
        }
      }
      word_count_ += launch.words.size();
      parameter_count_ += launch.parameters.size();
      launches_.push_back(std::move(launch));
    }
  }

  // Handles, not copies: a parameter that is given other memory has it here too.
  std::vector<Tensor> parameters_;
  std::vector<TensorForm> forms_;
  std::vector<uint64_t> addresses_;  // of the fixed ones, else 0
  TensorForm input_;
  std::vector<PlannedLaunch> launches_;
  size_t word_count_ = 0, parameter_count_ = 0;
  int64_t workspace_bytes_, cleared_bytes_;
  std::vector<int64_t> output_sizes_, output_strides_;
};

// The plans of a library, by number.
class LaunchPlans {
 public:
  int64_t add(std::shared_ptr<const LaunchPlan> plan) {
    const std::lock_guard lock(mutex_);
    plans_[++last_] = std::move(plan);
    return last_;
  }

  void remove(int64_t number) {
    std::shared_ptr<const LaunchPlan> last;  // whose tensors are freed without the lock
    const std::lock_guard lock(mutex_);
    if (const auto found = plans_.find(number); found != plans_.end()) {
      last = std::move(found->second);
      plans_.erase(found);
    }
  }

  std::shared_ptr<const LaunchPlan> at(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(number);
    FR_CHECK(found != plans_.end(), "run_launch_plan: there is no plan ", number);
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const LaunchPlan>> plans_;
  int64_t last_ = 0;
};

}  // namespace fused_resnet
