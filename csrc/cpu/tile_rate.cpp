// The operator multiply_tiles: work of a known size for the matrix unit, or where there is none the
// one for pairs of bfloat16, which a benchmark times.
#include "cpu/tile_rate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string>

#include "checks.h"
#include "cpu/isa.h"

namespace fused_resnet::cpu {
namespace {

// Steps on each of torch's threads. Returns the multiply-adds of all; 0 where there is no unit for
// such operands.
int64_t multiply_tiles(std::string dtype, int64_t steps) {
  FR_CHECK(dtype == "bfloat16" || dtype == "int8", "multiply_tiles: dtype is '", dtype,
           "', must be bfloat16 or int8");
#if defined(__x86_64__)
  const bool bytes = dtype == "int8";
  const bool tiles = tile_unit() == TileUnit::amx;
  const bool pairs = pair_unit() == PairUnit::avx512bf16;
  if (bytes ? !has_int8_tiles() : !tiles && !pairs) return 0;
  const auto multiply = bytes   ? multiply_byte_tiles
                        : tiles ? multiply_bfloat16_tiles
                                : multiply_bfloat16_pairs;
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  total += steps * multiply(steps);
                                }
                              });
  return total.load();
#else
  return 0;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("multiply_tiles", TORCH_BOX(&multiply_tiles));
}

}  // namespace fused_resnet::cpu
