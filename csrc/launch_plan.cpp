// A plan: the launches that a forward pass of blocks came down to, to be issued again in one call.
//
// backends/triton/plans.py makes it from what an ordinary pass launched. Here it is a list of
// kernels, already loaded by whoever compiled them, each with its grid and its parameters:
// constants, or addresses in the input, in a parameter of the model, in the workspace or in the
// output. A run allocates the last two, fills in the addresses as they are at that moment, and
// hands the launches to the driver on the caller's stream.
//
// The driver is found when a plan first runs, so that this builds and loads where there is none; of
// its interface, which has not changed since CUDA 11.8, what is needed is declared here.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "checks.h"

namespace fused_resnet {
namespace {

// ---- The driver's interface: cuda.h ----

struct LaunchAttribute {
  int32_t id;
  char pad[4];
  union {
    char bytes[64];
    int32_t number;
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  uint32_t attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56);

constexpr int32_t kProgrammaticStreamSerialization = 6;

using LaunchFunction = int (*)(const LaunchConfig*, void*, void**, void**);
using ErrorFunction = int (*)(int, const char**);

struct Driver {
  LaunchFunction launch = nullptr;
  ErrorFunction error_string = nullptr;
};

const Driver& driver() {
  static const Driver found = [] {
    Driver driver;
    // Never closed: it is the library that torch's runtime has open too.
    if (void* library = dlopen("libcuda.so.1", RTLD_LAZY)) {
      driver.launch = reinterpret_cast<LaunchFunction>(dlsym(library, "cuLaunchKernelEx"));
      driver.error_string = reinterpret_cast<ErrorFunction>(dlsym(library, "cuGetErrorString"));
    }
    return driver;
  }();
  return found;
}

// ---- Plans ----

// What an address is counted from; from kFirstParameter on, the model's parameters.
enum Base : int64_t { kConstant = -1, kWorkspace, kOutput, kInput, kFirstParameter };

struct Argument {
  int64_t base;
  // Of a constant its bits, else bytes from the base.
  uint64_t value;
};

struct Launch {
  void* function;
  uint32_t grid[3], threads, shared_bytes;
  bool overlaps;
  std::vector<Argument> arguments;
};

// What of a tensor the kernels were compiled for, and what they assume of its address.
struct Form {
  explicit Form(const Tensor& tensor)
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

struct Plan {
  // Handles, not copies: a parameter that is given other memory has it here too.
  std::vector<Tensor> parameters;
  std::vector<Form> forms;
  Form input;
  std::vector<Launch> launches;
  size_t argument_count = 0;
  int64_t workspace_bytes;
  std::vector<int64_t> output_sizes, output_strides;
};

std::mutex plans_mutex;
std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans;
int64_t last_plan = 0;

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                int32_t dtype, const Tensor& like) {
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// Reads one number after the other.
class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& numbers) : numbers_(numbers) {}
  bool is_at_end() const { return at_ == numbers_.size(); }
  int64_t next() {
    FR_CHECK(at_ < numbers_.size(), "make_launch_plan: launches end after ", at_, " numbers");
    return numbers_[at_++];
  }
  uint32_t next_positive() {
    const int64_t number = next();
    FR_CHECK(number > 0 && number <= UINT32_MAX, "make_launch_plan: launches has ", number,
             " for a size, must be positive");
    return static_cast<uint32_t>(number);
  }

