// The operator quantized_copies_match: whether eight-bit weights, and copies of vectors, still are
// what was made of tensors that may have been written to unseen; see layers/quantized_copies.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"
#include "cpu/shared_tasks.h"

namespace fused_resnet::cpu {
namespace {

constexpr const char* kOp = "quantized_copies_match";

// How many values of a weight a call looks at, at other places each time. If one in a hundred has
// changed, 20 calls miss all of them with a probability of at most 0.99^1400 < 1e-6.
constexpr int64_t kSamples = 70;

double value_at(const void* data, ScalarType dtype, int64_t place) {
  switch (dtype) {
    case ScalarType::Float:
      return static_cast<const float*>(data)[place];
    case ScalarType::BFloat16:
      return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[place]);
    case ScalarType::Half:
      return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[place]);
    default:
      return NAN;
  }
}

// As layers/quantized.py rounds it, from the same float64 operations. Never for NaN.
bool rounds_to(double value, double step, int8_t byte) {
  return std::nearbyint(value / step) == static_cast<double>(byte);
}

// Where the values of a weight are, a linear layer's (K, C) or a convolution's (K, C, R, S).
struct WeightPlaces {
  int64_t sizes[4] = {1, 1, 1, 1}, strides[4] = {};

  explicit WeightPlaces(const Tensor& weight) {
    for (int64_t i = 0; i < weight.dim(); ++i) {
      sizes[i] = weight.size(i);
      strides[i] = weight.stride(i);
    }
  }
  int64_t place(int64_t k, int64_t c, int64_t r, int64_t s) const {
    return k * strides[0] + c * strides[1] + r * strides[2] + s * strides[3];
  }
};

void check_weight(const Tensor& weight, const Tensor& bytes, const Tensor& step) {
  FR_CHECK(weight.dim() == 2 || weight.dim() == 4, kOp, ": a weight has shape ",
           shape_string(weight), ", must have two or four dimensions");
  check_floating(kOp, "a weight", weight, false);
  const int64_t K = weight.size(0);
  FR_CHECK(bytes.scalar_type() == ScalarType::Char && bytes.sizes().vec() == weight.sizes().vec(),
           kOp, ": an eight-bit weight must be int8 ", shape_string(weight));
  FR_CHECK(step.scalar_type() == ScalarType::Double && step.dim() == 1 && step.size(0) == K &&
               step.stride(0) == 1,
           kOp, ": steps must be float64 (", K, ",)");
}

bool sample_matches(const Tensor& weight, const Tensor& bytes, const Tensor& step, uint64_t call) {
  if (weight.numel() == 0) return true;
  const WeightPlaces from(weight), to(bytes);
  const auto [K, C, R, S] = from.sizes;
  const int64_t item = static_cast<int64_t>(weight.element_size());
  const char* source = static_cast<const char*>(weight.const_data_ptr());
  const int8_t* target = static_cast<const int8_t*>(bytes.const_data_ptr());
  int64_t places[kSamples], bytes_places[kSamples], filters[kSamples];
  // All places first: many reads then wait for memory at once.
  uint64_t state = call * kSamples;
  for (int64_t i = 0; i < kSamples; ++i) {
    // Half a step of SplitMix64 (Steele, Lea and Flood, 2014), of which the upper bits are used.
    uint64_t random = ++state * 0x9e3779b97f4a7c15;
    random = (random ^ (random >> 30)) * 0xbf58476d1ce4e5b9;
    const auto part = [&](int low, int bits, int64_t size) {
      const uint64_t value = random >> low & ((uint64_t{1} << bits) - 1);
      return static_cast<int64_t>(value * static_cast<uint64_t>(size) >> bits);
    };
    const int64_t k = part(44, 20, K), c = part(24, 20, C), r = part(14, 10, R), s = part(4, 10, S);
    filters[i] = k;
    places[i] = from.place(k, c, r, s);
    bytes_places[i] = to.place(k, c, r, s);
    __builtin_prefetch(source + places[i] * item);
    __builtin_prefetch(target + bytes_places[i]);
  }
  const double* steps = static_cast<const double*>(step.const_data_ptr());
  bool same = true;
  for (int64_t i = 0; i < kSamples; ++i) {
    same &= rounds_to(value_at(source, weight.scalar_type(), places[i]), steps[filters[i]],
                      target[bytes_places[i]]);
  }
  return same;
}

// Whether its elements, no two of which share memory, have no gaps between them.
bool is_dense(const Tensor& tensor) {
  int64_t reached = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) reached += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return tensor.numel() == 0 || reached == tensor.numel();
}

