// Plans of kernels that somebody else compiled and loaded, issued through the driver.
//
// fused_resnet/backends/triton/plans.py makes them from what an ordinary pass launched.
//
// The driver is found when a plan first runs, so that this builds and loads where there is none; of
// its interface, which has not changed since CUDA 11.8, what is needed is declared here.
#include "launch_plan.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstring>

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

LaunchPlans& plans() {
  static LaunchPlans all;
  return all;
}

int64_t make_launch_plan(const Tensor& input, const std::vector<Tensor>& parameters,
                         const std::vector<int64_t>& fixed, const std::vector<int64_t>& launches,
                         const std::vector<int64_t>& workspace,
                         const std::vector<int64_t>& output_sizes,
                         const std::vector<int64_t>& output_strides) {
  FR_CHECK(workspace.size() == 2 && workspace[1] == 0,
           "make_launch_plan: workspace must be bytes, and 0 of them cleared");
  return plans().add(std::make_shared<LaunchPlan>(input, parameters, fixed, launches, workspace,
                                                  output_sizes, output_strides));
}

void free_launch_plan(int64_t plan) {
  plans().remove(plan);
}

// Hands launches to the driver, on a stream of the current context.
class DriverIssuer {
 public:
  DriverIssuer(size_t count, void* stream) : count_(count) {
    overlap_.id = kProgrammaticStreamSerialization;
    overlap_.value.number = 1;
    config_.block[1] = config_.block[2] = 1;
    config_.stream = stream;
    config_.attributes = &overlap_;
  }

  void start(const PlannedLaunch& launch, size_t index, void** parameters) {
    std::memcpy(config_.grid, launch.grid, sizeof(config_.grid));
    config_.block[0] = launch.threads;
    config_.shared_bytes = launch.shared_bytes;
    config_.attribute_count = launch.overlaps ? 1 : 0;
    const Driver& cuda = driver();
    FR_CHECK(cuda.launch, "run_launch_plan: libcuda.so.1 has no cuLaunchKernelEx");
    if (const int status = cuda.launch(&config_, launch.function, parameters, nullptr)) {
      const char* text = nullptr;
      if (cuda.error_string) cuda.error_string(status, &text);
      std::ostringstream message;
      message << "run_launch_plan: launch " << index + 1 << " of " << count_ << ": CUDA error "
              << status << (text ? ": " : "") << (text ? text : "");
      throw std::runtime_error(message.str());
    }
  }

  void clear(void*, size_t) {}  // no such plan is made here

 private:
  size_t count_;
  LaunchConfig config_{};
  LaunchAttribute overlap_{};
};

// Runs a plan on the current context's stream of this handle.
std::optional<Tensor> run_launch_plan(int64_t id, const Tensor& input, int64_t stream) {
  const std::shared_ptr<const LaunchPlan> plan = plans().at(id);
  return plan->run(input, DriverIssuer(plan->launches().size(), reinterpret_cast<void*>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("make_launch_plan", TORCH_BOX(&make_launch_plan));
  m.impl("run_launch_plan", TORCH_BOX(&run_launch_plan));
  m.impl("free_launch_plan", TORCH_BOX(&free_launch_plan));
}

}  // namespace fused_resnet
