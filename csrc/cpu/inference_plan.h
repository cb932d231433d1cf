// What a forward pass came down to, to be run again in one call: a list of native calls, each
// prepared for inputs like the one that the pass was recorded with.
//
// An operator that takes part adds a `PlanStep` to the recording of its thread, if there is one,
// when it has done its work; see `plan_recording`. backends/cpu/plans.py begins and ends
// recordings.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "memory_format.h"

namespace fused_resnet::cpu {

class PlanStep {
 public:
  PlanStep() = default;
  PlanStep(const PlanStep&) = delete;
  PlanStep& operator=(const PlanStep&) = delete;
  virtual ~PlanStep() = default;

  // How many independent checks there are that copies still are what they were made from, and one
  // of them. All are made before a plan runs, by any threads.
  virtual int64_t checks() const { return 0; }
  virtual bool is_current(int64_t check) const {
    static_cast<void>(check);
    return true;
  }

  // Whether its checks are all there is to it.
  virtual bool only_checks() const { return false; }
  // From several threads at a time.
  virtual torch::stable::Tensor run(const torch::stable::Tensor& input) const = 0;
  // What `before` and then this one make of an input, where they need no tensor between them.
  virtual std::optional<torch::stable::Tensor> run_behind(
      const PlanStep& before, const torch::stable::Tensor& input) const {
    static_cast<void>(before);
    static_cast<void>(input);
    return std::nullopt;
  }
};

// What is known of a tensor without reading its values.
struct TensorForm {
  explicit TensorForm(const torch::stable::Tensor& tensor);
  bool operator==(const TensorForm& other) const = default;

  const void* data;
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
};

class PlanRecording {
 public:
  // A parameter for a step to keep: its memory, without a share in it. A plan runs only while the
  // model's parameters have the memory that was lent.
  torch::stable::Tensor lent(const torch::stable::Tensor& parameter);
  std::optional<torch::stable::Tensor> lent(const std::optional<torch::stable::Tensor>& parameter);
  // Likewise, where the step keeps a copy of its values that it compares only samples of.
  torch::stable::Tensor lent_and_copied(const torch::stable::Tensor& weight);

  // A call that made `output` of `input`.
  void add(const torch::stable::Tensor& input, const torch::stable::Tensor& output,
           std::unique_ptr<PlanStep> step);
  // A call that only compared.
  void add_check(std::unique_ptr<PlanStep> step);

 private:
  friend class InferencePlan;

  std::vector<std::unique_ptr<PlanStep>> steps_;
  std::vector<TensorForm> lent_;
  std::vector<bool> is_copied_;
  std::optional<TensorForm> input_;
  std::optional<torch::stable::Tensor> output_;
  std::string obstacle_;
};

// This thread's recording, or null.
PlanRecording* plan_recording();

}  // namespace fused_resnet::cpu
