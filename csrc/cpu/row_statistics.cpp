#include "cpu/row_statistics.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/conv_layer.h"

namespace fused_resnet::cpu {

RowStatistics::RowStatistics(torch::headeronly::ScalarType dtype) : kernels_(rows_for(dtype)) {}

void RowStatistics::begin(const Conv& conv) {
  rows_ = conv.N * conv.P;
  channels_ = conv.K;
  image_rows_ = conv.P;
  pixels_ = conv.Q;
  last_pixels_ = conv.last_q;
  memory_ = pool_tensor({rows_ * 3 * channels_}, {1}, torch::headeronly::ScalarType::Float);
  pieces_ = memory_.mutable_data_ptr<float>();
}

void RowStatistics::add(const Conv& conv, int64_t row_begin, int64_t row_end, int64_t begin,
                        int64_t end) {
  const int64_t item = conv.dtype == Dtype::kFloat32 ? 4 : 2;
  for (int64_t index = row_begin; index < row_end; ++index) {
    const int64_t n = index / image_rows_, p = index % image_rows_;
    const int64_t first = n * conv.out.n + p * conv.out.h + begin;
    float* to = row(index) + begin;
    kernels_.piece_statistics(static_cast<const char*>(conv.output) + first * item,
                              p + 1 == image_rows_ ? last_pixels_ : pixels_, conv.out.w,
                              end - begin, to, to + channels_, to + 2 * channels_);
  }
}

bool RowStatistics::finish(float* mean, float* variance) const {
  if (rows_ == 0) return false;
  std::atomic<bool> good{true};
  constexpr int64_t kLeastPerTask = 32768;
  torch::stable::parallel_for(
      0, channels_, kLeastPerTask / rows_ + 1, [&](int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        std::vector<double> means(count), squares(count);
        double before = 0;
        for (int64_t index = 0; index < rows_; ++index) {
          const auto added =
              static_cast<double>((index + 1) % image_rows_ == 0 ? last_pixels_ : pixels_);
          const float *own = row(index) + begin, *rest = own + channels_,
                      *within = rest + channels_;
          const double per_added = 1 / added, share = added / (added + before);
          const double weight = before * share;
          for (int64_t c = 0; c < count; ++c) {
            // Chan, Golub and LeVeque (1979), equation 2.1.
            const auto left = static_cast<double>(rest[c]);
            const double difference = static_cast<double>(own[c]) + left * per_added - means[c];
            squares[c] += static_cast<double>(within[c]) - left * left * per_added;
            squares[c] += difference * difference * weight;
            means[c] += difference * share;
          }
          before += added;
        }
        for (int64_t c = 0; c < count; ++c) {
          const double total = std::max(squares[c], 0.0);
          if (!(squares[c] <= 1e300) || (total > 0 && total < 0x1p-100)) good = false;
          mean[begin + c] = static_cast<float>(means[c]);
          variance[begin + c] = static_cast<float>(total / before);
        }
      });
  return good;
}

}  // namespace fused_resnet::cpu
