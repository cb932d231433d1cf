// The operators begin_cpu_plan, end_cpu_plan, run_cpu_plan and free_cpu_plan.
//
// A plan has no share in the model's parameters: neither in their memory, which goes when they do,
// nor in torch's tensors, which `torch.utils.swap_tensors` exchanges only where nobody else has
// them. It knows where these are, and whoever runs it has found that the parameters still have
// them.

#include "cpu/inference_plan.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "checks.h"
#include "cpu/shared_tasks.h"

namespace fused_resnet::cpu {

Tensor PlanStep::run_adding(const Tensor&, const Tensor&) const {
  FR_CHECK(false, "run_cpu_plan: a step without a residual has been given one");
}

TensorForm::TensorForm(const Tensor& tensor)
    : data(tensor.const_data_ptr()),
      dtype(static_cast<int32_t>(tensor.scalar_type())),
      sizes(tensor.sizes().begin(), tensor.sizes().end()),
      strides(tensor.strides().begin(), tensor.strides().end()) {}

// ---- recording ---------------------------------------------------------------------------------

namespace {

thread_local std::unique_ptr<PlanRecording> recording_of_thread;

}  // namespace

PlanRecording* plan_recording() {
  return recording_of_thread.get();
}

Tensor PlanRecording::lent(const Tensor& parameter) {
  TensorForm form(parameter);
  if (std::find(lent_.begin(), lent_.end(), form) == lent_.end()) {
    lent_.push_back(form);
    is_copied_.push_back(false);
  }
  return torch::stable::from_blob(const_cast<void*>(form.data), form.sizes, form.strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  parameter.scalar_type());
}

std::optional<Tensor> PlanRecording::lent(const std::optional<Tensor>& parameter) {
  return parameter ? std::optional<Tensor>(lent(*parameter)) : std::nullopt;
}

Tensor PlanRecording::lent_and_copied(const Tensor& weight) {
  const Tensor result = lent(weight);
  const auto found = std::find(lent_.begin(), lent_.end(), TensorForm(weight));
  is_copied_[static_cast<size_t>(found - lent_.begin())] = true;
  return result;
}

std::optional<size_t> PlanRecording::value_of(const TensorForm& form) const {
  // The last one: where memory is used again, what was there before is gone. Nothing but these
  // calls makes tensors in a pass that becomes a plan.
  const auto found = std::find(values_.rbegin(), values_.rend(), form);
  if (found == values_.rend()) return std::nullopt;
  return static_cast<size_t>(values_.rend() - found) - 1;
}

void PlanRecording::add(const Tensor& input, const Tensor& output, std::unique_ptr<PlanStep> step,
                        const std::optional<Tensor>& residual) {
  if (values_.empty()) values_.emplace_back(input);
  const std::optional<size_t> read = value_of(TensorForm(input));
  std::optional<size_t> added;
  if (residual) added = value_of(TensorForm(*residual));
  if (!read || (residual && !added)) {
    obstacle_ = "a call reads something else than the input and outputs of the ones before";
  }
  values_.emplace_back(output);
  calls_.push_back({step.get(), read.value_or(0), added});
  steps_.push_back(std::move(step));
}

void PlanRecording::add_check(std::unique_ptr<PlanStep> step) {
  steps_.push_back(std::move(step));
}

// ---- plans -------------------------------------------------------------------------------------

namespace {

constexpr size_t kMostDims = 4;

// Where Python's object of a tensor has its type, and what an at::Tensor holds, in words from its
// beginning. Found anew for each plan, since neither is anything that Python or torch promise.
struct ObjectLayout {
  static constexpr size_t kWords = 5;  // which every such object has

  size_t type = 0, tensor = 0;
};

// A parameter, as Python and torch keep it, and what it was like.
struct Parameter {
  const intptr_t* object;  // alive as long as whoever runs the plan sees to it
  intptr_t type;
  void* tensor;  // what an at::Tensor holds, and nothing else: see `is_handle_of`
  const void* data;
  int32_t dtype;
  size_t dims;
  int64_t sizes[kMostDims], strides[kMostDims];

  bool is_as_it_was(const ObjectLayout& layout) const {
    // `torch.utils.swap_tensors` gives an object another tensor, and this one may be gone.
    if (object[layout.type] != type ||
        object[layout.tensor] != reinterpret_cast<intptr_t>(tensor)) {
      return false;
    }
    const AtenTensorHandle handle = reinterpret_cast<AtenTensorHandle>(const_cast<void**>(&tensor));
    void* now;
    int32_t dtype_now;
    int64_t dims_now, *sizes_now, *strides_now;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &now));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_now));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims_now));
    if (now != data || dtype_now != dtype || dims_now != static_cast<int64_t>(dims)) return false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_now));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_now));
    return std::equal(sizes, sizes + dims, sizes_now) &&
           std::equal(strides, strides + dims, strides_now);
  }
};