void check_vector(const Tensor& vector, const Tensor& copy) {
  FR_CHECK(copy.dim() == vector.dim() && (vector.dim() == 1 || vector.dim() == 4) &&
               copy.scalar_type() == vector.scalar_type(),
           kOp, ": a copy must have its vector's shape and dtype");
  for (int64_t i = 0; i < vector.dim(); ++i) {
    FR_CHECK(copy.size(i) == vector.size(i), kOp,
             ": a copy must have its vector's shape and dtype");
    FR_CHECK(vector.dim() == 1 || (copy.stride(i) == vector.stride(i)), kOp,
             ": a copy of a weight must lie as it does");
  }
  FR_CHECK(vector.dim() == 1 || is_dense(copy), kOp, ": a copy of a weight must be dense");
}

// Or a whole weight, which lies as its copy does.
bool vector_matches(const Tensor& vector, const Tensor& copy) {
  const size_t item = static_cast<size_t>(vector.element_size());
  const char* a = static_cast<const char*>(vector.const_data_ptr());
  const char* b = static_cast<const char*>(copy.const_data_ptr());
  if (vector.dim() != 1) {
    return std::memcmp(a, b, item * static_cast<size_t>(vector.numel())) == 0;
  }
  if (vector.stride(0) == 1 && copy.stride(0) == 1) {
    return std::memcmp(a, b, item * static_cast<size_t>(vector.size(0))) == 0;
  }
  const int64_t step_a = vector.stride(0) * static_cast<int64_t>(item);
  const int64_t step_b = copy.stride(0) * static_cast<int64_t>(item);
  for (int64_t i = 0; i < vector.size(0); ++i) {
    if (std::memcmp(a + i * step_a, b + i * step_b, item) != 0) return false;
  }
  return true;
}

// As a step of a plan its weights and vectors are lent ones.
class Copies : public PlanStep {
 public:
  Copies(std::vector<Tensor> weights, std::vector<Tensor> bytes, std::vector<Tensor> steps,
         std::vector<Tensor> vectors, std::vector<Tensor> copies)
      : weights_(std::move(weights)),
        bytes_(std::move(bytes)),
        steps_(std::move(steps)),
        vectors_(std::move(vectors)),
        copies_(std::move(copies)) {
    FR_CHECK(weights_.size() == bytes_.size() && weights_.size() == steps_.size() &&
                 vectors_.size() == copies_.size(),
             kOp, ": ", weights_.size(), " weights, ", bytes_.size(), " eight-bit ones, ",
             steps_.size(), " steps; ", vectors_.size(), " vectors, ", copies_.size(), " copies");
    for (size_t i = 0; i < weights_.size(); ++i) check_weight(weights_[i], bytes_[i], steps_[i]);
    for (size_t i = 0; i < vectors_.size(); ++i) check_vector(vectors_[i], copies_[i]);
  }

  int64_t checks() const override {
    return static_cast<int64_t>(weights_.size() + vectors_.size());
  }
  bool is_current(int64_t check) const override {
    static std::atomic<uint64_t> calls{0};
    const auto i = static_cast<size_t>(check);
    if (i >= weights_.size()) {
      return vector_matches(vectors_[i - weights_.size()], copies_[i - weights_.size()]);
    }
    const uint64_t call = calls.fetch_add(1, std::memory_order_relaxed);
    return sample_matches(weights_[i], bytes_[i], steps_[i], call);
  }

  Tensor run(const Tensor& input) const override { return input; }

 private:
  const std::vector<Tensor> weights_, bytes_, steps_, vectors_, copies_;
};

bool quantized_copies_match(std::vector<Tensor> weights, std::vector<Tensor> bytes,
                            std::vector<Tensor> steps, std::vector<Tensor> vectors,
                            std::vector<Tensor> copies) {
  const Copies all(weights, bytes, steps, vectors, copies);
  // They wait for memory, so all threads do.
  std::atomic<bool> same{true};
  share_tasks(all.checks(), 32, [&](int64_t i, bool) {
    if (!all.is_current(i)) same.store(false, std::memory_order_relaxed);
  });
  if (!same.load()) return false;
  if (PlanRecording* recording = plan_recording()) {
    for (Tensor& weight : weights) weight = recording->lent_and_copied(weight);
    for (Tensor& vector : vectors) vector = recording->lent(vector);
    recording->add_check(std::make_unique<Copies>(std::move(weights), std::move(bytes),
                                                  std::move(steps), std::move(vectors),
                                                  std::move(copies)));
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("quantized_copies_match", TORCH_BOX(&quantized_copies_match));
}

}  // namespace fused_resnet::cpu
