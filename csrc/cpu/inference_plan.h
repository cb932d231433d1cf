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

  // From several threads at a time.
  virtual torch::stable::Tensor run(const torch::stable::Tensor& input) const = 0;
  // Likewise, of a step that was recorded with a residual, which has no other way to run.
  virtual torch::stable::Tensor run_adding(const torch::stable::Tensor& input,
                                           const torch::stable::Tensor& residual) const;
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

// A step that computes, and which values it reads: 0 is the pass's input, i the output of call
// i - 1.
struct PlanCall {
  const PlanStep* step;
  size_t input;
  std::optional<size_t> residual;
};

class PlanRecording {
 public:
  // A parameter for a step to keep: its memory, without a share in it. A plan runs only while the
  // model's parameters have the memory that was lent.
  torch::stable::Tensor lent(const torch::stable::Tensor& parameter);
  std::optional<torch::stable::Tensor> lent(const std::optional<torch::stable::Tensor>& parameter);
  // Likewise, where the step keeps a copy of its values that it compares only samples of.
  torch::stable::Tensor lent_and_copied(const torch::stable::Tensor& weight);

  // A call that made `output` of `input`, and of a residual if there is one: the pass's input, or
  // outputs of calls before it.
  void add(const torch::stable::Tensor& input, const torch::stable::Tensor& output,
           std::unique_ptr<PlanStep> step,
           const std::optional<torch::stable::Tensor>& residual = std::nullopt);
  // A call that only compared.
  void add_check(std::unique_ptr<PlanStep> step);

 private:
  friend class InferencePlan;

  // Which value a tensor is.
  std::optional<size_t> value_of(const TensorForm& form) const;

  std::vector<std::unique_ptr<PlanStep>> steps_;
  std::vector<PlanCall> calls_;
  std::vector<TensorForm> lent_;
  std::vector<bool> is_copied_;
  // The pass's input and each call's output.
  std::vector<TensorForm> values_;
  std::string obstacle_;
};

// This thread's recording, or null.
PlanRecording* plan_recording();

}  // namespace fused_resnet::cpu