// Whether a handle is the address of a pointer to what Python's `Tensor._cdata` says.
bool is_handle_of(const Tensor& tensor, int64_t cdata) {
  void* first;
  std::memcpy(&first, tensor.get(), sizeof first);
  return reinterpret_cast<intptr_t>(first) == static_cast<intptr_t>(cdata);
}

void prefetch(const void* object) {
  for (int line = 0; line < 4; ++line) {
    __builtin_prefetch(static_cast<const char*>(object) + 64 * line);
  }
}

}  // namespace

class InferencePlan {
 public:
  explicit InferencePlan(std::unique_ptr<PlanRecording> recording)
      : steps_(std::move(recording->steps_)),
        calls_(std::move(recording->calls_)),
        last_reader_(calls_.size() + 1, 0),
        input_(recording->values_.front()) {
    for (const auto& step : steps_) {
      for (int64_t i = 0; i < step->checks(); ++i) checks_.push_back({step.get(), i});
    }
    for (size_t i = 0; i < calls_.size(); ++i) {
      last_reader_[calls_[i].input] = i;
      if (calls_[i].residual) last_reader_[*calls_[i].residual] = i;
    }
  }

  // Tensors as Python has them: addresses of each object, of its type, and of what it holds.
  struct Objects {
    std::vector<int64_t> objects, types, cdatas;
  };

  // Nothing where the recording is no pass from `input` to `output` by the parameters alone.
  // `copied` are those whose values are in copies.
  static std::shared_ptr<const InferencePlan> made_of(std::unique_ptr<PlanRecording> recording,
                                                      const Tensor& input, const Tensor& output,
                                                      const std::vector<Tensor>& parameters,
                                                      const Objects& objects,
                                                      std::vector<int64_t>& copied) {
    if (!recording->obstacle_.empty() || recording->calls_.empty() ||
        recording->values_.front() != TensorForm(input) ||
        recording->values_.back() != TensorForm(output)) {
      return nullptr;
    }
    const std::optional<ObjectLayout> layout = layout_of(objects);
    if (!layout) return nullptr;
    std::vector<Parameter> known;
    std::vector<TensorForm> forms;
    for (const Tensor& parameter : parameters) forms.emplace_back(parameter);
    for (size_t i = 0; i < recording->lent_.size(); ++i) {
      const TensorForm& form = recording->lent_[i];
      const auto found = std::find(forms.begin(), forms.end(), form);
      const auto index = static_cast<size_t>(found - forms.begin());
      if (found == forms.end() || form.sizes.size() > kMostDims ||
          !is_handle_of(parameters[index], objects.cdatas[index])) {
        return nullptr;
      }
      Parameter parameter{reinterpret_cast<const intptr_t*>(objects.objects[index]),
                          objects.types[index],
                          reinterpret_cast<void*>(objects.cdatas[index]),
                          form.data,
                          form.dtype,
                          form.sizes.size(),
                          {},
                          {}};
      std::copy(form.sizes.begin(), form.sizes.end(), parameter.sizes);
      std::copy(form.strides.begin(), form.strides.end(), parameter.strides);
      known.push_back(parameter);
      if (recording->is_copied_[i]) copied.push_back(static_cast<int64_t>(index));
    }
    auto plan = std::make_shared<InferencePlan>(std::move(recording));
    plan->parameters_ = std::move(known);
    plan->layout_ = *layout;
    return plan;
  }

  std::optional<Tensor> run(const Tensor& input) const {
    if (!fits(input) || !parameters_are_as_they_were() || !copies_are_current()) {
      return std::nullopt;
    }
    std::vector<std::optional<Tensor>> values(calls_.size() + 1);
    values[0] = input;
    for (size_t i = 0; i < calls_.size(); ++i) {
      if (i + 1 < calls_.size() && reads_alone(i + 1)) {
        const Tensor& from = *values[calls_[i].input];
        if (auto both = calls_[i + 1].step->run_behind(*calls_[i].step, from)) {
          values[i + 2] = std::move(both);
          ++i;
          continue;
        }
      }
      const PlanCall& call = calls_[i];
      const Tensor& from = *values[call.input];
      values[i + 1] = call.residual ? call.step->run_adding(from, *values[*call.residual])
                                    : call.step->run(from);
      if (last_reader_[call.input] == i) values[call.input].reset();
      if (call.residual && last_reader_[*call.residual] == i) values[*call.residual].reset();
    }
    return std::move(values.back());
  }

 private:
  static std::optional<ObjectLayout> layout_of(const Objects& objects) {
    const auto found = [&](const std::vector<int64_t>& words) -> std::optional<size_t> {
      for (size_t at = 0; at < ObjectLayout::kWords; ++at) {
        bool all = true;
        for (size_t i = 0; i < words.size(); ++i) {
          all &= reinterpret_cast<const intptr_t*>(objects.objects[i])[at] == words[i];
        }
        if (all) return at;
      }
      return std::nullopt;
    };
    const auto type = found(objects.types), tensor = found(objects.cdatas);
    if (!type || !tensor) return std::nullopt;
    return ObjectLayout{*type, *tensor};
  }