 private:
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

// `launches` holds for each: its handle, grid (x, y, z), threads, bytes of shared memory, whether
// it may begin before the one before it ends, how many parameters it has, and for each of these a
// Base and what `Argument::value` says.
int64_t make_launch_plan(const Tensor& input, const std::vector<Tensor>& parameters,
                         const std::vector<int64_t>& launches, int64_t workspace_bytes,
                         const std::vector<int64_t>& output_sizes,
                         const std::vector<int64_t>& output_strides) {
  FR_CHECK(workspace_bytes >= 0, "make_launch_plan: workspace_bytes is ", workspace_bytes,
           ", must not be negative");
  FR_CHECK(output_sizes.size() == output_strides.size(), "make_launch_plan: the output has ",
           output_sizes.size(), " sizes and ", output_strides.size(), " strides");
  auto plan = std::make_shared<Plan>(
      Plan{parameters, {}, Form(input), {}, 0, workspace_bytes, output_sizes, output_strides});
  for (const Tensor& parameter : parameters) plan->forms.emplace_back(parameter);
  Numbers numbers(launches);
  while (!numbers.is_at_end()) {
    Launch launch;
    launch.function = reinterpret_cast<void*>(numbers.next());
    FR_CHECK(launch.function, "make_launch_plan: a kernel's handle is 0");
    for (uint32_t& size : launch.grid) size = numbers.next_positive();
    launch.threads = numbers.next_positive();
    const int64_t shared = numbers.next();
    FR_CHECK(shared >= 0 && shared <= UINT32_MAX, "make_launch_plan: ", shared,
             " bytes of shared memory");
    launch.shared_bytes = static_cast<uint32_t>(shared);
    launch.overlaps = numbers.next() != 0;
    const int64_t count = numbers.next();
    FR_CHECK(count >= 0, "make_launch_plan: a kernel has ", count, " parameters");
    for (int64_t i = 0; i < count; ++i) {
      const int64_t base = numbers.next(), value = numbers.next();
      FR_CHECK(
          base >= kConstant && base < kFirstParameter + static_cast<int64_t>(parameters.size()),
          "make_launch_plan: no tensor ", base, " among ", parameters.size(), " parameters");
      launch.arguments.push_back({base, static_cast<uint64_t>(value)});
    }
    plan->argument_count += launch.arguments.size();
    plan->launches.push_back(std::move(launch));
  }
  const std::lock_guard lock(plans_mutex);
  plans[++last_plan] = std::move(plan);
  return last_plan;
}

void free_launch_plan(int64_t plan) {
  std::shared_ptr<const Plan> last;  // whose tensors are freed without the lock
  const std::lock_guard lock(plans_mutex);
  if (const auto found = plans.find(plan); found != plans.end()) {
    last = std::move(found->second);
    plans.erase(found);
  }
}

void issue(const Plan& plan, const std::vector<uint64_t>& bases, void* stream) {
  const Driver& cuda = driver();
  FR_CHECK(cuda.launch, "run_launch_plan: libcuda.so.1 has no cuLaunchKernelEx");
  // Of this call: others may run the same plan at the same time.
  std::vector<uint64_t> values(plan.argument_count);
  std::vector<void*> addresses(plan.argument_count);
  uint64_t* value = values.data();
  void** address = addresses.data();
  LaunchAttribute overlap{};
  overlap.id = kProgrammaticStreamSerialization;
  overlap.value.number = 1;
  for (size_t i = 0; i < plan.launches.size(); ++i) {
    const Launch& launch = plan.launches[i];
    void** const first = address;
    for (const Argument& argument : launch.arguments) {
      *value = argument.value;
      if (argument.base != kConstant) *value += bases[static_cast<size_t>(argument.base)];
      *address++ = value++;
    }
    LaunchConfig config{};
    std::memcpy(config.grid, launch.grid, sizeof(config.grid));
    config.block[0] = launch.threads;
    config.block[1] = config.block[2] = 1;
    config.shared_bytes = launch.shared_bytes;
    config.stream = stream;
    config.attributes = &overlap;
    config.attribute_count = launch.overlaps ? 1 : 0;
    if (const int status = cuda.launch(&config, launch.function, first, nullptr)) {
      const char* text = nullptr;
      if (cuda.error_string) cuda.error_string(status, &text);
      std::ostringstream message;
      message << "run_launch_plan: launch " << i + 1 << " of " << plan.launches.size()
              << ": CUDA error " << status << (text ? ": " : "") << (text ? text : "");
      throw std::runtime_error(message.str());
    }
  }
}

// Runs a plan on the current context's stream of this handle. Nothing where the input, or what has
// become of a parameter, is not what the plan was made for.
std::optional<Tensor> run_launch_plan(int64_t id, const Tensor& input, int64_t stream) {
  std::shared_ptr<const Plan> plan;
  {
    const std::lock_guard lock(plans_mutex);
    const auto found = plans.find(id);
    FR_CHECK(found != plans.end(), "run_launch_plan: there is no plan ", id);
    plan = found->second;
  }
  if (!plan->input.fits(input)) return std::nullopt;
  std::vector<uint64_t> bases(kFirstParameter + plan->parameters.size());
  for (size_t i = 0; i < plan->parameters.size(); ++i) {
    if (!plan->forms[i].fits(plan->parameters[i])) return std::nullopt;
    bases[kFirstParameter + i] = Form::address(plan->parameters[i]);
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  const Tensor output = allocate(plan->output_sizes, plan->output_strides, dtype, input);
  const Tensor workspace = allocate({plan->workspace_bytes}, {1}, aoti_torch_dtype_uint8(), input);
  bases[kWorkspace] = Form::address(workspace);
  bases[kOutput] = Form::address(output);
  bases[kInput] = Form::address(input);
  issue(*plan, bases, reinterpret_cast<void*>(stream));
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("make_launch_plan", TORCH_BOX(&make_launch_plan));
  m.impl("run_launch_plan", TORCH_BOX(&run_launch_plan));
  m.impl("free_launch_plan", TORCH_BOX(&free_launch_plan));
}

}  // namespace fused_resnet
