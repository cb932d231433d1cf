// The operators begin_cuda_recording, end_cuda_recording, make_cuda_plan, run_cuda_plan and
// free_cuda_plan: plans of this library's kernels (csrc/launch_plan.h), started as `device::launch`
// starts them. fused_resnet/backends/cuda_plans.py makes them.
#include "launch_plan.h"

#include <memory>
#include <utility>

#include "cuda/device/launch.cuh"
#include "cuda/library.h"
#include "cuda/recording.h"

namespace fused_resnet {

namespace {

void begin_cuda_recording() {
  delete std::exchange(recording, new Recording);
}

// `Recording::numbers` of what this thread called since then.
std::vector<int64_t> end_cuda_recording() {
  const std::unique_ptr<Recording> ended(std::exchange(recording, nullptr));
  FR_CHECK(ended, "end_cuda_recording: nothing is recorded on this thread");
  return ended->numbers();
}

// ---- Plans ----

LaunchPlans& plans() {
  static LaunchPlans all;
  return all;
}

int64_t make_cuda_plan(const Tensor& input, const std::vector<Tensor>& parameters,
                       const std::vector<int64_t>& fixed, const std::vector<int64_t>& launches,
                       const std::vector<int64_t>& workspace,
                       const std::vector<int64_t>& output_sizes,
                       const std::vector<int64_t>& output_strides) {
  return plans().add(std::make_shared<LaunchPlan>(input, parameters, fixed, launches, workspace,
                                                  output_sizes, output_strides));
}

void free_cuda_plan(int64_t plan) {
  plans().remove(plan);
}

class Issuer {
 public:
  explicit Issuer(cudaStream_t stream) : stream_(stream) {}

  void clear(void* address, size_t bytes) {
    STD_CUDA_CHECK(cudaMemsetAsync(address, 0, bytes, stream_));
  }

  void start(const PlannedLaunch& launch, size_t, void** parameters) {
    device::start(launch.function,
                  {dim3(launch.grid[0], launch.grid[1], launch.grid[2]), launch.threads,
                   launch.shared_bytes, stream_},
                  parameters);
  }

 private:
  cudaStream_t stream_;
};

std::optional<Tensor> run_cuda_plan(int64_t id, const Tensor& input) {
  const std::shared_ptr<const LaunchPlan> plan = plans().at(id);
  const DeviceGuard guard(input.get_device_index());
  return plan->run(input, Issuer(current_stream(input.get_device_index())));
}

// What the driver calls a kernel that was launched from this address, on the current device.
int64_t driver_function(int64_t function) {
#ifdef FUSED_RESNET_ON_HOST
  return function;
#else
  cudaFunction_t handle = nullptr;
  STD_CUDA_CHECK(cudaGetFuncBySymbol(&handle, reinterpret_cast<const void*>(function)));
  return reinterpret_cast<int64_t>(handle);
#endif
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("begin_cuda_recording", TORCH_BOX(&fused_resnet::begin_cuda_recording));
  m.impl("end_cuda_recording", TORCH_BOX(&fused_resnet::end_cuda_recording));
  m.impl("make_cuda_plan", TORCH_BOX(&fused_resnet::make_cuda_plan));
  m.impl("run_cuda_plan", TORCH_BOX(&fused_resnet::run_cuda_plan));
  m.impl("free_cuda_plan", TORCH_BOX(&fused_resnet::free_cuda_plan));
  m.impl("driver_function", TORCH_BOX(&fused_resnet::driver_function));
}