  // Whether a call reads the output of the one before, which nothing else does, and nothing else.
  bool reads_alone(size_t i) const {
    return calls_[i].input == i && last_reader_[i] == i && !calls_[i].residual &&
           !calls_[i - 1].residual;
  }

  bool fits(const Tensor& input) const {
    TensorForm form(input);
    form.data = input_.data;
    return form == input_;
  }

  bool parameters_are_as_they_were() const {
    constexpr size_t kAhead = 8;  // they wait for memory
    for (size_t i = 0; i < std::min(kAhead, parameters_.size()); ++i) {
      prefetch(parameters_[i].tensor);
    }
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if (i + kAhead < parameters_.size()) prefetch(parameters_[i + kAhead].tensor);
      if (i + 2 * kAhead < parameters_.size())
        __builtin_prefetch(parameters_[i + 2 * kAhead].object);
      if (!parameters_[i].is_as_it_was(layout_)) return false;
    }
    return true;
  }

  bool copies_are_current() const {
    std::atomic<bool> current{true};
    share_tasks(static_cast<int64_t>(checks_.size()), 8, [&](int64_t i, bool) {
      const Check& check = checks_[static_cast<size_t>(i)];
      if (!check.step->is_current(check.index)) current.store(false, std::memory_order_relaxed);
    });
    return current.load();
  }

  struct Check {
    const PlanStep* step;
    int64_t index;
  };

  std::vector<std::unique_ptr<PlanStep>> steps_;
  std::vector<PlanCall> calls_;
  std::vector<size_t> last_reader_;  // of each value, the call
  std::vector<Check> checks_;
  std::vector<Parameter> parameters_;
  ObjectLayout layout_;
  TensorForm input_;
};

// ---- operators ---------------------------------------------------------------------------------

namespace {

std::mutex plans_mutex;
std::unordered_map<int64_t, std::shared_ptr<const InferencePlan>> plans;
int64_t last_plan = 0;

void begin_cpu_plan() {
  recording_of_thread = std::make_unique<PlanRecording>();
}

// Its number, and the indices of the parameters whose values it has in copies; nothing where there
// can be no plan. `objects` and `types` are the parameters' and their classes' addresses, `cdatas`
// their `_cdata`.
std::vector<int64_t> end_cpu_plan(Tensor input, Tensor output, std::vector<Tensor> parameters,
                                  std::vector<int64_t> objects, std::vector<int64_t> types,
                                  std::vector<int64_t> cdatas) {
  std::unique_ptr<PlanRecording> recording = std::move(recording_of_thread);
  FR_CHECK(recording != nullptr, "end_cpu_plan: this thread records no plan");
  for (const auto* addresses : {&objects, &types, &cdatas}) {
    FR_CHECK(parameters.size() == addresses->size(), "end_cpu_plan: ", parameters.size(),
             " parameters, ", addresses->size(), " addresses");
  }
  std::vector<int64_t> result{0};
  auto plan = InferencePlan::made_of(std::move(recording), input, output, parameters,
                                     {objects, types, cdatas}, result);
  if (plan == nullptr) return {};
  const std::lock_guard lock(plans_mutex);
  plans[++last_plan] = std::move(plan);
  result[0] = last_plan;
  return result;
}

void discard_cpu_plan() {
  recording_of_thread = nullptr;
}

// Nothing where the input, a parameter's memory or a copy of its values is not what it was.
std::optional<Tensor> run_cpu_plan(int64_t id, Tensor input) {
  std::shared_ptr<const InferencePlan> plan;
  {
    const std::lock_guard lock(plans_mutex);
    const auto found = plans.find(id);
    if (found == plans.end()) return std::nullopt;  // another thread has just freed it
    plan = found->second;
  }
  return plan->run(input);
}

void free_cpu_plan(int64_t id) {
  std::shared_ptr<const InferencePlan> last;  // freed behind the lock
  const std::lock_guard lock(plans_mutex);
  if (const auto found = plans.find(id); found != plans.end()) {
    last = std::move(found->second);
    plans.erase(found);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("begin_cpu_plan", TORCH_BOX(&begin_cpu_plan));
  m.impl("discard_cpu_plan", TORCH_BOX(&discard_cpu_plan));
  m.impl("free_cpu_plan", TORCH_BOX(&free_cpu_plan));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("end_cpu_plan", TORCH_BOX(&end_cpu_plan));
  m.impl("run_cpu_plan", TORCH_BOX(&run_cpu_plan));
}

}  // namespace fused_resnet::cpu
